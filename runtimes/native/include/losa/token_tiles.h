// How prefill cuts its tokens into tiles, and where each tile lies in the packed activations.
#pragma once
#include <cstdint>

#include "losa/weight.h"

namespace losa {

constexpr int64_t kTokenStep = 8;        // tile widths are multiples of this
constexpr int64_t kTileTokens = 64;      // widest tile: 64 columns of K are 16 KiB, half of a common L1
constexpr int64_t kPrefillTokens = 128;  // tokens per pass: bounds the packed copy and the accumulators

/// Tile `index` of `tokens` (1..kPrefillTokens): as many tiles as needed, of nearly equal width, so that
/// no tile is so narrow that its few accumulators cannot hide the latency of a multiply-add.
struct TokenTile {
  int64_t first;   // first token, also the tile's place in the packed copy: `packed + first * columns`
  int64_t width;   // tokens with padding, a multiple of kTokenStep
  int64_t tokens;  // real tokens, <= width
};

LOSA_INLINE int64_t token_tile_count(int64_t tokens) { return (tokens + kTileTokens - 1) / kTileTokens; }

LOSA_INLINE TokenTile token_tile(int64_t tokens, int64_t index) {
  const int64_t tiles = token_tile_count(tokens);
  const int64_t steps = (tokens + kTokenStep - 1) / kTokenStep;
  const int64_t base = steps / tiles, wider = steps % tiles;
  const int64_t before = index * base + (index < wider ? index : wider);
  const int64_t width = base + (index < wider ? 1 : 0);
  const int64_t first = before * kTokenStep;
  const int64_t left = tokens - first;
  return {first, width * kTokenStep, left < width * kTokenStep ? left : width * kTokenStep};
}

/// Floats of the packed copy: [tile][columns][width], tokens padded with zeros.
LOSA_INLINE int64_t packed_floats(int64_t tokens, int64_t columns) {
  return (tokens + kTokenStep - 1) / kTokenStep * kTokenStep * columns;
}

}  // namespace losa
