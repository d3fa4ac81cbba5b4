// The part of ONNX Runtime's C interface that this library uses, written down by slot number.
//
// ONNX Runtime's OrtApi is a table of function pointers that only ever grows at its end, and OrtCustomOp
// a struct that does the same behind its `version` field. Both are therefore described completely by
// positions, and no header of ONNX Runtime is needed to build. Version 17 is asked for and declared,
// never the newest: an ONNX Runtime older than a declared version refuses the operator.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>

namespace losa::ort {

constexpr uint32_t kApiVersion = 17;

// Opaque handles of ONNX Runtime.
struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct Value;
struct KernelInfo;
struct KernelContext;
struct TensorInfo;
struct ShapeInferContext;
struct OpAttribute;

struct Api {
  void* slots[415];  // of version 24; that of version 17 ends after 276
};
struct ApiBase {
  const Api* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();

  /// The n of ONNX Runtime 1.n; 0 of another one.
  int minor_version() const {
    const char* text = GetVersionString();
    return text[0] == '1' && text[1] == '.' ? std::atoi(text + 2) : 0;
  }
};

/// The table that has what came with version 24, too; null: none was seen. It is the same for all versions asked for.
inline std::atomic<const Api*> api_of_24{nullptr};

enum ErrorCode : int { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };
enum ElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kFloat16 = 10, kBfloat16 = 16 };
enum InputOutputCharacteristic : int { kRequired = 0, kOptional = 1 };
enum AttributeType : int { kInt = 1 };

/// OrtCustomOp as of version 17.
struct CustomOp {
  uint32_t version;
  void* (*CreateKernel)(const CustomOp*, const Api*, const KernelInfo*);
  const char* (*GetName)(const CustomOp*);
  const char* (*GetExecutionProviderType)(const CustomOp*);
  int (*GetInputType)(const CustomOp*, size_t index);
  size_t (*GetInputTypeCount)(const CustomOp*);
  int (*GetOutputType)(const CustomOp*, size_t index);
  size_t (*GetOutputTypeCount)(const CustomOp*);
  void (*KernelCompute)(void* kernel, KernelContext*);
  void (*KernelDestroy)(void* kernel);
  int (*GetInputCharacteristic)(const CustomOp*, size_t index);
  int (*GetOutputCharacteristic)(const CustomOp*, size_t index);
  int (*GetInputMemoryType)(const CustomOp*, size_t index);
  int (*GetVariadicInputMinArity)(const CustomOp*);
  int (*GetVariadicInputHomogeneity)(const CustomOp*);
  int (*GetVariadicOutputMinArity)(const CustomOp*);
  int (*GetVariadicOutputHomogeneity)(const CustomOp*);
  Status* (*CreateKernelV2)(const CustomOp*, const Api*, const KernelInfo*, void** kernel);
  Status* (*KernelComputeV2)(void* kernel, KernelContext*);
  Status* (*InferOutputShapeFn)(const CustomOp*, ShapeInferContext*);
  int (*GetStartVersion)(const CustomOp*);
  int (*GetEndVersion)(const CustomOp*);
  void* later_versions[8];  // stay null
};

/// One method for each slot used; ownership is said where ONNX Runtime hands something out.
class Calls {
 public:
  explicit Calls(const Api* api) : api_(api), lends_shapes_(api == api_of_24) {}

  /// The caller owns the status, or gives it back to ONNX Runtime by returning it.
  Status* create_status(ErrorCode code, const char* message) const {
    return call<0, Status*>(static_cast<int>(code), message);
  }
  /// Lives as long as `status`.
  const char* message(const Status* status) const { return call<2, const char*>(status); }
  void release(Status* status) const { call<93, void>(status); }

  Status* create_domain(const char* name, CustomOpDomain** domain) const {
    return call<26, Status*>(name, domain);
  }
  Status* add_op(CustomOpDomain* domain, const CustomOp* op) const { return call<27, Status*>(domain, op); }
  /// `domain` must outlive the sessions made from `options`.
  Status* add_domain(SessionOptions* options, CustomOpDomain* domain) const {
    return call<28, Status*>(options, domain);
  }
  void release(CustomOpDomain* domain) const { call<101, void>(domain); }

  Status* attribute(const KernelInfo* info, const char* name, float* value) const {
    return call<85, Status*>(info, name, value);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* value) const {
    return call<86, Status*>(info, name, value);
  }
  /// Writes at most *size bytes with a final zero; a null `text` asks for the size.
  Status* node_name(const KernelInfo* info, char* text, size_t* size) const {
    return call<244, Status*>(info, text, size);
  }
  /// `value` belongs to the session and lives as long as its kernels: not released here.
  Status* constant_input(const KernelInfo* info, size_t index, int* is_constant, const Value** value) const {
    return call<249, Status*>(info, index, is_constant, value);
  }

  Status* input_count(const KernelContext* context, size_t* count) const {
    return call<88, Status*>(context, count);
  }
  /// `value` belongs to the running call, and is null for an input that is left out.
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return call<90, Status*>(context, index, value);
  }
  /// Allocates the output; `value` belongs to the running call.
  Status* output(KernelContext* context, size_t index, const int64_t* dims, size_t rank, Value** value) const {
    return call<91, Status*>(context, index, dims, rank, value);
  }
  /// Hands out `batches` runs of neighbouring indices to the session's threads; 0 means a run a thread.
  Status* parallel_for(const KernelContext* context, void (*task)(void*, size_t), size_t count, size_t batches,
                       void* argument) const {
    return call<274, Status*>(context, task, count, batches, argument);
  }

  Status* data(const Value* value, void** pointer) const {
    return call<51, Status*>(const_cast<Value*>(value), pointer);
  }
  /// Whether there is `shape`, which spares a tensor_info, that is some allocations.
  bool lends_shapes() const { return lends_shapes_; }
  /// `dims` lives as long as `value`.
  Status* shape(const Value* value, int* type, const int64_t** dims, size_t* rank) const {
    return call<414, Status*>(value, type, dims, rank);
  }
  /// The caller releases `info`.
  Status* tensor_info(const Value* value, TensorInfo** info) const { return call<65, Status*>(value, info); }
  void release(TensorInfo* info) const { call<99, void>(info); }
  Status* element_type(const TensorInfo* info, int* type) const { return call<60, Status*>(info, type); }
  Status* rank(const TensorInfo* info, size_t* rank) const { return call<61, Status*>(info, rank); }
  Status* dims(const TensorInfo* info, int64_t* dims, size_t rank) const {
    return call<62, Status*>(info, dims, rank);
  }
  /// Names of unknown dimensions, empty for known ones; they live as long as `info`.
  Status* dim_names(const TensorInfo* info, const char** names, size_t rank) const {
    return call<63, Status*>(info, names, rank);
  }

  /// The caller releases `info`.
  Status* create_tensor_info(TensorInfo** info) const { return call<57, Status*>(info); }
  Status* set_element_type(TensorInfo* info, ElementType type) const {
    return call<58, Status*>(info, static_cast<int>(type));
  }
  Status* set_dims(TensorInfo* info, const int64_t* dims, size_t rank) const {
    return call<59, Status*>(info, dims, rank);
  }
  Status* set_dim_names(TensorInfo* info, const char** names, size_t rank) const {
    return call<271, Status*>(info, names, rank);
  }
  /// `info` belongs to the context.
  Status* input_info(const ShapeInferContext* context, size_t index, TensorInfo** info) const {
    return call<268, Status*>(context, index, info);
  }
  /// `value` belongs to the context.
  Status* attribute(const ShapeInferContext* context, const char* name, const OpAttribute** value) const {
    return call<269, Status*>(context, name, value);
  }
  Status* read(const OpAttribute* attribute, int64_t* value) const {
    size_t size = 0;
    return call<272, Status*>(attribute, static_cast<int>(kInt), static_cast<void*>(value), sizeof *value,
                              &size);
  }
  /// Copies `info`.
  Status* set_output_info(const ShapeInferContext* context, size_t index, const TensorInfo* info) const {
    return call<270, Status*>(context, index, info);
  }

 private:
  template <size_t Slot, class Result, class... Arguments>
  Result call(Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(api_->slots[Slot])(arguments...);
  }

  const Api* api_;
  bool lends_shapes_;
};

}  // namespace losa::ort
