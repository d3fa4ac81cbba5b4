// A weight as the kernels see it, layout 1 ("N16"): sparse or dense, with values of one of four types.
#pragma once
#include <cstddef>
#include <cstdint>

/// Files compiled for different instruction sets must not share a function, or the linker keeps either of
/// them; so whatever a kernel file uses from a header is inlined without exception.
#define LOSA_INLINE inline __attribute__((always_inline))

namespace losa {

constexpr int64_t kBlockRows = 16;      // output rows that share a step
constexpr int64_t kValuePadding = 64;   // bytes behind the last value that vector loads may touch
constexpr int64_t kLayoutN16 = 1;
constexpr int64_t kMaxGroup = 128;      // columns that share a scale: 32, 64 or 128

enum class ValueType : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };
constexpr int kValueTypes = 4;

/// Columns of a step: as many as one multiply-add of that type sums up (a pair for bf16, four for bytes).
LOSA_INLINE constexpr int64_t step_columns(ValueType type) {
  return type == ValueType::kFp32 ? 1 : type == ValueType::kBf16 ? 2 : 4;
}
LOSA_INLINE constexpr bool is_integer(ValueType type) {
  return type == ValueType::kInt8 || type == ValueType::kInt4;
}
/// Bytes of one element of `values`; of int4 an element is a byte with two codes.
LOSA_INLINE constexpr int64_t element_bytes(ValueType type) {
  return type == ValueType::kFp32 ? 4 : type == ValueType::kBf16 ? 2 : 1;
}

/// Row blocks [first, last).
struct BlockRange {
  int64_t first, last;
};

/// W (rows, columns), borrowed: output rows in blocks of 16, columns in steps; the last of each may be cut.
///
/// A step of block b has 16 rows times step_columns; position r * step_columns + k % step_columns of it is
/// W[16 b + r, k]. Its mask has one bit a position, in that order from the lowest bit of the first byte.
/// Kept values follow each other in the order block, step, position. int4 codes lie two to a byte, the low
/// half first, and each step of them starts a byte. Positions beyond `rows` or `columns` are not kept.
/// A dense weight has no masks and no block_offsets: all positions are there, zero beyond the edges.
/// No pointer need be aligned, not even to its own type: the parts may lie anywhere in a mapped file.
///
/// int8 stands for value * scale, int4 for codebook[code] * scale, with one scale for each row and group
/// of columns.
///
/// A gated weight holds two matrices of `outputs` rows whose blocks alternate: block 2 i has rows 16 i to
/// 16 i + 15 of the gate, block 2 i + 1 those of the other. `rows` then counts all rows of all blocks.
struct Weight {
  ValueType type;
  int64_t rows;                  // of the matrix as it is stored
  int64_t columns;               // K, input features
  int64_t outputs;               // N, features of the result: `rows`, or fewer if gated
  const uint8_t* masks;          // [blocks, steps, 2 * step_columns]; null: dense
  const uint8_t* values;         // and kValuePadding bytes behind them
  const int64_t* block_offsets;  // [blocks + 1], in elements of `values`; null: dense
  const uint16_t* scales;        // [blocks, groups, 16] as IEEE binary16; int8 and int4 only
  const int8_t* codebook;        // [16]; int4 only
  int64_t group;                 // columns that share a scale
  int64_t activation_bits;       // 16 or 8: how activations are rounded for int8 and int4

  LOSA_INLINE bool gated() const { return outputs != rows; }
  LOSA_INLINE bool dense() const { return masks == nullptr; }
  LOSA_INLINE int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  LOSA_INLINE int64_t steps() const { return (columns + step_columns(type) - 1) / step_columns(type); }
  LOSA_INLINE int64_t groups() const { return (columns + group - 1) / group; }
  LOSA_INLINE int64_t mask_bytes_of_step() const { return 2 * step_columns(type); }
  /// Elements of `values` that a step of a dense weight has.
  LOSA_INLINE int64_t dense_step_elements() const {
    return kBlockRows * step_columns(type) / (type == ValueType::kInt4 ? 2 : 1);
  }
  LOSA_INLINE int64_t offset(int64_t block) const {
    if (dense()) return block * steps() * dense_step_elements();
    int64_t value;
    __builtin_memcpy(&value, reinterpret_cast<const char*>(block_offsets) + block * 8, sizeof value);
    return value;
  }
  LOSA_INLINE const uint8_t* block_values(int64_t block) const {
    return values + offset(block) * element_bytes(type);
  }
  LOSA_INLINE const uint8_t* block_masks(int64_t block) const {
    return dense() ? nullptr : masks + block * steps() * mask_bytes_of_step();
  }
  LOSA_INLINE const uint16_t* block_scales(int64_t block) const {
    return reinterpret_cast<const uint16_t*>(reinterpret_cast<const char*>(scales) +
                                             block * groups() * kBlockRows * 2);
  }
  /// Some blocks, all of them whole, as a weight of their own; values keep their index.
  LOSA_INLINE Weight whole_blocks(BlockRange range) const {
    Weight part = *this;
    part.rows = part.outputs = (range.last - range.first) * kBlockRows;
    part.masks = block_masks(range.first);
    if (dense())
      part.values = block_values(range.first);
    else
      part.block_offsets = reinterpret_cast<const int64_t*>(
          reinterpret_cast<const char*>(block_offsets) + range.first * 8);
    if (scales != nullptr) part.scales = block_scales(range.first);
    return part;
  }
  /// Kept share of all positions; of int4 it counts the odd half bytes at the ends of steps.
  LOSA_INLINE double density() const {
    if (dense()) return 1.0;
    const int64_t kept = (offset(blocks()) - offset(0)) * (type == ValueType::kInt4 ? 2 : 1);
    return static_cast<double>(kept) / (static_cast<double>(rows) * static_cast<double>(columns));
  }
};

}  // namespace losa
