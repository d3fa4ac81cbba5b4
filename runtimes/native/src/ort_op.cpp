// The ONNX Runtime operators of domain losa.sparse, for values of each type (ValueType):
//   SparseMatMul   Y = X W^T with W compressed
//   SparseSwiGLU   Y = silu(X Wgate^T) * (X Wup^T) with both in one container
//   DenseMatMul    Y = X W^T with W rounded but not pruned, for the head
//   Embedding      rows of such a W by number, for the table that a head may share
//   SkipNorm...    the first three on the RMS norm of X + skip (norm.h); the sum is a second result
// Beside them ort_attention.cpp has GroupQueryAttention.
#include <cmath>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "losa/export.h"
#include "losa/matmul.h"
#include "losa/ort_tools.h"
#include "losa/validate.h"

namespace losa {
namespace {

using ort::Calls;
using ort::Status;

enum class Kind { kSparseMatMul, kSparseSwiGLU, kDenseMatMul, kEmbedding };

/// One input of an operator.
struct Input {
  const char* name;
  int type;                  // ort::ElementType
  size_t element_bytes;
  Bytes WeightParts::*part;  // null for what is no part of the weight: ids, X, skip and gamma
};
constexpr size_t kSkip = 1, kGamma = 2;  // where these are inputs

/// An operator; its callbacks get it back. `api` is for the one that ONNX Runtime gives none.
struct Op : ort::CustomOp {
  const ort::Api* api;
  std::string name;
  Kind kind;
  bool normed;
  ValueType type;
  std::vector<Input> inputs;

  bool gated() const { return kind == Kind::kSparseSwiGLU; }
  bool dense() const { return kind == Kind::kDenseMatMul || kind == Kind::kEmbedding; }
};

struct Kernel {
  Calls calls;
  const KernelRow* row;
  Weight weight;
  Kind kind;
  std::vector<float> gamma;  // empty: no norm
  float epsilon;
  std::string where;  // operator and node, for messages
};

/// A constant input's bytes; its shape must have the right product, not a certain rank.
Status* constant(const Calls& calls, const ort::KernelInfo* info, const std::string& where, const Op& op,
                 size_t index, Bytes* bytes) {
  const Input& input = op.inputs[index];
  int is_constant = 0;
  const ort::Value* value = nullptr;
  if (Status* status = calls.constant_input(info, index, &is_constant, &value)) return status;
  if (!is_constant || value == nullptr)
    return format_error(calls, where, std::string("input '") + input.name + "' is not an initializer; " +
                                          (input.part == nullptr ? "it" : "the weight") + " must be constant");
  std::vector<int64_t> dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, value, &dims, &type)) return status;
  if (type != input.type)
    return format_error(calls, where, std::string("input '") + input.name + "' has element type " +
                                    std::to_string(type) + ", not " + std::to_string(input.type));
  bytes->size = input.element_bytes;
  for (int64_t dim : dims) bytes->size *= static_cast<size_t>(dim);
  void* pointer = nullptr;
  if (Status* status = calls.data(value, &pointer)) return status;
  bytes->data = pointer;
  return nullptr;
}

/// The norm's gamma, copied to where it is aligned, and its epsilon.
Status* read_norm(const Op& op, const Calls& calls, const ort::KernelInfo* info, const std::string& where,
                  int64_t columns, std::vector<float>* gamma, float* epsilon) {
  if (Status* status = attribute(calls, info, where, "epsilon", epsilon)) return status;
  if (!(*epsilon >= 0) || std::isinf(*epsilon))
    return format_error(calls, where, "epsilon is " + std::to_string(*epsilon) + ", not a finite number from 0 on");
  Bytes bytes{};
  if (Status* status = constant(calls, info, where, op, kGamma, &bytes)) return status;
  if (bytes.data == nullptr || bytes.size != static_cast<size_t>(columns) * sizeof(float))
    return format_error(calls, where, "gamma has " + std::to_string(bytes.size) + " bytes, K = " +
                                          std::to_string(columns) + " needs " +
                                          std::to_string(static_cast<size_t>(columns) * sizeof(float)));
  gamma->resize(static_cast<size_t>(columns));
  std::memcpy(gamma->data(), bytes.data, bytes.size);
  return nullptr;
}

Status* create(const Op& op, const Calls& calls, const ort::KernelInfo* info, void** result) {
  const std::string where = op.name + " node '" + node_name(calls, info) + "'";
  WeightParts parts{};
  parts.type = static_cast<int32_t>(op.type);
  parts.gated = op.gated();
  parts.dense = op.dense();
  if (Status* status = attribute(calls, info, where, "N", &parts.rows)) return status;
  if (Status* status = attribute(calls, info, where, "K", &parts.columns)) return status;
  parts.layout = kLayoutN16;
  if (Status* status = optional_attribute(calls, info, where, "layout", &parts.layout)) return status;
  parts.group = kMaxGroup;
  parts.activation_bits = 16;
  if (is_integer(op.type)) {
    if (Status* status = optional_attribute(calls, info, where, "group", &parts.group)) return status;
    if (Status* status = optional_attribute(calls, info, where, "activation_bits", &parts.activation_bits))
      return status;
  }
  for (size_t i = 0; i < op.inputs.size(); ++i) {
    if (op.inputs[i].part == nullptr) continue;
    if (Status* status = constant(calls, info, where, op, i, &(parts.*op.inputs[i].part))) return status;
  }

  std::string error;
  const KernelRow* row = nullptr;
  if (Status* status = ort::choose_row(calls, &row)) return status;
  Weight weight{};
  if (!validate(parts, &weight, &error)) return format_error(calls, where, error);
  std::vector<float> gamma;
  float epsilon = 0;
  if (op.normed)
    if (Status* status = read_norm(op, calls, info, where, weight.columns, &gamma, &epsilon)) return status;
  *result = new Kernel{calls, row, weight, op.kind, std::move(gamma), epsilon, where};
  return nullptr;
}

/// What the call adds to X and where the sums go; `dims` are those of X.
Status* open_norm(const Kernel& kernel, ort::KernelContext* context, const std::vector<int64_t>& dims,
                  SkipNorm* norm) {
  const Calls& calls = kernel.calls;
  const ort::Value* skip = nullptr;
  if (Status* status = calls.input(context, kSkip, &skip)) return status;
  std::vector<int64_t> skip_dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, skip, &skip_dims, &type)) return status;
  if (skip_dims != dims) return format_error(calls, kernel.where, "skip has not the shape of X");
  ort::Value* sums = nullptr;
  if (Status* status = calls.output(context, 1, dims.data(), dims.size(), &sums)) return status;
  void *from = nullptr, *to = nullptr;
  if (Status* status = calls.data(skip, &from)) return status;
  if (Status* status = calls.data(sums, &to)) return status;
  *norm = {static_cast<const float*>(from), kernel.gamma.data(), kernel.epsilon, static_cast<float*>(to)};
  return nullptr;
}

Status* compute(const Kernel& kernel, ort::KernelContext* context) {
  const Calls& calls = kernel.calls;
  const Weight& weight = kernel.weight;
  const ort::Value* input = nullptr;
  if (Status* status = calls.input(context, 0, &input)) return status;
  std::vector<int64_t> dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, input, &dims, &type)) return status;
  const bool embedding = kernel.kind == Kind::kEmbedding;
  if (!embedding && (dims.empty() || dims.back() != weight.columns))
    return format_error(calls, kernel.where,
                        "the last dimension of X is " +
                            (dims.empty() ? std::string("absent") : std::to_string(dims.back())) +
                            ", the weight has K = " + std::to_string(weight.columns));
  SkipNorm norm{};
  if (!kernel.gamma.empty())
    if (Status* status = open_norm(kernel, context, dims, &norm)) return status;
  if (embedding)
    dims.push_back(weight.columns);
  else
    dims.back() = weight.outputs;
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) tokens *= dims[i];
  ort::Value* output = nullptr;
  if (Status* status = calls.output(context, 0, dims.data(), dims.size(), &output)) return status;
  void *x = nullptr, *y = nullptr;
  if (Status* status = calls.data(input, &x)) return status;
  if (Status* status = calls.data(output, &y)) return status;

  if (embedding) {
    const int64_t* ids = static_cast<const int64_t*>(x);
    const int64_t wrong = gather_rows(weight, ids, tokens, static_cast<float*>(y));
    if (wrong < 0) return nullptr;
    return calls.create_status(ort::kInvalidArgument, (kernel.where + ": id " + std::to_string(ids[wrong]) +
                                                       " is not in [0, " + std::to_string(weight.rows) + ")")
                                                          .c_str());
  }
  ort::SessionThreads threads{calls, context, nullptr};
  const bool enough_memory = multiply(*kernel.row, weight, static_cast<const float*>(x), tokens,
                                      static_cast<float*>(y), {ort::SessionThreads::run, &threads}, norm);
  if (threads.status != nullptr) return threads.status;
  if (!enough_memory)
    return calls.create_status(ort::kFail, (kernel.where + ": out of memory for activations").c_str());
  return nullptr;
}

/// Y has the shape of X with N as its last dimension (of ids with K behind), which lets ONNX Runtime plan memory; the
/// sum of a norm has that of X.
Status* infer_shape(const Op& op, const Calls& calls, ort::ShapeInferContext* context) {
  const bool embedding = op.kind == Kind::kEmbedding;
  const ort::OpAttribute* attribute = nullptr;
  if (Status* status = calls.attribute(context, embedding ? "K" : "N", &attribute)) return status;
  int64_t rows = 0;
  if (Status* status = calls.read(attribute, &rows)) return status;
  ort::TensorInfo* input = nullptr;
  if (Status* status = calls.input_info(context, 0, &input)) return status;
  size_t rank = 0;
  if (Status* status = calls.rank(input, &rank)) return status;
  if (rank == 0) return nullptr;  // a scalar is refused when it arrives; an unknown shape stays unknown
  std::vector<int64_t> dims(rank);
  std::vector<const char*> names(rank, "");
  if (Status* status = calls.dims(input, dims.data(), rank)) return status;
  if (Status* status = calls.dim_names(input, names.data(), rank)) return status;
  const auto unknown = [&](size_t i) { return ort::is_unknown(dims[i], names[i]); };
  for (size_t i = 0; i + (embedding ? 0 : 1) < rank; ++i)
    if (unknown(i)) return nullptr;
  if (op.normed && !unknown(rank - 1))
    if (Status* status = set_output(calls, context, 1, dims, names)) return status;
  if (embedding) {
    dims.push_back(rows);
    names.push_back("");
  }
  dims.back() = rows;
  names.back() = "";
  return set_output(calls, context, 0, dims, names);
}

std::vector<Input> inputs_of(Kind kind, bool normed, ValueType type) {
  const bool dense = kind == Kind::kDenseMatMul || kind == Kind::kEmbedding;
  static constexpr int kTypes[] = {ort::kFloat, ort::kBfloat16, ort::kInt8, ort::kUint8};
  std::vector<Input> inputs;
  if (kind == Kind::kEmbedding)
    inputs.push_back({"ids", ort::kInt64, 8, nullptr});
  else
    inputs.push_back({"X", ort::kFloat, 4, nullptr});
  if (normed) {
    inputs.push_back({"skip", ort::kFloat, 4, nullptr});
    inputs.push_back({"gamma", ort::kFloat, 4, nullptr});
  }
  if (!dense) inputs.push_back({"mask", ort::kUint8, 1, &WeightParts::masks});
  inputs.push_back({"values", kTypes[static_cast<int>(type)], static_cast<size_t>(element_bytes(type)),
                    &WeightParts::values});
  if (!dense) inputs.push_back({"block_offsets", ort::kInt64, 8, &WeightParts::block_offsets});
  if (is_integer(type)) inputs.push_back({"scales", ort::kFloat16, 2, &WeightParts::scales});
  if (type == ValueType::kInt4) inputs.push_back({"codebook", ort::kInt8, 1, &WeightParts::codebook});
  return inputs;
}

Op make_op(const ort::Api* api, const char* name, Kind kind, bool normed, ValueType type) {
  using ort::CustomOp;
  static constexpr const char* kTypeNames[] = {"Fp32", "Bf16", "Int8", "Int4"};
  Op op{};
  op.api = api;
  op.name = std::string(normed ? "SkipNorm" : "") + name + kTypeNames[static_cast<int>(type)];
  op.kind = kind;
  op.normed = normed;
  op.type = type;
  op.inputs = inputs_of(kind, normed, type);
  say_what_is_common(&op);
  op.GetName = [](const CustomOp* self) { return static_cast<const Op*>(self)->name.c_str(); };
  op.GetInputTypeCount = [](const CustomOp* self) { return static_cast<const Op*>(self)->inputs.size(); };
  op.GetInputType = [](const CustomOp* self, size_t index) {
    return static_cast<const Op*>(self)->inputs[index].type;
  };
  op.GetOutputTypeCount = [](const CustomOp* self) -> size_t {
    return static_cast<const Op*>(self)->normed ? 2 : 1;
  };
  op.CreateKernelV2 = [](const CustomOp* self, const ort::Api* api, const ort::KernelInfo* info,
                         void** kernel) {
    const Calls calls(api);
    return ort::guarded(calls, [&] { return create(*static_cast<const Op*>(self), calls, info, kernel); });
  };
  op.KernelComputeV2 = [](void* kernel_pointer, ort::KernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(kernel_pointer);
    return ort::guarded(kernel.calls, [&] { return compute(kernel, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const CustomOp* self, ort::ShapeInferContext* context) {
    const Op& op = *static_cast<const Op*>(self);
    const Calls calls(op.api);
    return ort::guarded(calls, [&] { return infer_shape(op, calls, context); });
  };
  return op;
}

/// The one domain of this process: sessions borrow it, so it is kept until the library is unloaded.
Status* shared_domain(const ort::Api* api, ort::CustomOpDomain** domain) {
  const Calls calls(api);
  static const std::vector<Op> ops = [api] {
    std::vector<Op> all;
    for (int type = 0; type < kValueTypes; ++type) {
      const ValueType value_type = static_cast<ValueType>(type);
      for (bool normed : {false, true}) {
        all.push_back(make_op(api, "SparseMatMul", Kind::kSparseMatMul, normed, value_type));
        all.push_back(make_op(api, "SparseSwiGLU", Kind::kSparseSwiGLU, normed, value_type));
        // A dense fp32 product is ONNX's own.
        if (value_type != ValueType::kFp32)
          all.push_back(make_op(api, "DenseMatMul", Kind::kDenseMatMul, normed, value_type));
      }
      if (value_type != ValueType::kFp32)
        all.push_back(make_op(api, "Embedding", Kind::kEmbedding, false, value_type));
    }
    return all;
  }();
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
    if (Status* status = calls.add_op(fresh, ort::attention_op(api))) {
      calls.release(fresh);
      return status;
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
  if (base->minor_version() >= 24) losa::ort::api_of_24 = api;
  const losa::ort::Calls calls(api);
  return losa::ort::guarded(calls, [&]() -> losa::ort::Status* {
    losa::ort::CustomOpDomain* domain = nullptr;
    if (losa::ort::Status* status = losa::shared_domain(api, &domain)) return status;
    return calls.add_domain(options, domain);
  });
}
