// Compiled for any processor of its kind and without fused multiply-adds (CMakeLists.txt): the sums are defined to
// the bit. It is a thousandth of the work of the products behind it.
#include "losa/norm.h"

#include <cmath>

namespace losa {
namespace {

constexpr int64_t kLanes = 16;

/// to = x + skip; returns the sum of squares.
float add(const float* __restrict x, const float* __restrict skip, int64_t columns, float* __restrict to) {
  float partial[kLanes] = {};
  int64_t first = 0;
  for (; first + kLanes <= columns; first += kLanes) {
    for (int64_t r = 0; r < kLanes; ++r) {
      const float s = x[first + r] + skip[first + r];
      to[first + r] = s;
      partial[r] += s * s;
    }
  }
  for (int64_t r = 0; first + r < columns; ++r) {
    const float s = x[first + r] + skip[first + r];
    to[first + r] = s;
    partial[r] += s * s;
  }
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t r = 0; r < width; ++r) partial[r] += partial[r + width];
  return partial[0];
}

}  // namespace

void skip_norm(const float* x, int64_t tokens, int64_t columns, const SkipNorm& norm, float* y) {
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t first = token * columns;
    const float total = add(x + first, norm.skip + first, columns, norm.sums + first);
    const float inverse = 1.0f / std::sqrt(total / static_cast<float>(columns) + norm.epsilon);
    for (int64_t k = 0; k < columns; ++k) y[first + k] = norm.sums[first + k] * inverse * norm.gamma[k];
  }
}

}  // namespace losa
