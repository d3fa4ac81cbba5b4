// What a kernel of attention gets: the queries that share one head of keys and values (attention.h).
#pragma once
#include <cstdint>

#include "losa/weight.h"

namespace losa {

constexpr int64_t kKeyTile = 16;  // keys whose scores a kernel computes at once

/// Tokens of one row, each with `heads` queries. All pointers are to float32.
struct HeadQueries {
  const float* queries;   // [tokens][heads][head_dim], scaled
  int64_t tokens, heads, head_dim;
  int64_t past;           // place of the first token
  int64_t window;         // tokens that one sees at most, itself included
  const float* keys;      // [capacity][head_dim]
  const float* values;    // as keys
  int64_t capacity;       // tokens whose keys may be read; those beyond a token's own place are of no matter
  float* scores;          // [tokens][heads][score_stride], for the kernel's use
  float* turned;          // [head_dim][kKeyTile], likewise
  float* output;          // [tokens, output_stride apart][heads][head_dim]
  int64_t output_stride;

  /// Keys [start, end) are what a token sees.
  LOSA_INLINE int64_t end(int64_t token) const { return past + token + 1; }
  LOSA_INLINE int64_t start(int64_t token) const { return end(token) > window ? end(token) - window : 0; }
  LOSA_INLINE int64_t score_stride() const { return (end(tokens - 1) + kKeyTile - 1) / kKeyTile * kKeyTile; }
  LOSA_INLINE float* output_of(int64_t query) const {
    return output + query / heads * output_stride + query % heads * head_dim;
  }
};

}  // namespace losa
