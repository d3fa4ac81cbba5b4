// The compressed weight of SparseMatMulFp32 and SparseSwiGLUFp32, layout 1 ("N16"), as the kernels see it.
#pragma once
#include <cstddef>
#include <cstdint>

/// Files compiled for different instruction sets must not share a function, or the linker keeps either of
/// them; so whatever a kernel file uses from a header is inlined without exception.
#define LOSA_INLINE inline __attribute__((always_inline))

namespace losa {

constexpr int64_t kBlockRows = 16;      // output rows that share one mask word per column
constexpr int64_t kValuePadding = 16;   // floats behind the last value that vector loads may touch
constexpr int64_t kLayoutN16 = 1;

/// Row blocks [first, last).
struct BlockRange {
  int64_t first, last;
};

/// W (rows, columns), borrowed: output rows in blocks of 16; the last block may be cut short by `rows`.
///
/// For block b and column k, bit r of `masks[(b * columns + k) * 2 + r / 8] >> (r % 8)` says whether
/// W[16 b + r, k] is kept. Kept values follow each other in the order block, column, row.
/// No pointer need be aligned, not even to its own type: the parts may lie anywhere in a mapped file.
///
/// A gated weight holds two matrices of `outputs` rows whose blocks alternate: block 2 i has rows 16 i to
/// 16 i + 15 of the gate, block 2 i + 1 those of the other. `rows` then counts all rows of all blocks.
struct SparseFp32 {
  int64_t rows;                  // of the matrix as it is stored
  int64_t columns;               // K, input features
  const uint8_t* masks;          // [blocks, columns, 2]
  const float* values;           // [kept + kValuePadding]
  const int64_t* block_offsets;  // [blocks + 1], index into values; the last is `kept`
  int64_t outputs;               // N, features of the result: `rows`, or fewer if gated

  LOSA_INLINE bool gated() const { return outputs != rows; }
  LOSA_INLINE int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  LOSA_INLINE int64_t offset(int64_t block) const {
    int64_t value;
    __builtin_memcpy(&value, reinterpret_cast<const char*>(block_offsets) + block * 8, sizeof value);
    return value;
  }
  LOSA_INLINE const float* block_values(int64_t block) const {
    return reinterpret_cast<const float*>(reinterpret_cast<const char*>(values) + offset(block) * 4);
  }
  LOSA_INLINE const uint8_t* block_masks(int64_t block) const { return masks + block * columns * 2; }
  /// Some blocks, all of them whole, as a weight of their own; values keep their index.
  LOSA_INLINE SparseFp32 whole_blocks(BlockRange range) const {
    const int64_t count = (range.last - range.first) * kBlockRows;
    const char* offsets = reinterpret_cast<const char*>(block_offsets) + range.first * 8;
    const int64_t* part_offsets = reinterpret_cast<const int64_t*>(offsets);
    return {count, columns, block_masks(range.first), values, part_offsets, count};
  }
  LOSA_INLINE double density() const {
    const int64_t kept = offset(blocks()) - offset(0);
    return static_cast<double>(kept) / (static_cast<double>(rows) * static_cast<double>(columns));
  }
};

}  // namespace losa
