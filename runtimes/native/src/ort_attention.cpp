// GroupQueryAttention of domain losa.sparse: inputs, attributes and outputs are those that ONNX Runtime's own operator of
// that name, in com.microsoft, needs for a decoder with a cache. ONNX Runtime's takes the rows of a batch one after the
// other where they have different lengths, and waits for its threads after each.
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "losa/attention.h"
#include "losa/ort_tools.h"

namespace losa {
namespace {

using ort::Calls;
using ort::Status;

/// Where inputs stand. Without key and value, query holds all three; without caches nothing is rotated.
enum Place : size_t {
  kQuery, kKey, kValue, kPastKey, kPastValue, kLast, kTotal, kCosines, kSines, kPositions, kInputs
};
constexpr const char* kNames[] = {"query", "key", "value", "past_key", "past_value", "seqlens_k",
                                  "total_sequence_length", "cos_cache", "sin_cache", "position_ids"};
constexpr int kTypes[] = {ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kFloat, ort::kInt32,
                          ort::kInt32, ort::kFloat, ort::kFloat, ort::kInt64};
bool is_optional(size_t place) {
  return place == kKey || place == kValue || place == kCosines || place == kSines || place == kPositions;
}

constexpr int64_t kMostHeads = 1 << 16;  // so that sizes fit 64 bits

struct Kernel {
  Calls calls;
  const KernelRow* row;
  int64_t heads, kv_heads, window;
  float scale;
  bool rotates;
  std::string where;  // operator and node, for messages
};

Status* create(const Calls& calls, const ort::KernelInfo* info, void** result) {
  const std::string where = "GroupQueryAttention node '" + node_name(calls, info) + "'";
  Kernel kernel{calls, nullptr, 0, 0, -1, 0, false, where};
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
  *result = new Kernel(kernel);
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

Status* read_inputs(const Kernel& kernel, ort::KernelContext* context, Tensor (&tensors)[kInputs]) {
  const Calls& calls = kernel.calls;
  size_t count = 0;
  if (Status* status = calls.input_count(context, &count)) return status;
  for (size_t place = 0; place < kInputs; ++place) {
    const ort::Value* value = nullptr;
    if (place < count)
      if (Status* status = calls.input(context, place, &value)) return status;
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

/// What the inputs say, except where results go. False: `error` says why not.
bool read(const Kernel& kernel, const Tensor (&in)[kInputs], Attention* a, std::string* error) {
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
  Tensor in[kInputs];
  if (Status* status = read_inputs(kernel, context, in)) return status;
  Attention a{};
  std::string error;
  if (!read(kernel, in, &a, &error) || !check(a, &error)) return format_error(calls, kernel.where, error);
  const int64_t output_dims[] = {a.batch, a.tokens, a.heads * a.head_dim};
  const int64_t present_dims[] = {a.batch, a.kv_heads, a.capacity, a.head_dim};
  ort::Value *output = nullptr, *key = nullptr, *value = nullptr;
  if (Status* status = calls.output(context, 0, output_dims, 3, &output)) return status;
  if (Status* status = calls.output(context, 1, present_dims, 4, &key)) return status;
  if (Status* status = calls.output(context, 2, present_dims, 4, &value)) return status;
  void* data[3];
  if (Status* status = calls.data(output, &data[0])) return status;
  if (Status* status = calls.data(key, &data[1])) return status;
  if (Status* status = calls.data(value, &data[2])) return status;
  a.output = static_cast<float*>(data[0]);
  a.present_key = static_cast<float*>(data[1]);
  a.present_value = static_cast<float*>(data[2]);
  ort::SessionThreads threads{calls, context, nullptr};
  const bool enough_memory = attend(*kernel.row, a, {ort::SessionThreads::run, &threads});
  if (threads.status != nullptr) return threads.status;
  if (!enough_memory)
    return calls.create_status(ort::kFail, (kernel.where + ": out of memory for scores").c_str());
  return nullptr;
}

struct Op : ort::CustomOp {
  const ort::Api* api;
};

/// The output has the shape of query with all heads as its last dimension.
Status* infer_shape(const Calls& calls, ort::ShapeInferContext* context) {
  const ort::OpAttribute* attribute = nullptr;
  if (Status* status = calls.attribute(context, "num_heads", &attribute)) return status;
  int64_t heads = 0;
  if (Status* status = calls.read(attribute, &heads)) return status;
  ort::TensorInfo *query = nullptr, *past = nullptr;
  if (Status* status = calls.input_info(context, kQuery, &query)) return status;
  if (Status* status = calls.input_info(context, kPastKey, &past)) return status;
  size_t query_rank = 0, past_rank = 0;
  if (Status* status = calls.rank(query, &query_rank)) return status;
  if (Status* status = calls.rank(past, &past_rank)) return status;
  if (query_rank != 3 || past_rank != 4) return nullptr;
  std::vector<int64_t> dims(3), past_dims(4);
  std::vector<const char*> names(3, "");
  if (Status* status = calls.dims(query, dims.data(), 3)) return status;
  if (Status* status = calls.dim_names(query, names.data(), 3)) return status;
  if (Status* status = calls.dims(past, past_dims.data(), 4)) return status;
  for (size_t i = 0; i < 2; ++i)
    if (ort::is_unknown(dims[i], names[i])) return nullptr;
  if (past_dims[3] < 0 || heads < 1 || heads > kMostHeads) return nullptr;
  dims[2] = heads * past_dims[3];
  names[2] = "";
  return set_output(calls, context, 0, dims, names);
}

Op make_op(const ort::Api* api) {
  using ort::CustomOp;
  Op op{};
  op.api = api;
  say_what_is_common(&op);
  op.GetName = [](const CustomOp*) { return "GroupQueryAttention"; };
  op.GetInputTypeCount = [](const CustomOp*) -> size_t { return kInputs; };
  op.GetInputType = [](const CustomOp*, size_t index) { return kTypes[index]; };
  op.GetOutputTypeCount = [](const CustomOp*) -> size_t { return 3; };
  op.GetInputCharacteristic = [](const CustomOp*, size_t index) -> int {
    return is_optional(index) ? ort::kOptional : ort::kRequired;
  };
  op.CreateKernelV2 = [](const CustomOp*, const ort::Api* api, const ort::KernelInfo* info, void** kernel) {
    const Calls calls(api);
    return ort::guarded(calls, [&] { return create(calls, info, kernel); });
  };
  op.KernelComputeV2 = [](void* kernel_pointer, ort::KernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(kernel_pointer);
    return ort::guarded(kernel.calls, [&] { return compute(kernel, context); });
  };
  op.KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.InferOutputShapeFn = [](const CustomOp* self, ort::ShapeInferContext* context) {
    const Calls calls(static_cast<const Op*>(self)->api);
    return ort::guarded(calls, [&] { return infer_shape(calls, context); });
  };
  return op;
}

}  // namespace

const ort::CustomOp* ort::attention_op(const Api* api) {
  static const Op op = make_op(api);
  return &op;
}

}  // namespace losa
