// int8 and int4 weights for ARM processors with dot products of bytes (FEAT_DotProd; Cortex-A76, Neoverse N1 and
// later). What is not here, the row takes from neon.cpp.
#include <arm_neon.h>

#include "losa/arm_features.h"
#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {
namespace {

#include "losa/loops/neon.h"
#include "losa/loops/expand.h"
#include "losa/loops/prefill.h"
#include "losa/loops/neon_steps.h"
#include "losa/loops/neon_quads.h"

/// Activations of 16 bits. Decode has unsigned low bytes meet weights + 128, which are unsigned too: cheaper than the
/// sum of a row's weights, since it is the sum of the activations that is to be taken off again.
template <int Tokens>
struct SumsOfWords {
  static constexpr int kTokens = Tokens;
  int32x4_t high_sums[Tokens][4];
  uint32x4_t low_sums[Tokens][4], activations[Tokens];
  int8x16_t high[Tokens];
  uint8x16_t low[Tokens];

  LOSA_INLINE void clear() {
    for (int t = 0; t < Tokens; ++t) {
      for (int part = 0; part < 4; ++part) high_sums[t][part] = vdupq_n_s32(0), low_sums[t][part] = vdupq_n_u32(0);
      activations[t] = vdupq_n_u32(0);
    }
  }
  LOSA_INLINE void start(const int16_t* from, int64_t stride) {
    for (int t = 0; t < Tokens; ++t) {
      const TokenBytes bytes(from + t * stride);
      high[t] = bytes.high;
      low[t] = bytes.low;
      activations[t] = vdotq_u32(activations[t], bytes.low, vdupq_n_u8(1));
    }
  }
  template <int Step>
  LOSA_INLINE void add(const int8x16_t (&weights)[4]) {
    for (int part = 0; part < 4; ++part) {
      const uint8x16_t above_zero = veorq_u8(vreinterpretq_u8_s8(weights[part]), vdupq_n_u8(128));
#pragma GCC unroll 2
      for (int t = 0; t < Tokens; ++t) {
        high_sums[t][part] = vdotq_laneq_s32(high_sums[t][part], weights[part], high[t], Step);
        low_sums[t][part] = vdotq_laneq_u32(low_sums[t][part], above_zero, low[t], Step);
      }
    }
  }
  LOSA_INLINE int32x4_t total(int t, int part) const {
    const int32x4_t too_much = vdupq_n_s32(static_cast<int32_t>(vaddvq_u32(activations[t]) * 128));
    const int32x4_t low_part = vsubq_s32(vreinterpretq_s32_u32(low_sums[t][part]), too_much);
    return vaddq_s32(vshlq_n_s32(high_sums[t][part], 8), low_part);
  }
};

/// Skipping loads activations for each sdot, the dense tile once for four of them. By counting instructions for
/// processors that start two of each in a cycle; none has been measured.
bool skipping_wins(const Weight& w, int64_t tokens) {
  const double absent = 1.0 - w.density();
  const double kept_quads = 1.0 - absent * absent * absent * absent;
  const TokenTile narrowest = token_tile(tokens, token_tile_count(tokens) - 1);
  return kept_quads <= 0.7 && kept_quads * kTileTokens <= static_cast<double>(narrowest.width);
}

template <class Sparse, class Dense, int Planes>
void prefill_planes(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  using Product = EightByEight<QuadProduct<Planes>>;
  const int32_t* values = static_cast<const int32_t*>(packed.values);
  if (w.dense())
    Prefill<QuadSource<Dense, Planes>, Product>::run(w, blocks, values, packed.scales, tokens, y);
  else if (skipping_wins(w, tokens))
    Prefill<QuadSource<Sparse, Planes>, QuadSkip<Planes>>::run(w, blocks, values, packed.scales, tokens, y);
  else
    Prefill<QuadSource<Sparse, Planes>, Product>::run(w, blocks, values, packed.scales, tokens, y);
}

template <class Sparse, class Dense>
void prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  if (w.activation_bits == 8)
    prefill_planes<Sparse, Dense, 1>(w, blocks, packed, tokens, y);
  else
    prefill_planes<Sparse, Dense, 2>(w, blocks, packed, tokens, y);
}

void pack(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t tile, const PackedTokens& packed) {
  if (w.activation_bits == 8)
    pack_tokens<QuadsOfTokens<1>>(w, x, tokens, tile, packed);
  else
    pack_tokens<QuadsOfTokens<2>>(w, x, tokens, tile, packed);
}

constexpr int64_t kPrefillMinTokens = 5;

}  // namespace

const KernelRow kNeonDotprodRow = {
    "neon-dotprod",
    arm_has_dotprod,
    {},  // fp32
    {},  // bf16
    {decode_bytes<SumsOfWords, SparseInt8, DenseInt8>, prefill<SparseInt8, DenseInt8>, pack, kPrefillMinTokens},
    {decode_bytes<SumsOfWords, SparseInt4, DenseInt4>, prefill<SparseInt4, DenseInt4>, pack, kPrefillMinTokens},
    nullptr,  // round
    nullptr,  // gate
    nullptr,  // attend
};

}  // namespace losa
