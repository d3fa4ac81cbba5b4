// The definition: one multiply-add per kept weight, in the order the values are stored.
#include <cmath>
#include <cstring>

#include "losa/kernel_table.h"

namespace losa {
namespace {

bool always() { return true; }

/// Values need not be aligned.
float load(const float* from) {
  float value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

void decode(const SparseFp32& w, BlockRange blocks, const float* x, int64_t tokens, float* y) {
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t first_row = block * kBlockRows;
    const int64_t rows = w.rows - first_row < kBlockRows ? w.rows - first_row : kBlockRows;
    for (int64_t token = 0; token < tokens; ++token) {
      const uint8_t* mask = w.block_masks(block);
      const float* value = w.block_values(block);
      float sums[kBlockRows] = {};
      for (int64_t k = 0; k < w.columns; ++k, mask += 2) {
        const float activation = x[token * w.columns + k];
        const unsigned kept = mask[0] | static_cast<unsigned>(mask[1]) << 8;
        for (int r = 0; r < kBlockRows; ++r) {
          if (kept >> r & 1) sums[r] += load(value++) * activation;
        }
      }
      for (int64_t r = 0; r < rows; ++r) y[token * w.rows + first_row + r] = sums[r];
    }
  }
}

void gate(const float* z, int64_t tokens, int64_t outputs, float* y, int64_t stride) {
  const int64_t pairs = (outputs + kBlockRows - 1) / kBlockRows;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t n = 0; n < outputs; ++n) {
      const float* pair = z + (token * pairs + n / kBlockRows) * 2 * kBlockRows;
      const float gate = pair[n % kBlockRows], up = pair[kBlockRows + n % kBlockRows];
      y[token * stride + n] = gate / (1.0f + std::exp(-gate)) * up;
    }
  }
}

}  // namespace

const KernelRow kScalarRow = {"scalar", always, decode, nullptr, nullptr, 0, gate};

}  // namespace losa
