// The compressed weight of `losa.sparse::SparseMatMulFp32`, layout 1 ("N16"), as the kernels see it.
#pragma once
#include <cstddef>
#include <cstdint>

namespace losa {

constexpr int64_t kBlockRows = 16;      // output rows that share one mask word per column
constexpr int64_t kValuePadding = 16;   // floats behind the last value that vector loads may touch
constexpr int64_t kLayoutN16 = 1;

/// W (rows, columns), borrowed: output rows in blocks of 16; the last block may be cut short by `rows`.
///
/// For block b and column k, bit r of `masks[(b * columns + k) * 2 + r / 8] >> (r % 8)` says whether
/// W[16 b + r, k] is kept. Kept values follow each other in the order block, column, row.
/// No pointer need be aligned.
struct SparseFp32 {
  int64_t rows;                  // N, output features
  int64_t columns;               // K, input features
  const uint8_t* masks;          // [blocks, columns, 2]
  const float* values;           // [kept + kValuePadding]
  const int64_t* block_offsets;  // [blocks + 1], index into values; the last is `kept`

  int64_t blocks() const { return (rows + kBlockRows - 1) / kBlockRows; }
  double density() const {
    return static_cast<double>(block_offsets[blocks()]) / (static_cast<double>(rows) * columns);
  }
};

/// Row blocks [first, last).
struct BlockRange {
  int64_t first, last;
};

}  // namespace losa
