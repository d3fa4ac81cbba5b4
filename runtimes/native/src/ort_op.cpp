// The ONNX Runtime operators of domain losa.sparse, for values of each type (ValueType):
//   SparseMatMul   Y = X W^T with W compressed
//   SparseSwiGLU   Y = silu(X Wgate^T) * (X Wup^T) with both in one container
//   DenseMatMul    Y = X W^T with W rounded but not pruned, for the head
//   Embedding      rows of such a W by number, for the table that a head may share
//   SkipNorm...    the first three on the RMS norm of X + skip (norm.h); the sum is a second result
//   SkipNormSparseMLP   SkipNormSparseSwiGLU and the SparseMatMul that follows it
// Beside them ort_attention.cpp has attention.
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "losa/export.h"
#include "losa/matmul.h"
#include "losa/ort_weight.h"

namespace losa {
namespace {

using ort::Calls;
using ort::Status;

enum class Kind { kSparseMatMul, kSparseSwiGLU, kDenseMatMul, kEmbedding, kSparseMLP };

/// An operator; its callbacks get it back. `api` is for the one that ONNX Runtime gives none.
struct Op : ort::CustomOp {
  const ort::Api* api;
  std::string name;
  Kind kind;
  bool normed;
  std::vector<ort::Input> inputs;
  std::vector<ort::WeightPlace> weights;  // the last one's rows are the outputs
};

struct Kernel {
  Calls calls;
  const KernelRow* row;
  Kind kind;
  std::vector<Weight> weights;
  std::vector<std::shared_ptr<char>> memory;  // of the weights, where it is not the session's
  ort::Norm norm;
  std::string where;  // operator and node, for messages

  int64_t inputs() const { return weights.front().columns; }
  int64_t outputs() const { return weights.back().outputs; }
};

Status* create(const Op& op, const Calls& calls, const ort::KernelInfo* info, void** result) {
  const std::string where = op.name + " node '" + node_name(calls, info) + "'";
  const KernelRow* row = nullptr;
  if (Status* status = ort::choose_row(calls, &row)) return status;
  std::vector<Weight> weights;
  std::vector<std::shared_ptr<char>> memory(op.weights.size());
  for (const ort::WeightPlace& place : op.weights) {
    Weight weight{};
    if (Status* status = read_weight(calls, info, where, op.inputs, place, &weight, &memory[weights.size()]))
      return status;
    if (!weights.empty() && weight.columns != weights.back().outputs)
      return format_error(calls, where, place.prefix + "K is " + std::to_string(weight.columns) + ", not N = " +
                                            std::to_string(weights.back().outputs));
    weights.push_back(weight);
  }
  ort::Norm norm;
  if (op.normed)
    if (Status* status = norm.read(calls, info, where, op.inputs, weights.front().columns)) return status;
  *result = new Kernel{calls, row, op.kind, std::move(weights), std::move(memory), std::move(norm), where};
  return nullptr;
}

Status* compute(const Kernel& kernel, ort::KernelContext* context) {
  const Calls& calls = kernel.calls;
  const ort::Value* input = nullptr;
  if (Status* status = calls.input(context, 0, &input)) return status;
  std::vector<int64_t> dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, input, &dims, &type)) return status;
  const bool embedding = kernel.kind == Kind::kEmbedding;
  if (!embedding && (dims.empty() || dims.back() != kernel.inputs()))
    return format_error(calls, kernel.where,
                        "the last dimension of X is " +
                            (dims.empty() ? std::string("absent") : std::to_string(dims.back())) +
                            ", the weight has K = " + std::to_string(kernel.inputs()));
  SkipNorm norm{};
  if (!kernel.norm.gamma.empty())
    if (Status* status = kernel.norm.open(calls, context, kernel.where, dims, &norm)) return status;
  if (embedding)
    dims.push_back(kernel.inputs());
  else
    dims.back() = kernel.outputs();
  int64_t tokens = 1;
  for (size_t i = 0; i + 1 < dims.size(); ++i) tokens *= dims[i];
  ort::Value* output = nullptr;
  if (Status* status = calls.output(context, 0, dims.data(), dims.size(), &output)) return status;
  void *from = nullptr, *to = nullptr;
  if (Status* status = calls.data(input, &from)) return status;
  if (Status* status = calls.data(output, &to)) return status;
  float* y = static_cast<float*>(to);

  const Weight& weight = kernel.weights.front();
  if (embedding) {
    const int64_t* ids = static_cast<const int64_t*>(from);
    const int64_t wrong = gather_rows(weight, ids, tokens, y);
    if (wrong < 0) return nullptr;
    return calls.create_status(ort::kInvalidArgument, (kernel.where + ": id " + std::to_string(ids[wrong]) +
                                                       " is not in [0, " + std::to_string(weight.rows) + ")")
                                                          .c_str());
  }
  ort::SessionThreads threads{calls, context, nullptr};
  const Parallel parallel{ort::SessionThreads::run, &threads};
  const float* x = static_cast<const float*>(from);
  const bool enough_memory = kernel.kind == Kind::kSparseMLP
                                 ? mlp(*kernel.row, weight, kernel.weights[1], x, tokens, y, parallel, norm)
                                 : multiply(*kernel.row, weight, x, tokens, y, parallel, norm);
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
  const std::string width = op.weights.back().prefix + (embedding ? "K" : "N");
  if (Status* status = calls.attribute(context, width.c_str(), &attribute)) return status;
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

Op make_op(const ort::Api* api, const char* name, Kind kind, bool normed, ValueType type) {
  using ort::CustomOp;
  Op op{};
  op.api = api;
  op.name = std::string(normed ? "SkipNorm" : "") + name + ort::type_name(type);
  op.kind = kind;
  op.normed = normed;
  op.inputs.push_back(kind == Kind::kEmbedding ? ort::Input{"ids", ort::kInt64} : ort::Input{"X", ort::kFloat});
  if (normed) {
    op.inputs.push_back({"skip", ort::kFloat});
    op.inputs.push_back({"gamma", ort::kFloat});
  }
  const bool gated = kind == Kind::kSparseSwiGLU || kind == Kind::kSparseMLP;
  const bool dense = kind == Kind::kDenseMatMul || kind == Kind::kEmbedding;
  op.weights.push_back({"", type, gated, dense, kind == Kind::kEmbedding});
  if (kind == Kind::kSparseMLP) op.weights.push_back({"down_", type, false, false});
  for (ort::WeightPlace& place : op.weights) add_weight(&place, &op.inputs);
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
        if (normed) all.push_back(make_op(api, "SparseMLP", Kind::kSparseMLP, normed, value_type));
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
    std::vector<const ort::CustomOp*> all = ort::attention_ops(api);
    for (const Op& op : ops) all.push_back(&op);
    for (const ort::CustomOp* op : all) {
      if (Status* status = calls.add_op(fresh, op)) {
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
  if (base->minor_version() >= 24) losa::ort::api_of_24 = api;
  const losa::ort::Calls calls(api);
  return losa::ort::guarded(calls, [&]() -> losa::ort::Status* {
    losa::ort::CustomOpDomain* domain = nullptr;
    if (losa::ort::Status* status = losa::shared_domain(api, &domain)) return status;
    return calls.add_domain(options, domain);
  });
}
