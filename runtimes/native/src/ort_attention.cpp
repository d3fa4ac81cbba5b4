// Attention of domain losa.sparse:
//   GroupQueryAttention      inputs, attributes and outputs are those that ONNX Runtime's own operator of that name, in
//                            com.microsoft, needs for a decoder with a cache. ONNX Runtime's takes the rows of a batch one
//                            after the other where they have different lengths, and waits for its threads after each.
//   SkipNormSparseAttention  the same between the two products of a block, and the norm before them: for values of each
//                            type, SkipNormSparseMatMul for query, key and value, and SparseMatMul of what is attended to
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "losa/attention.h"
#include "losa/matmul.h"
#include "losa/ort_weight.h"
#include "losa/token_tiles.h"

namespace losa {
namespace {

using ort::Calls;
using ort::Status;

/// What attention reads. Without key and value, query holds all three; without caches nothing is rotated.
enum Place : size_t {
  kQuery, kKey, kValue, kPastKey, kPastValue, kLast, kTotal, kCosines, kSines, kPositions, kPlaces
};
constexpr const char* kNames[] = {"query", "key", "value", "past_key", "past_value", "seqlens_k",
                                  "total_sequence_length", "cos_cache", "sin_cache", "position_ids"};
constexpr int kTypes[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt32,
                          ort::kInt32, ort::kFloat, ort::kFloat, ort::kInt64};
bool is_optional(size_t place) {
  return place == kKey || place == kValue || place == kCosines || place == kSines || place == kPositions;
}

constexpr int64_t kMostHeads = 1 << 16;  // so that sizes fit 64 bits

/// An operator; its callbacks get it back. `api` is for the one that ONNX Runtime gives none.
struct Op : ort::CustomOp {
  const ort::Api* api;
  std::string name;
  std::vector<ort::Input> inputs;
  std::vector<ort::WeightPlace> weights;  // none, or of the products before and after
  size_t first_place;                     // of what is read: kQuery, or kPastKey behind a product
  size_t first_input;                     // where that stands among the inputs

  bool has_products() const { return !weights.empty(); }
};

struct Kernel {
  Calls calls;
  std::string where;  // operator and node, for messages
  size_t first_place, first_input;  // as in Op
  const KernelRow* row = nullptr;
  int64_t heads = 0, kv_heads = 0, window = -1;
  float scale = 0;
  bool rotates = false;
  std::vector<Weight> weights;
  std::vector<std::shared_ptr<char>> memory;  // of the weights, where it is not the session's
  ort::Norm norm;

  Kernel(const Calls& calls, std::string where, const Op& op)
      : calls(calls), where(std::move(where)), first_place(op.first_place), first_input(op.first_input) {}
  bool has_products() const { return !weights.empty(); }
};

Status* create(const Op& op, const Calls& calls, const ort::KernelInfo* info, void** result) {
  const std::string where = op.name + " node '" + node_name(calls, info) + "'";
  Kernel kernel(calls, where, op);
  if (Status* status = attribute(calls, info, where, "num_heads", &kernel.heads)) return status;
  if (Status* status = attribute(calls, info, where, "kv_num_heads", &kernel.kv_heads)) return status;
  int64_t rotates = 0;
  if (Status* status = attribute(calls, info, where, "do_rotary", &rotates)) return status;
  if (Status* status = attribute(calls, info, where, "local_window_size", &kernel.window)) return status;
  if (Status* status = attribute(calls, info, where, "scale", &kernel.scale)) return status;
  if (kernel.heads < 1 || kernel.heads > kMostHeads || kernel.kv_heads < 1 || kernel.heads % kernel.kv_heads != 0)
    return format_error(calls, where, std::to_string(kernel.heads) + " heads cannot share " +
                                          std::to_string(kernel.kv_heads) + " of keys");
  if (kernel.window == 0 || kernel.window < -1)
    return format_error(calls, where, "local_window_size is " + std::to_string(kernel.window) +
                                          ", neither -1 nor at least 1");
  if (kernel.window == -1) kernel.window = INT64_MAX;
  kernel.rotates = rotates != 0;
  if (Status* status = ort::choose_row(calls, &kernel.row)) return status;
  for (const ort::WeightPlace& place : op.weights) {
    kernel.weights.emplace_back();
    kernel.memory.emplace_back();
    if (Status* status =
            read_weight(calls, info, where, op.inputs, place, &kernel.weights.back(), &kernel.memory.back()))
      return status;
  }
  if (op.has_products())
    if (Status* status = kernel.norm.read(calls, info, where, op.inputs, kernel.weights.front().columns))
      return status;
  *result = new Kernel(std::move(kernel));
  return nullptr;
}

/// An input of a call.
struct Tensor {
  const void* data;  // null: left out
  std::vector<int64_t> dims;

  int64_t size() const {
    int64_t product = 1;
    for (int64_t dim : dims) product *= dim;
    return product;
  }
  bool has(std::initializer_list<int64_t> expected) const { return dims == std::vector<int64_t>(expected); }
};

std::string shape(const std::vector<int64_t>& dims) {
  std::string text = "(";
  for (size_t i = 0; i < dims.size(); ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims[i]);
  return text + ")";
}

Status* read_inputs(const Kernel& kernel, ort::KernelContext* context, Tensor (&tensors)[kPlaces]) {
  const Calls& calls = kernel.calls;
  size_t count = 0;
  if (Status* status = calls.input_count(context, &count)) return status;
  for (size_t place = kernel.first_place; place < kPlaces; ++place) {
    const ort::Value* value = nullptr;
    const size_t input = kernel.first_input + place - kernel.first_place;
    if (input < count)
      if (Status* status = calls.input(context, input, &value)) return status;
    tensors[place].data = nullptr;
    if (value == nullptr) {
      if (is_optional(place)) continue;
      return format_error(calls, kernel.where, std::string("input '") + kNames[place] + "' is missing");
    }
    int type = 0;
    if (Status* status = describe_tensor(calls, value, &tensors[place].dims, &type)) return status;
    void* data = nullptr;
    if (Status* status = calls.data(value, &data)) return status;
    static const char empty = 0;
    tensors[place].data = data != nullptr ? data : &empty;
  }
  return nullptr;
}

/// What a call with products reads and writes, beside what its attention does.
struct Products {
  const float* x;
  int64_t tokens;  // of all rows
  SkipNorm norm;
  float* packed;    // [tokens, heads + 2 kv_heads, head_dim]
  float* attended;  // [tokens, heads, head_dim]
  float* y;
};

/// Reads X, gives the sums their place, and makes attention's query of what the first product will write.
/// Memory for few tokens is `kept` for the next call, for many it is the call's `own`.
Status* open_products(const Kernel& kernel, ort::KernelContext* context, Scratch* kept, Scratch* own, Tensor* query,
                      Products* products) {
  const Calls& calls = kernel.calls;
  const ort::Value* input = nullptr;
  if (Status* status = calls.input(context, 0, &input)) return status;
  int type = 0;
  if (Status* status = describe_tensor(calls, input, &query->dims, &type)) return status;
  const Weight &inner = kernel.weights[0], &outer = kernel.weights[1];
  if (query->dims.size() != 3 || query->dims.back() != inner.columns)
    return format_error(calls, kernel.where, "X is " + shape(query->dims) + ", not (batch, sequence, K = " +
                                                 std::to_string(inner.columns) + ")");
  if (Status* status = kernel.norm.open(calls, context, kernel.where, query->dims, &products->norm)) return status;
  void* from = nullptr;
  if (Status* status = calls.data(input, &from)) return status;
  products->x = static_cast<const float*>(from);
  products->tokens = query->dims[0] * query->dims[1];
  Scratch& memory = products->tokens > kPrefillTokens ? *own : *kept;
  products->packed = static_cast<float*>(memory.reserve(products->tokens * (inner.outputs + outer.columns) * 4));
  if (products->packed == nullptr && products->tokens != 0)
    return calls.create_status(ort::kFail, (kernel.where + ": out of memory for query, key and value").c_str());
  products->attended = products->packed + products->tokens * inner.outputs;
  const int64_t dims[] = {query->dims[0], query->dims[1], outer.outputs};
  ort::Value* output = nullptr;
  void* to = nullptr;
  if (Status* status = calls.output(context, 0, dims, 3, &output)) return status;
  if (Status* status = calls.data(output, &to)) return status;
  products->y = static_cast<float*>(to);
  static const float empty = 0;
  query->data = products->packed != nullptr ? products->packed : &empty;
  query->dims.back() = inner.outputs;
  return nullptr;
}

/// Products and attention; all in one call of the threads if the tokens are few. False: memory ran out.
bool attend_between(const Kernel& kernel, const Products& products, const Attention& attention,
                    const Parallel& parallel) {
  const KernelRow& row = *kernel.row;
  const Weight &inner = kernel.weights[0], &outer = kernel.weights[1];
  if (products.tokens == 0) return true;
  if (products.tokens > kPrefillTokens)
    return multiply(row, inner, products.x, products.tokens, products.packed, parallel, products.norm) &&
           attend(row, attention, parallel) &&
           multiply(row, outer, products.attended, products.tokens, products.y, parallel);
  static thread_local ProductMemory memory[2];
  Product before(row, inner, products.x, products.tokens, products.packed, products.norm);
  AttentionStages between(row, attention);
  Product after(row, outer, products.attended, products.tokens, products.y, {});
  if (!before.reserve(&memory[0]) || !between.reserve() || !after.reserve(&memory[1])) return false;
  Stages stages;
  before.add_to(&stages);
  between.add_to(&stages, false);
  after.add_to(&stages);
  stages.run(parallel);
  return between.had_memory();
}

/// What the inputs say, except where results go. False: `error` says why not.
bool read(const Kernel& kernel, const Tensor (&in)[kPlaces], Attention* a, std::string* error) {
  const auto refuse = [&](Place place) {
    *error = std::string("'") + kNames[place] + "' of shape " + shape(in[place].dims) + " does not fit query " +
             shape(in[kQuery].dims) + " and past_key " + shape(in[kPastKey].dims);
    return false;
  };
  if (in[kPastKey].dims.size() != 4 || in[kQuery].dims.size() != 3) return refuse(kPastKey);
  const auto& query = in[kQuery].dims;
  const auto& past = in[kPastKey].dims;
  a->batch = query[0];
  a->tokens = query[1];
  a->heads = kernel.heads;
  a->kv_heads = kernel.kv_heads;
  a->past_capacity = past[2];
  a->head_dim = past[3];
  if (past[0] != a->batch || past[1] != a->kv_heads) return refuse(kPastKey);
  if (in[kPastValue].dims != past) return refuse(kPastValue);
  const int64_t own = a->heads * a->head_dim, shared = a->kv_heads * a->head_dim;
  a->query = static_cast<const float*>(in[kQuery].data);
  if (in[kKey].data == nullptr) {
    if (query[2] != own + 2 * shared || in[kValue].data != nullptr) return refuse(kQuery);
    a->key = a->query + own;
    a->value = a->key + shared;
    a->query_stride = a->key_stride = own + 2 * shared;
  } else {
    if (query[2] != own) return refuse(kQuery);
    if (!in[kKey].has({a->batch, a->tokens, shared})) return refuse(kKey);
    if (in[kValue].data == nullptr || in[kValue].dims != in[kKey].dims) return refuse(kValue);
    a->key = static_cast<const float*>(in[kKey].data);
    a->value = static_cast<const float*>(in[kValue].data);
    a->query_stride = own;
    a->key_stride = shared;
  }
  if (in[kLast].size() != a->batch) return refuse(kLast);
  if (in[kTotal].size() != 1) return refuse(kTotal);
  const int64_t total = *static_cast<const int32_t*>(in[kTotal].data);
  a->last = static_cast<const int32_t*>(in[kLast].data);
  a->first_prompt = a->tokens == total;
  a->capacity = total > a->past_capacity ? total : a->past_capacity;
  a->window = kernel.window;
  a->scale = kernel.scale != 0 ? kernel.scale : 1.0f / std::sqrt(static_cast<float>(a->head_dim));
  a->past_key = static_cast<const float*>(in[kPastKey].data);
  a->past_value = static_cast<const float*>(in[kPastValue].data);
  if (!kernel.rotates) return true;
  if (in[kCosines].data == nullptr || in[kCosines].dims.size() != 2) return refuse(kCosines);
  if (in[kSines].data == nullptr || in[kSines].dims != in[kCosines].dims) return refuse(kSines);
  a->cosines = static_cast<const float*>(in[kCosines].data);
  a->sines = static_cast<const float*>(in[kSines].data);
  a->rotary_rows = in[kCosines].dims[0];
  a->rotary_half = in[kCosines].dims[1];
  if (in[kPositions].data != nullptr) {
    if (!in[kPositions].has({a->batch, a->tokens})) return refuse(kPositions);
    a->positions = static_cast<const int64_t*>(in[kPositions].data);
  }
  return true;
}

Status* compute(const Kernel& kernel, ort::KernelContext* context) {
  const Calls& calls = kernel.calls;
  Tensor in[kPlaces] = {};
  if (Status* status = read_inputs(kernel, context, in)) return status;
  static thread_local Scratch kept;
  Scratch own;
  Products products{};
  if (kernel.has_products()) {
    if (Status* status = open_products(kernel, context, &kept, &own, &in[kQuery], &products)) return status;
  }
  Attention a{};
  std::string error;
  if (!read(kernel, in, &a, &error) || !check(a, &error)) return format_error(calls, kernel.where, error);
  const int64_t width = a.heads * a.head_dim;
  if (kernel.has_products() && kernel.weights[1].columns != width)
    return format_error(calls, kernel.where, "out_K is " + std::to_string(kernel.weights[1].columns) + ", all heads are " +
                                                 std::to_string(width) + " wide");
  const int64_t output_dims[] = {a.batch, a.tokens, width};
  const int64_t present_dims[] = {a.batch, a.kv_heads, a.capacity, a.head_dim};
  const size_t first_present = kernel.has_products() ? 2 : 1;
  float* results[3] = {};
  for (size_t i = kernel.has_products() ? 1 : 0; i < 3; ++i) {
    ort::Value* value = nullptr;
    void* data = nullptr;
    if (Status* status = i == 0 ? calls.output(context, 0, output_dims, 3, &value)
                                : calls.output(context, first_present + i - 1, present_dims, 4, &value))
      return status;
    if (Status* status = calls.data(value, &data)) return status;
    results[i] = static_cast<float*>(data);
  }
  a.output = kernel.has_products() ? products.attended : results[0];
  a.present_key = results[1];
  a.present_value = results[2];
  ort::SessionThreads threads{calls, context, nullptr};
  const Parallel parallel{ort::SessionThreads::run, &threads};
  const bool enough_memory =
      kernel.has_products() ? attend_between(kernel, products, a, parallel) : attend(*kernel.row, a, parallel);
  if (threads.status != nullptr) return threads.status;
  if (!enough_memory)
    return calls.create_status(ort::kFail, (kernel.where + ": out of memory for scores").c_str());
  return nullptr;
}

/// Of GroupQueryAttention: the output has the shape of query with all heads as its last dimension. Behind products it has
/// that of X with N of the last one.
Status* infer_shape(const Op& op, const Calls& calls, ort::ShapeInferContext* context) {
  const ort::OpAttribute* attribute = nullptr;
  if (Status* status = calls.attribute(context, op.has_products() ? "out_N" : "num_heads", &attribute)) return status;
  int64_t width = 0;
  if (Status* status = calls.read(attribute, &width)) return status;
  ort::TensorInfo *input = nullptr, *past = nullptr;
  if (Status* status = calls.input_info(context, 0, &input)) return status;
  const size_t past_key = op.first_input + kPastKey - op.first_place;
  if (Status* status = calls.input_info(context, past_key, &past)) return status;
  size_t rank = 0, past_rank = 0;
  if (Status* status = calls.rank(input, &rank)) return status;
  if (Status* status = calls.rank(past, &past_rank)) return status;
  if (rank != 3 || past_rank != 4) return nullptr;
  std::vector<int64_t> dims(3), past_dims(4);
  std::vector<const char*> names(3, "");
  if (Status* status = calls.dims(input, dims.data(), 3)) return status;
  if (Status* status = calls.dim_names(input, names.data(), 3)) return status;
  if (Status* status = calls.dims(past, past_dims.data(), 4)) return status;
  for (size_t i = 0; i < 2; ++i)
    if (ort::is_unknown(dims[i], names[i])) return nullptr;
  if (op.has_products()) {
    if (!ort::is_unknown(dims[2], names[2]))
      if (Status* status = set_output(calls, context, ort::Norm::kSum, dims, names)) return status;
  } else {
    if (past_dims[3] < 0 || width < 1 || width > kMostHeads) return nullptr;
    width *= past_dims[3];
  }
  dims[2] = width;
  names[2] = "";
  return set_output(calls, context, 0, dims, names);
}

/// `type`: of the products' weights; null: there are none.
Op make_op(const ort::Api* api, const ValueType* type) {
  using ort::CustomOp;
  Op op{};
  op.api = api;
  op.name = type == nullptr ? "GroupQueryAttention" : std::string("SkipNormSparseAttention") + ort::type_name(*type);
  if (type != nullptr) {
    op.inputs = {{"X", ort::kFloat}, {"skip", ort::kFloat}, {"gamma", ort::kFloat}};
    op.weights = {{"", *type, false, false}, {"out_", *type, false, false}};
    add_weight(&op.weights[0], &op.inputs);
  }
  op.first_place = type == nullptr ? kQuery : kPastKey;
  op.first_input = op.inputs.size();
  for (size_t place = op.first_place; place < kPlaces; ++place)
    op.inputs.push_back({kNames[place], kTypes[place], is_optional(place)});
  if (type != nullptr) add_weight(&op.weights[1], &op.inputs);
  say_what_is_common(&op);
  op.GetName = [](const CustomOp* self) { return static_cast<const Op*>(self)->name.c_str(); };
  op.GetInputTypeCount = [](const CustomOp* self) { return static_cast<const Op*>(self)->inputs.size(); };
  op.GetInputType = [](const CustomOp* self, size_t index) {
    return static_cast<const Op*>(self)->inputs[index].type;
  };
  op.GetInputCharacteristic = [](const CustomOp* self, size_t index) -> int {
    return static_cast<const Op*>(self)->inputs[index].optional ? ort::kOptional : ort::kRequired;
  };
  op.GetOutputTypeCount = [](const CustomOp* self) -> size_t {
    return static_cast<const Op*>(self)->has_products() ? 4 : 3;
  };
  op.CreateKernelV2 = [](const CustomOp* self, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
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

}  // namespace

std::vector<const ort::CustomOp*> ort::attention_ops(const Api* api) {
  static const std::vector<Op> ops = [api] {
    std::vector<Op> all{make_op(api, nullptr)};
    for (int type = 0; type < kValueTypes; ++type) {
      const ValueType value_type = static_cast<ValueType>(type);
      all.push_back(make_op(api, &value_type));
    }
    return all;
  }();
  std::vector<const CustomOp*> pointers;
  for (const Op& op : ops) pointers.push_back(&op);
  return pointers;
}

}  // namespace losa
