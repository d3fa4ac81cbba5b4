// A residual addition and its RMS norm, which the operators that read the normed sum do on the way.
//
// For one token of K columns, all in float32, each operation rounded by itself:
//
//   s[k]    = x[k] + skip[k]
//   p[r]    = sum of s[k] * s[k] over k = r, r + 16, r + 32, ...      r < 16, ascending
//   total   = p halved four times: p[r] += p[r + 8] for r < 8, then + 4, + 2, + 1
//   inverse = 1 / sqrt(total / K + epsilon)
//   y[k]    = (s[k] * inverse) * gamma[k]
//
// One function serves all kernel rows, so they agree bit for bit. Source of the norm: Zhang and Sennrich 2019,
// "Root Mean Square Layer Normalization", arXiv:1910.07467.
#pragma once
#include <cstdint>

namespace losa {

/// The addition and norm before a product, if there is one. Tokens of `skip` and `sums` lie as those of x do.
struct SkipNorm {
  const float* skip;   // [tokens, K]
  const float* gamma;  // [K]; null: no norm
  float epsilon;
  float* sums;         // [tokens, K]: s

  bool present() const { return gamma != nullptr; }
  /// The same for the tokens from `token` on.
  SkipNorm from(int64_t token, int64_t columns) const {
    if (!present()) return {};
    return {skip + token * columns, gamma, epsilon, sums + token * columns};
  }
};

/// y (tokens, columns) and the sums. No array may overlap another.
void skip_norm(const float* x, int64_t tokens, int64_t columns, const SkipNorm& norm, float* y);

}  // namespace losa
