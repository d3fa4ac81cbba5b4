// What the operators of all kinds (ort_op.cpp, ort_attention.cpp) do with ONNX Runtime.
//
// No exception leaves an entry: each returns a status. Messages that a caller should map to a typed error start with
// "losa.FormatError: " or "losa.KernelError: ".
#pragma once
#include <exception>
#include <string>
#include <vector>

#include "losa/kernel_table.h"
#include "losa/ort_abi.h"
#include "losa/parallel.h"

namespace losa::ort {

inline Status* format_error(const Calls& calls, const std::string& where, const std::string& message) {
  return calls.create_status(kInvalidArgument, ("losa.FormatError: " + where + ": " + message).c_str());
}

inline std::string node_name(const Calls& calls, const KernelInfo* info) {
  size_t size = 0;
  Status* status = calls.node_name(info, nullptr, &size);
  std::string name(size, '\0');
  if (status == nullptr && size != 0) status = calls.node_name(info, &name[0], &size);
  if (status != nullptr) calls.release(status);
  return name.c_str();  // without the final zero
}

/// Shape and element type of a tensor; frees what ONNX Runtime hands out on the way.
inline Status* describe_tensor(const Calls& calls, const Value* value, std::vector<int64_t>* dims, int* type) {
  if (calls.lends_shapes()) {
    const int64_t* lent = nullptr;
    size_t lent_rank = 0;
    if (Status* status = calls.shape(value, type, &lent, &lent_rank)) return status;
    dims->assign(lent, lent + lent_rank);
    return nullptr;
  }
  TensorInfo* info = nullptr;
  if (Status* status = calls.tensor_info(value, &info)) return status;
  size_t rank = 0;
  Status* status = calls.element_type(info, type);
  if (status == nullptr) status = calls.rank(info, &rank);
  if (status == nullptr) {
    dims->resize(rank);
    status = calls.dims(info, dims->data(), rank);
  }
  calls.release(info);
  return status;
}

inline Status* attribute(const Calls& calls, const KernelInfo* info, const std::string& where, const char* name,
                         int64_t* value) {
  Status* status = calls.attribute(info, name, value);
  if (status == nullptr) return nullptr;
  calls.release(status);
  return format_error(calls, where, std::string("attribute '") + name + "' is missing, or not one integer");
}

inline Status* attribute(const Calls& calls, const KernelInfo* info, const std::string& where, const char* name,
                         float* value) {
  Status* status = calls.attribute(info, name, value);
  if (status == nullptr) return nullptr;
  calls.release(status);
  return format_error(calls, where, std::string("attribute '") + name + "' is missing, or not one number");
}

/// An attribute that may be left out: `value` then keeps what it holds. One of another type is refused.
inline Status* optional_attribute(const Calls& calls, const KernelInfo* info, const std::string& where,
                                  const char* name, int64_t* value) {
  int64_t found = 0;
  Status* status = calls.attribute(info, name, &found);
  if (status == nullptr) {
    *value = found;
    return nullptr;
  }
  // ONNX Runtime has no other way to ask; a text that it may change one day makes us refuse, not guess.
  const bool missing = std::string(calls.message(status)).find("No attribute with name") != std::string::npos;
  calls.release(status);
  return missing ? nullptr
                 : format_error(calls, where, std::string("attribute '") + name + "' is not one integer");
}

/// The kernel row that LOSA_KERNEL names, or the best.
inline Status* choose_row(const Calls& calls, const KernelRow** row) {
  std::string error;
  *row = select_row_from_environment(&error);
  return *row != nullptr ? nullptr : calls.create_status(kFail, ("losa.KernelError: " + error).c_str());
}

/// Whether nothing is known of a size: ONNX Runtime would take its -1, without a name, for a number.
inline bool is_unknown(int64_t size, const char* name) { return size < 0 && (name == nullptr || *name == 0); }

/// The session's threads, as products and attention want them (parallel.h); a failure is kept in `status`.
struct SessionThreads {
  const Calls& calls;
  KernelContext* context;
  Status* status;

  static void run(void* self_pointer, size_t count, void (*task)(void*, size_t), void* argument) {
    SessionThreads& self = *static_cast<SessionThreads*>(self_pointer);
    // As many batches as tasks: a thread that is done takes the next one, so that one which wakes late or is
    // interrupted holds up a task, not a fixed share of them.
    if (self.status == nullptr)
      self.status = self.calls.parallel_for(self.context, task, count, count, argument);
  }
};

inline Status* set_output(const Calls& calls, ShapeInferContext* context, size_t index,
                          const std::vector<int64_t>& dims, const std::vector<const char*>& names) {
  TensorInfo* output = nullptr;
  if (Status* status = calls.create_tensor_info(&output)) return status;
  Status* status = calls.set_element_type(output, kFloat);
  if (status == nullptr) status = calls.set_dims(output, dims.data(), dims.size());
  if (status == nullptr)
    status = calls.set_dim_names(output, const_cast<const char**>(names.data()), names.size());
  if (status == nullptr) status = calls.set_output_info(context, index, output);
  calls.release(output);
  return status;
}

/// Runs `body`, turning what it throws (only memory can run out) into a status.
template <class Body>
Status* guarded(const Calls& calls, Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    return calls.create_status(kFail, error.what());
  }
}

/// What all operators say alike of themselves.
inline void say_what_is_common(CustomOp* op) {
  op->version = kApiVersion;
  op->GetExecutionProviderType = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op->GetOutputType = [](const CustomOp*, size_t) -> int { return kFloat; };
  op->GetInputCharacteristic = [](const CustomOp*, size_t) -> int { return kRequired; };
  op->GetOutputCharacteristic = op->GetInputCharacteristic;
  op->GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op->GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op->GetVariadicInputHomogeneity = op->GetVariadicInputMinArity;
  op->GetVariadicOutputMinArity = op->GetVariadicInputMinArity;
  op->GetVariadicOutputHomogeneity = op->GetVariadicInputMinArity;
  op->GetStartVersion = op->GetVariadicInputMinArity;
  op->GetEndVersion = [](const CustomOp*) { return 0x7fffffff; };
}

/// The operators of ort_attention.cpp; they live as long as the library.
std::vector<const CustomOp*> attention_ops(const Api* api);

}  // namespace losa::ort
