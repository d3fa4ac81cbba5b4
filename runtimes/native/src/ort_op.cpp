// The ONNX Runtime operators of domain losa.sparse: SparseMatMulFp32, Y = X W^T with W compressed, and
// SparseSwiGLUFp32, Y = silu(X Wgate^T) * (X Wup^T) with both in one container.
//
// No exception leaves this file: each entry returns an OrtStatus. Messages that a caller should map to a
// typed error start with "losa.FormatError: " or "losa.KernelError: ".
#include <exception>
#include <mutex>
#include <string>
#include <vector>

#include "losa/export.h"
#include "losa/matmul.h"
#include "losa/ort_abi.h"
#include "losa/validate.h"

namespace losa {
namespace {

using ort::Calls;
using ort::Status;

constexpr size_t kInputs = 4;  // X, mask, values, block_offsets
constexpr const char* kInputNames[kInputs] = {"X", "mask", "values", "block_offsets"};
constexpr int kInputTypes[kInputs] = {ort::kFloat, ort::kUint8, ort::kFloat, ort::kInt64};

/// An operator; its callbacks get it back. `api` is for the one that ONNX Runtime gives none.
struct Op : ort::CustomOp {
  const ort::Api* api;
  const char* name;
  bool gated;
};

struct Kernel {
  Calls calls;
  const KernelRow* row;
  SparseFp32 weight;
  std::string where;  // operator and node, for messages
};

Status* format_error(const Calls& calls, const std::string& where, const std::string& message) {
  return calls.create_status(ort::kInvalidArgument, ("losa.FormatError: " + where + ": " + message).c_str());
}

std::string node_name(const Calls& calls, const ort::KernelInfo* info) {
  size_t size = 0;
  Status* status = calls.node_name(info, nullptr, &size);
  std::string name(size, '\0');
  if (status == nullptr && size != 0) status = calls.node_name(info, &name[0], &size);
  if (status != nullptr) calls.release(status);
  return name.c_str();  // without the final zero
}

/// Shape and element type of a tensor; frees what ONNX Runtime hands out on the way.
Status* describe_tensor(const Calls& calls, const ort::Value* value, std::vector<int64_t>* dims, int* type) {
  ort::TensorInfo* info = nullptr;
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

/// A constant input's data and element count; its shape must have the right product, not a certain rank.
Status* constant(const Calls& calls, const ort::KernelInfo* info, const std::string& where, size_t index,
                 const void** data, size_t* count) {
  int is_constant = 0;
  const ort::Value* value = nullptr;
  if (Status* status = calls.constant_input(info, index, &is_constant, &value)) return status;
  if (!is_constant || value == nullptr)
    return format_error(calls, where, std::string("input '") + kInputNames[index] +
                                    "' is not an initializer; the weight must be constant");
  std::vector<int64_t> dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, value, &dims, &type)) return status;
  if (type != kInputTypes[index])
    return format_error(calls, where, std::string("input '") + kInputNames[index] + "' has element type " +
                                    std::to_string(type) + ", not " + std::to_string(kInputTypes[index]));
  *count = 1;
  for (int64_t dim : dims) *count *= static_cast<size_t>(dim);
  void* pointer = nullptr;
  if (Status* status = calls.data(value, &pointer)) return status;
  *data = pointer;
  return nullptr;
}

Status* attribute(const Calls& calls, const ort::KernelInfo* info, const std::string& where, const char* name,
                  int64_t* value) {
  Status* status = calls.attribute(info, name, value);
  if (status == nullptr) return nullptr;
  calls.release(status);
  return format_error(calls, where, std::string("attribute '") + name + "' is missing");
}

Status* create(const Op& op, const Calls& calls, const ort::KernelInfo* info, void** result) {
  const std::string where = std::string(op.name) + " node '" + node_name(calls, info) + "'";
  SparseFp32Parts parts{};
  parts.gated = op.gated;
  if (Status* status = attribute(calls, info, where, "N", &parts.rows)) return status;
  if (Status* status = attribute(calls, info, where, "K", &parts.columns)) return status;
  parts.layout = kLayoutN16;  // the attribute may be left out: 1 is its default
  if (Status* status = calls.attribute(info, "layout", &parts.layout)) {
    calls.release(status);
    parts.layout = kLayoutN16;
  }
  const void *masks = nullptr, *values = nullptr, *offsets = nullptr;
  if (Status* status = constant(calls, info, where, 1, &masks, &parts.mask_bytes)) return status;
  if (Status* status = constant(calls, info, where, 2, &values, &parts.value_count)) return status;
  if (Status* status = constant(calls, info, where, 3, &offsets, &parts.offset_count)) return status;
  parts.masks = static_cast<const uint8_t*>(masks);
  parts.values = static_cast<const float*>(values);
  parts.block_offsets = static_cast<const int64_t*>(offsets);

  std::string error;
  const KernelRow* row = select_row_from_environment(&error);
  if (row == nullptr) return calls.create_status(ort::kFail, ("losa.KernelError: " + error).c_str());
  SparseFp32 weight{};
  if (!validate(parts, &weight, &error)) return format_error(calls, where, error);
  *result = new Kernel{calls, row, weight, where};
  return nullptr;
}

struct SessionThreads {
  const Calls& calls;
  ort::KernelContext* context;
  Status* status;

  static void run(void* self_pointer, size_t count, void (*task)(void*, size_t), void* argument) {
    SessionThreads& self = *static_cast<SessionThreads*>(self_pointer);
    // As many batches as tasks: a thread that is done takes the next one, so that one which wakes late or is
    // interrupted holds up a task, not a fixed share of them.
    if (self.status == nullptr)
      self.status = self.calls.parallel_for(self.context, task, count, count, argument);
  }
};

Status* compute(const Kernel& kernel, ort::KernelContext* context) {
  const Calls& calls = kernel.calls;
  const ort::Value* input = nullptr;
  if (Status* status = calls.input(context, 0, &input)) return status;
  std::vector<int64_t> dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, input, &dims, &type)) return status;
  if (dims.empty() || dims.back() != kernel.weight.columns)
    return format_error(calls, kernel.where,
                        "the last dimension of X is " +
                            (dims.empty() ? std::string("absent") : std::to_string(dims.back())) +
                            ", the weight has K = " + std::to_string(kernel.weight.columns));
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) tokens *= dims[i];
  dims.back() = kernel.weight.outputs;
  ort::Value* output = nullptr;
  if (Status* status = calls.output(context, 0, dims.data(), dims.size(), &output)) return status;
  void *x = nullptr, *y = nullptr;
  if (Status* status = calls.data(input, &x)) return status;
  if (Status* status = calls.data(output, &y)) return status;

  SessionThreads threads{calls, context, nullptr};
  const bool enough_memory = multiply(*kernel.row, kernel.weight, static_cast<const float*>(x), tokens,
                                      static_cast<float*>(y), {SessionThreads::run, &threads});
  if (threads.status != nullptr) return threads.status;
  if (!enough_memory)
    return calls.create_status(ort::kFail, (kernel.where + ": out of memory for packed activations").c_str());
  return nullptr;
}

/// Y has the shape of X with N as its last dimension, which lets ONNX Runtime plan memory.
Status* infer_shape(const Calls& calls, ort::ShapeInferContext* context) {
  const ort::OpAttribute* attribute = nullptr;
  if (Status* status = calls.attribute(context, "N", &attribute)) return status;
  int64_t rows = 0;
  if (Status* status = calls.read(attribute, &rows)) return status;
  ort::TensorInfo* input = nullptr;
  if (Status* status = calls.input_info(context, 0, &input)) return status;
  size_t rank = 0;
  if (Status* status = calls.rank(input, &rank)) return status;
  if (rank == 0) return nullptr;  // a scalar is refused when it arrives; an unknown shape stays unknown
  std::vector<int64_t> dims(rank);
  std::vector<const char*> names(rank);
  if (Status* status = calls.dims(input, dims.data(), rank)) return status;
  if (Status* status = calls.dim_names(input, names.data(), rank)) return status;
  dims.back() = rows;
  names.back() = "";
  ort::TensorInfo* output = nullptr;
  if (Status* status = calls.create_tensor_info(&output)) return status;
  Status* status = calls.set_element_type(output, ort::kFloat);
  if (status == nullptr) status = calls.set_dims(output, dims.data(), rank);
  if (status == nullptr) status = calls.set_dim_names(output, names.data(), rank);
  if (status == nullptr) status = calls.set_output_info(context, 0, output);
  calls.release(output);
  return status;
}

/// Runs `body`, turning what it throws (only memory can run out) into a status.
template <class Body>
Status* guarded(const Calls& calls, Body body) noexcept {
  try {
    return body();
  } catch (const std::exception& error) {
    return calls.create_status(ort::kFail, error.what());
  }
}

Op make_op(const ort::Api* api, const char* name, bool gated) {
  using ort::CustomOp;
  Op op{};
  op.api = api;
  op.name = name;
  op.gated = gated;
  op.version = ort::kApiVersion;
  op.GetName = [](const CustomOp* self) { return static_cast<const Op*>(self)->name; };
  op.GetExecutionProviderType = [](const CustomOp*) -> const char* { return "CPUExecutionProvider"; };
  op.GetInputTypeCount = [](const CustomOp*) { return kInputs; };
  op.GetInputType = [](const CustomOp*, size_t index) { return kInputTypes[index]; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 1; };
  op.GetOutputType = [](const CustomOp*, size_t) -> int { return ort::kFloat; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t) -> int { return ort::kRequired; };
  op.GetOutputCharacteristic = op.GetInputCharacteristic;
  op.GetInputMemoryType = [](const CustomOp*, size_t) { return 0; };
  op.GetVariadicInputMinArity = [](const CustomOp*) { return 1; };
  op.GetVariadicInputHomogeneity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputMinArity = op.GetVariadicInputMinArity;
  op.GetVariadicOutputHomogeneity = op.GetVariadicInputMinArity;
  op.GetStartVersion = op.GetVariadicInputMinArity;
  op.GetEndVersion = [](const CustomOp*) { return 0x7fffffff; };
  op.CreateKernelV2 = [](const CustomOp* self, const ort::Api* api, const ort::KernelInfo* info,
                         void** kernel) {
    const Calls calls(api);
    return guarded(calls, [&] { return create(*static_cast<const Op*>(self), calls, info, kernel); });
  };
  op.KernelComputeV2 = [](void* kernel_pointer, ort::KernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(kernel_pointer);
    return guarded(kernel.calls, [&] { return compute(kernel, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const CustomOp* self, ort::ShapeInferContext* context) {
    const Calls calls(static_cast<const Op*>(self)->api);
    return guarded(calls, [&] { return infer_shape(calls, context); });
  };
  return op;
}

/// The one domain of this process: sessions borrow it, so it is kept until the library is unloaded.
Status* shared_domain(const ort::Api* api, ort::CustomOpDomain** domain) {
  const Calls calls(api);
  static const Op ops[] = {make_op(api, "SparseMatMulFp32", false), make_op(api, "SparseSwiGLUFp32", true)};
  static std::mutex mutex;
  static ort::CustomOpDomain* made = nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  if (made == nullptr) {
    ort::CustomOpDomain* fresh = nullptr;
    if (Status* status = calls.create_domain("losa.sparse", &fresh)) return status;
    for (const Op& op : ops) {
      if (Status* status = calls.add_op(fresh, &op)) {
        calls.release(fresh);
        return status;
      }
    }
    made = fresh;
  }
  *domain = made;
  return nullptr;
}

}  // namespace
}  // namespace losa

/// The entry that ONNX Runtime looks up by name (SessionOptions.register_custom_ops_library).
extern "C" LOSA_EXPORT losa::ort::Status* RegisterCustomOps(losa::ort::SessionOptions* options,
                                                            const losa::ort::ApiBase* base) {
  const losa::ort::Api* api = base->GetApi(losa::ort::kApiVersion);
  // Without a table there is no way to make a status. ONNX Runtime before 1.17 has then printed why, and
  // the session that meets the operator uses its function body instead.
  if (api == nullptr) return nullptr;
  const losa::ort::Calls calls(api);
  return losa::guarded(calls, [&]() -> losa::ort::Status* {
    losa::ort::CustomOpDomain* domain = nullptr;
    if (losa::ort::Status* status = losa::shared_domain(api, &domain)) return status;
    return calls.add_domain(options, domain);
  });
}
