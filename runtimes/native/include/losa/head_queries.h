// What a kernel of attention gets: the queries that share one head of keys and values (attention.h).
#pragma once
#include <cstdint>

#include "losa/weight.h"

namespace losa {

constexpr int64_t kKeyTile = 16;  // keys whose scores a kernel computes at once

/// Tokens of one row, each with `heads` queries, and some of the keys that they see: `count` of them, counted from 0 at
/// the first one. All pointers are to float32.
struct HeadQueries {
  const float* queries;   // [tokens][heads][head_dim], scaled
  int64_t tokens, heads, head_dim;
  int64_t past;           // place of the first token, negative if that is before the first key
  int64_t window;         // tokens that one sees at most, itself included
  const float* keys;      // [count][head_dim]
  const float* values;    // as keys
  int64_t count;
  int64_t readable;       // tokens from the first key on whose memory may be read; what lies there is of no matter
  float* scores;          // [tokens][heads][score_stride], for the kernel's use
  float* turned;          // [head_dim][kKeyTile], likewise
  float* largest;         // [tokens][heads]: the largest score; -infinity if a query sees none of these keys
  float* sums;            // [tokens][heads]: of e^(score - largest)
  float* output;          // [tokens][heads][head_dim]: sums of e^(score - largest) times values

  /// Keys [start, end) are what a token sees.
  LOSA_INLINE int64_t end(int64_t token) const { return clamp(past + token + 1); }
  LOSA_INLINE int64_t start(int64_t token) const {
    const int64_t end = past + token + 1;
    return end > window ? clamp(end - window) : 0;
  }
  LOSA_INLINE int64_t score_stride() const { return (count + kKeyTile - 1) / kKeyTile * kKeyTile; }
  LOSA_INLINE float* output_of(int64_t query) const { return output + query * head_dim; }

 private:
  LOSA_INLINE int64_t clamp(int64_t key) const { return key < 0 ? 0 : key > count ? count : key; }
};

}  // namespace losa
