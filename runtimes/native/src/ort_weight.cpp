#include "losa/ort_weight.h"

#include <cmath>
#include <cstring>

#include "losa/large_pages.h"

namespace losa::ort {
namespace {

/// A tensor of a weight.
struct Tensor {
  const char* name;
  int type;
  size_t element_bytes;
  Bytes WeightParts::*part;
};

std::vector<Tensor> tensors_of(ValueType type, bool dense) {
  static constexpr int kTypes[] = {kFloat, kBfloat16, kInt8, kUint8};
  std::vector<Tensor> tensors;
  if (!dense) tensors.push_back({"mask", kUint8, 1, &WeightParts::masks});
  tensors.push_back({"values", kTypes[static_cast<int>(type)], static_cast<size_t>(element_bytes(type)),
                     &WeightParts::values});
  if (!dense) tensors.push_back({"block_offsets", kInt64, 8, &WeightParts::block_offsets});
  if (is_integer(type)) tensors.push_back({"scales", kFloat16, 2, &WeightParts::scales});
  if (type == ValueType::kInt4) tensors.push_back({"codebook", kInt8, 1, &WeightParts::codebook});
  return tensors;
}

/// A constant input's bytes; its shape must have the right product, not a certain rank.
Status* constant(const Calls& calls, const KernelInfo* info, const std::string& where, const std::string& name,
                 const std::string& what, size_t index, int wanted, size_t element_bytes, Bytes* bytes) {
  int is_constant = 0;
  const Value* value = nullptr;
  if (Status* status = calls.constant_input(info, index, &is_constant, &value)) return status;
  if (!is_constant || value == nullptr)
    return format_error(calls, where,
                        "input '" + name + "' is not an initializer; " + what + " must be constant");
  std::vector<int64_t> dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, value, &dims, &type)) return status;
  if (type != wanted)
    return format_error(calls, where, "input '" + name + "' has element type " + std::to_string(type) + ", not " +
                                          std::to_string(wanted));
  bytes->size = element_bytes;
  for (int64_t dim : dims) bytes->size *= static_cast<size_t>(dim);
  void* pointer = nullptr;
  if (Status* status = calls.data(value, &pointer)) return status;
  bytes->data = pointer;
  return nullptr;
}

/// Moves what `parts` refers to into large pages, which live as long as the result; null if it stays where it is.
std::shared_ptr<char> in_large_pages(WeightParts* parts) {
  constexpr size_t kAlignment = 64;
  Bytes* const all[] = {&parts->masks, &parts->values, &parts->block_offsets, &parts->scales, &parts->codebook};
  size_t size = 0;
  for (const Bytes* bytes : all) size += (bytes->size + kAlignment - 1) / kAlignment * kAlignment;
  std::shared_ptr<char> memory = large_memory(size);
  if (memory == nullptr) return nullptr;
  char* to = memory.get();
  for (Bytes* bytes : all) {
    if (bytes->size == 0) continue;
    std::memcpy(to, bytes->data, bytes->size);
    leave_to_file(bytes->data, bytes->size);
    bytes->data = to;
    to += (bytes->size + kAlignment - 1) / kAlignment * kAlignment;
  }
  return memory;
}

}  // namespace

void add_weight(WeightPlace* place, std::vector<Input>* inputs) {
  place->first = inputs->size();
  for (const Tensor& tensor : tensors_of(place->type, place->dense))
    inputs->push_back({place->prefix + tensor.name, tensor.type});
}

Status* read_weight(const Calls& calls, const KernelInfo* info, const std::string& where,
                    const std::vector<Input>& inputs, const WeightPlace& place, Weight* weight,
                    std::shared_ptr<char>* memory) {
  WeightParts parts{};
  parts.type = static_cast<int32_t>(place.type);
  parts.gated = place.gated;
  parts.dense = place.dense;
  parts.layout = kLayoutN16;
  parts.group = kMaxGroup;
  parts.activation_bits = 16;
  const auto name = [&](const char* attribute) { return place.prefix + attribute; };
  if (Status* status = attribute(calls, info, where, name("N").c_str(), &parts.rows)) return status;
  if (Status* status = attribute(calls, info, where, name("K").c_str(), &parts.columns)) return status;
  if (Status* status = optional_attribute(calls, info, where, name("layout").c_str(), &parts.layout)) return status;
  if (is_integer(place.type)) {
    if (Status* status = optional_attribute(calls, info, where, name("group").c_str(), &parts.group)) return status;
    if (Status* status =
            optional_attribute(calls, info, where, name("activation_bits").c_str(), &parts.activation_bits))
      return status;
  }
  size_t index = place.first;
  for (const Tensor& tensor : tensors_of(place.type, place.dense)) {
    if (Status* status = constant(calls, info, where, inputs[index].name, "the weight", index, tensor.type,
                                  tensor.element_bytes, &(parts.*tensor.part)))
      return status;
    ++index;
  }
  if (!place.by_row) *memory = in_large_pages(&parts);
  std::string error;
  if (validate(parts, weight, &error)) return nullptr;
  // Of several weights, which one: "down_" becomes "down".
  const std::string which = place.prefix.substr(0, place.prefix.find('_'));
  return format_error(calls, where, which.empty() ? error : "weight '" + which + "': " + error);
}

Status* Norm::read(const Calls& calls, const KernelInfo* info, const std::string& where,
                   const std::vector<Input>& inputs, int64_t columns) {
  if (Status* status = attribute(calls, info, where, "epsilon", &epsilon)) return status;
  if (!(epsilon >= 0) || std::isinf(epsilon))
    return format_error(calls, where, "epsilon is " + std::to_string(epsilon) + ", not a finite number from 0 on");
  Bytes bytes{};
  if (Status* status = constant(calls, info, where, inputs[kGamma].name, "it", kGamma, kFloat, 4, &bytes))
    return status;
  const size_t wanted = static_cast<size_t>(columns) * sizeof(float);
  if (bytes.data == nullptr || bytes.size != wanted)
    return format_error(calls, where, "gamma has " + std::to_string(bytes.size) + " bytes, K = " +
                                          std::to_string(columns) + " needs " + std::to_string(wanted));
  gamma.resize(static_cast<size_t>(columns));  // a copy, for it may lie at any byte of a file
  std::memcpy(gamma.data(), bytes.data, bytes.size);
  return nullptr;
}

Status* Norm::open(const Calls& calls, KernelContext* context, const std::string& where,
                   const std::vector<int64_t>& dims, SkipNorm* norm) const {
  const Value* skip = nullptr;
  if (Status* status = calls.input(context, kSkip, &skip)) return status;
  std::vector<int64_t> skip_dims;
  int type = 0;
  if (Status* status = describe_tensor(calls, skip, &skip_dims, &type)) return status;
  if (skip_dims != dims) return format_error(calls, where, "skip has not the shape of X");
  Value* sums = nullptr;
  if (Status* status = calls.output(context, kSum, dims.data(), dims.size(), &sums)) return status;
  void *from = nullptr, *to = nullptr;
  if (Status* status = calls.data(skip, &from)) return status;
  if (Status* status = calls.data(sums, &to)) return status;
  *norm = {static_cast<const float*>(from), gamma.data(), epsilon, static_cast<float*>(to)};
  return nullptr;
}

const char* type_name(ValueType type) {
  static constexpr const char* kNames[] = {"Fp32", "Bf16", "Int8", "Int4"};
  return kNames[static_cast<int>(type)];
}

}  // namespace losa::ort
