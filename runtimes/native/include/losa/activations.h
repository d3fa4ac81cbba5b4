// Activations rounded to integers, for the kernels of int8 and int4 weights.
//
// Every kernel row rounds and sums alike, so that all of them agree bit for bit: for a token and a group of
// columns, amax is the largest |x|, scale = amax / L with L = 32767 or 127 (Weight::activation_bits), and
// q = x * (L / amax) rounded half to even. Sums of q times weight over a group are exact in int32 (at most
// 128 * 32767 * 127); groups follow in ascending order: y = fma(float(sum), weight scale * scale, y).
#pragma once
#include "losa/weight.h"

namespace losa {

/// Tokens after rounding. A group that holds a NaN or an infinity has scale NaN, and any q.
struct RoundedTokens {
  int16_t* values;   // [tokens, padded_columns], zero beyond the columns
  float* scales;     // [tokens, groups]
  int64_t columns;   // K
  int64_t group;
  char* arranged = nullptr;  // [tokens, arranged_bytes], if the row's decode wants values in another order

  LOSA_INLINE int64_t padded_columns() const { return groups() * group; }
  LOSA_INLINE int64_t groups() const { return (columns + group - 1) / group; }
  LOSA_INLINE int16_t* token(int64_t index) const { return values + index * padded_columns(); }
  LOSA_INLINE float* token_scales(int64_t index) const { return scales + index * groups(); }
  /// Room for the values of a token, four bytes for each group, and an odd number of cache lines in all, so that tokens
  /// next to each other never lie at the same place of a page: an L1 cache could not hold eight of them.
  LOSA_INLINE int64_t arranged_bytes() const { return ((2 * padded_columns() + 4 * groups() + 63) / 64 | 1) * 64; }
  LOSA_INLINE char* arranged_token(int64_t index) const { return arranged + index * arranged_bytes(); }
  LOSA_INLINE RoundedTokens from(int64_t index) const {
    return {token(index), token_scales(index), columns, group, arranged == nullptr ? nullptr : arranged_token(index)};
  }
};

/// Activations of a pass, arranged for prefill in tiles of tokens (token_tiles.h). What lies in a tile is the
/// row's own affair; for tile t, values start at 2 * first token * padded columns bytes.
struct PackedTokens {
  void* values;
  float* scales;  // [tile][groups][width]
};

}  // namespace losa
