#include "losa/validate.h"

#include <cstring>

#include "losa/numbers.h"

namespace losa {
namespace {

// No weight is wider; the bound keeps every product below within int64.
constexpr int64_t kMaxSide = int64_t{1} << 30;

bool fail(std::string* error, const std::string& message) {
  *error = message;
  return false;
}

std::string number(int64_t value) { return std::to_string(value); }

/// Values that a block's masks keep; of int4, the bytes that they take, step by step.
LOSA_INLINE int64_t count_kept(const uint8_t* mask, int64_t bytes, bool pairs) {
  int64_t kept[4] = {}, i = 0;
  const auto word = [&](int part) {
    const int64_t set = __builtin_popcountll(load_at<uint64_t>(mask + i, part));
    kept[part] += pairs ? (set + 1) / 2 : set;
  };
  for (; i + 32 <= bytes; i += 32) {
    word(0);
    word(1);
    word(2);
    word(3);
  }
  for (; i + 8 <= bytes; i += 8) word(0);
  for (; i < bytes; ++i) kept[0] += __builtin_popcount(mask[i]);
  return kept[0] + kept[1] + kept[2] + kept[3];
}

using CountKept = int64_t (*)(const uint8_t* mask, int64_t bytes, bool pairs);

int64_t count_kept_anywhere(const uint8_t* mask, int64_t bytes, bool pairs) {
  return pairs ? count_kept(mask, bytes, true) : count_kept(mask, bytes, false);
}

#ifdef LOSA_X86
// Counting all masks of a model is to take no time that a user could notice; without its instruction popcount
// is a call that takes ten times as long.
__attribute__((target("popcnt"))) int64_t count_kept_x86(const uint8_t* mask, int64_t bytes, bool pairs) {
  return pairs ? count_kept(mask, bytes, true) : count_kept(mask, bytes, false);
}
CountKept count_kept_here() { return __builtin_cpu_supports("popcnt") ? count_kept_x86 : count_kept_anywhere; }
#else
CountKept count_kept_here() { return count_kept_anywhere; }
#endif

/// Checks one weight part by part. Each check may rely on those before it.
class Validator {
 public:
  Validator(const WeightParts& parts, Weight* weight, std::string* error) : parts_(parts), w_(*weight), error_(error) {}

  bool run() {
    return header() && sizes() && (w_.dense() ? dense_values() && dense_edges() : sparse_values() && edges()) && scales();
  }

 private:
  const WeightParts& parts_;
  Weight& w_;
  std::string* error_;
  int64_t matrices_ = 1, blocks_of_each_ = 0;

  bool header() {
    if (parts_.type < 0 || parts_.type >= kValueTypes)
      return fail(error_, "value type " + number(parts_.type) + " is not known to this library");
    if (parts_.layout != kLayoutN16)
      return fail(error_,
                  "layout is " + number(parts_.layout) + ", this library reads layout 1; export the model again");
    if (parts_.rows <= 0 || parts_.columns <= 0 || parts_.rows > kMaxSide || parts_.columns > kMaxSide)
      return fail(error_, "N = " + number(parts_.rows) + " and K = " + number(parts_.columns) +
                              " are not the sides of a weight");
    matrices_ = parts_.gated ? 2 : 1;  // their blocks alternate
    blocks_of_each_ = (parts_.rows + kBlockRows - 1) / kBlockRows;
    w_ = {};
    w_.type = static_cast<ValueType>(parts_.type);
    w_.outputs = parts_.rows;
    w_.rows = parts_.gated ? matrices_ * blocks_of_each_ * kBlockRows : parts_.rows;
    w_.columns = parts_.columns;
    w_.masks = parts_.dense ? nullptr : static_cast<const uint8_t*>(parts_.masks.data);
    w_.values = static_cast<const uint8_t*>(parts_.values.data);
    w_.block_offsets = parts_.dense ? nullptr : static_cast<const int64_t*>(parts_.block_offsets.data);
    w_.group = kMaxGroup;
    if (!is_integer(w_.type)) return true;
    w_.scales = static_cast<const uint16_t*>(parts_.scales.data);
    w_.codebook = w_.type == ValueType::kInt4 ? static_cast<const int8_t*>(parts_.codebook.data) : nullptr;
    w_.group = parts_.group;
    w_.activation_bits = parts_.activation_bits;
    if (w_.group != 32 && w_.group != 64 && w_.group != kMaxGroup)
      return fail(error_, "group is " + number(w_.group) + ", this library knows 32, 64 and 128");
    if (w_.activation_bits != 8 && w_.activation_bits != 16)
      return fail(error_, "activation_bits is " + number(w_.activation_bits) + ", this library knows 8 and 16");
    return true;
  }

  bool size(const char* name, const Bytes& part, int64_t expected) {
    if (part.size != static_cast<uint64_t>(expected))
      return fail(error_, std::string(name) + " has " + number(static_cast<int64_t>(part.size)) + " bytes, N = " +
                              number(parts_.rows) + " and K = " + number(parts_.columns) + " need " +
                              number(expected));
    if (part.data == nullptr && expected != 0) return fail(error_, std::string(name) + " has no data");
    return true;
  }

  bool sizes() {
    const int64_t blocks = w_.blocks();
    if (parts_.dense && (parts_.gated || w_.type == ValueType::kFp32))
      return fail(error_, "a dense weight is neither gated nor of fp32");
    if (!parts_.dense) {
      if (!size("mask", parts_.masks, blocks * w_.steps() * w_.mask_bytes_of_step())) return false;
      if (!size("block_offsets", parts_.block_offsets, (blocks + 1) * 8)) return false;
    }
    if (parts_.values.data == nullptr) return fail(error_, "values has no data");
    if (!is_integer(w_.type)) return true;
    if (!size("scales", parts_.scales, blocks * w_.groups() * kBlockRows * 2)) return false;
    return w_.type != ValueType::kInt4 || size("codebook", parts_.codebook, 16);
  }

  bool enough_values(int64_t elements) {
    const int64_t needed = elements * element_bytes(w_.type) + kValuePadding;
    if (parts_.values.size >= static_cast<uint64_t>(needed)) return true;
    return fail(error_, "values has " + number(static_cast<int64_t>(parts_.values.size)) + " bytes, " +
                            number(elements) + " elements and " + number(kValuePadding) + " bytes of padding need " +
                            number(needed));
  }

  bool dense_values() { return enough_values(w_.blocks() * w_.steps() * w_.dense_step_elements()); }

  /// Every position of a dense weight beyond the last row or column is zero: of floats, a kernel may multiply
  /// it by the zeros behind the activations, of which infinity or NaN would make a NaN.
  bool dense_edges() {
    const int64_t width = step_columns(w_.type), per_step = kBlockRows * width;
    const int64_t columns_in_last = w_.columns - (w_.steps() - 1) * width;
    for (int64_t block = 0; block < w_.blocks(); ++block) {
      const int64_t left = w_.rows - block * kBlockRows, rows = left < kBlockRows ? left : kBlockRows;
      if (rows == kBlockRows && columns_in_last == width) continue;
      const uint8_t* values = w_.block_values(block);
      for (int64_t step = rows < kBlockRows ? 0 : w_.steps() - 1; step < w_.steps(); ++step) {
        const int64_t columns = step < w_.steps() - 1 ? width : columns_in_last;
        for (int64_t position = 0; position < per_step; ++position) {
          if ((position / width >= rows || position % width >= columns) && !zero(values, step * per_step + position))
            return fail(error_, "values has a number beyond N = " + number(w_.rows) + " and K = " + number(w_.columns) +
                                    " at row " + number(block * kBlockRows + position / width) + ", column " +
                                    number(step * width + position % width));
        }
      }
    }
    return true;
  }

  /// Whether value `index` is stored as zero, either zero of floats.
  bool zero(const uint8_t* values, int64_t index) const {
    switch (w_.type) {
      case ValueType::kFp32: return load_at<float>(values, index) == 0;
      case ValueType::kBf16: return from_bf16(load_at<uint16_t>(values, index)) == 0;
      case ValueType::kInt8: return values[index] == 0;
      default: return (values[index / 2] >> (index % 2 * 4) & 15) == 0;
    }
  }

  bool sparse_values() {
    if (w_.offset(0) != 0) return fail(error_, "block_offsets starts at " + number(w_.offset(0)) + ", not at 0");
    const CountKept count = count_kept_here();
    const int64_t mask_bytes = w_.steps() * w_.mask_bytes_of_step();
    int64_t expected = 0;
    for (int64_t block = 0; block < w_.blocks(); ++block) {
      expected += count(w_.block_masks(block), mask_bytes, w_.type == ValueType::kInt4);
      const int64_t stored = w_.offset(block + 1);
      if (stored != expected)
        return fail(error_, "block_offsets[" + number(block + 1) + "] is " + number(stored) +
                                ", the mask of the blocks before it keeps " + number(expected) + " values");
    }
    return enough_values(expected);
  }

  /// No mask keeps a position beyond the last row or column.
  bool edges() {
    const int64_t width = step_columns(w_.type), step_bytes = w_.mask_bytes_of_step();
    const int64_t rows_in_last = parts_.rows - (blocks_of_each_ - 1) * kBlockRows;
    const int64_t columns_in_last = parts_.columns - (w_.steps() - 1) * width;
    uint8_t row_edge[8] = {}, column_edge[8] = {};  // positions of a step that are beyond
    for (int64_t position = 0; position < kBlockRows * width; ++position) {
      const uint8_t bit = static_cast<uint8_t>(1u << (position % 8));
      if (position / width >= rows_in_last) row_edge[position / 8] |= bit;
      if (position % width >= columns_in_last) column_edge[position / 8] |= bit;
    }
    for (int64_t block = 0; block < w_.blocks(); ++block) {
      const bool last_block = block >= w_.blocks() - matrices_;
      const uint8_t* masks = w_.block_masks(block);
      for (int64_t step = last_block ? 0 : w_.steps() - 1; step < w_.steps(); ++step) {
        for (int64_t i = 0; i < step_bytes; ++i) {
          const uint8_t kept = masks[step * step_bytes + i];
          if (last_block && (kept & row_edge[i]) != 0)
            return fail(error_, "mask keeps a weight of column " +
                                    number(step * width + __builtin_ctz(kept & row_edge[i]) % width) +
                                    " in a row beyond N = " + number(parts_.rows));
          if (step == w_.steps() - 1 && (kept & column_edge[i]) != 0)
            return fail(error_, "mask keeps a weight beyond the last of K = " + number(parts_.columns) + " columns");
        }
      }
    }
    return true;
  }

  bool scales() {
    if (!is_integer(w_.type)) return true;
    const int64_t count = w_.blocks() * w_.groups() * kBlockRows;
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = load_at<uint16_t>(w_.scales, i);
      if (bits >= 0x7c00)  // negative, infinite or not a number
        return fail(error_, "scales[" + number(i) + "] is not a finite number of 0 or more");
    }
    return true;
  }
};

}  // namespace

bool validate(const WeightParts& parts, Weight* weight, std::string* error) {
  return Validator(parts, weight, error).run();
}

}  // namespace losa
