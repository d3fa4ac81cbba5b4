// int8 and int4 weights for ARM processors with products of small matrices of bytes (FEAT_I8MM; Neoverse V1 and N2,
// Cortex-A510, A710, X2 and later). What is not here, the row takes from neon.cpp.
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

/// Activations of 16 bits: these processors also multiply signed bytes by unsigned ones.
template <int Tokens>
struct SumsOfWords {
  static constexpr int kTokens = Tokens;
  int32x4_t high_sums[Tokens][4], low_sums[Tokens][4];
  int8x16_t high[Tokens];
  uint8x16_t low[Tokens];

  LOSA_INLINE void clear() {
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < 4; ++part) high_sums[t][part] = low_sums[t][part] = vdupq_n_s32(0);
  }
  LOSA_INLINE void start(const int16_t* from, int64_t stride) {
    for (int t = 0; t < Tokens; ++t) {
      const TokenBytes bytes(from + t * stride);
      high[t] = bytes.high;
      low[t] = bytes.low;
    }
  }
  template <int Step>
  LOSA_INLINE void add(const int8x16_t (&weights)[4]) {
#pragma GCC unroll 2
    for (int t = 0; t < Tokens; ++t) {
      for (int part = 0; part < 4; ++part) {
        high_sums[t][part] = vdotq_laneq_s32(high_sums[t][part], weights[part], high[t], Step);
        low_sums[t][part] = vsudotq_laneq_s32(low_sums[t][part], weights[part], low[t], Step);
      }
    }
  }
  LOSA_INLINE int32x4_t total(int t, int part) const {
    return vaddq_s32(vshlq_n_s32(high_sums[t][part], 8), low_sums[t][part]);
  }
};

// ---- prefill ----

/// Elements of a group, of one plane: whole pairs of steps.
LOSA_INLINE int64_t whole_pairs(int64_t steps) { return (steps + 1) / 2 * 2; }

/// Expands group after group. Two steps together have eight columns of a row, and two rows fill a vector:
/// [two steps][two rows][row][column].
template <class Steps, int Planes>
class MatrixSource {
 public:
  using Element = int32_t;
  static int64_t elements(const Weight& w) { return Planes * whole_pairs(w.steps()); }
  static int64_t tile_elements(const Weight& w) { return Planes * w.group / 4; }

  void start(const Weight& w, int64_t block) {
    steps_.start(w, block);
    left_ = w.steps();
    scales_ = w.block_scales(block);
  }

  template <bool RowMasks>
  void expand(int64_t elements, WeightTile<int32_t>* tile) {
    const int64_t padded = elements / Planes, steps = padded < left_ ? padded : left_;
    left_ -= steps;
    steps_.start_group(steps);
    int32_t* to = tile->weights;
    for (int64_t step = 0; step < steps; step += 2, to += 2 * kBlockRows) {
      int8x16_t first[4], second[4] = {};
      steps_.next(first);
      if (step + 1 < steps) steps_.next(second);
      for (int part = 0; part < 4; ++part) {
        const int32x4_t left = vreinterpretq_s32_s8(first[part]), right = vreinterpretq_s32_s8(second[part]);
        vst1q_s32(to + 8 * part, vzip1q_s32(left, right));
        vst1q_s32(to + 8 * part + 4, vzip2q_s32(left, right));
      }
    }
    store_scales(scales_, tile->scales);
    scales_ += kBlockRows;
  }

 private:
  Steps steps_;
  int64_t left_;  // steps
  const uint16_t* scales_;
};

/// Plane after plane: [two steps][two tokens][token][column].
template <int Planes>
struct MatricesOfTokens {
  static constexpr int kTokens = 2;
  static int64_t elements(const Weight& w) { return Planes * whole_pairs(w.steps()); }
  static int64_t group_elements(int64_t steps) { return Planes * whole_pairs(steps); }

  static void group(const int16_t* const (&from)[2], int64_t steps, int64_t width, int64_t t, int32_t* to) {
    const int64_t padded = whole_pairs(steps);
    for (int64_t step = 0; step < steps; step += 4) {
      const TokenBytes first(from[0] + 4 * step), second(from[1] + 4 * step);
      if constexpr (Planes == 2)
        store(vreinterpretq_u8_s8(first.high), vreinterpretq_u8_s8(second.high), step + 2 < steps, width,
              to + step * width + 2 * t);
      store(first.low, second.low, step + 2 < steps, width, to + ((Planes - 1) * padded + step) * width + 2 * t);
    }
  }
  /// Sixteen columns of two tokens, or only the first eight.
  LOSA_INLINE static void store(uint8x16_t first, uint8x16_t second, bool all, int64_t width, int32_t* to) {
    const uint64x2_t left = vreinterpretq_u64_u8(first), right = vreinterpretq_u64_u8(second);
    vst1q_s32(to, vreinterpretq_s32_u64(vzip1q_u64(left, right)));
    if (all) vst1q_s32(to + 2 * width, vreinterpretq_s32_u64(vzip2q_u64(left, right)));
  }
};

/// Two tokens times two rows in an instruction. It does twice the work of an sdot for the same loads, so that skipping
/// absent weights has nothing to win before nine in ten are.
template <int Planes>
struct MatrixProduct {
  static constexpr int kApart = 2;

  template <int Plane>
  LOSA_INLINE static void add_plane(const int32_t* weights, int64_t steps, const int32_t* x, int64_t width,
                                    int32x4_t (&total)[4][4]) {
    for (int64_t step = 0; step < steps; step += 2, weights += 2 * kBlockRows, x += 2 * width) {
      int8x16_t rows[4];
      for (int r = 0; r < 4; ++r) rows[r] = vreinterpretq_s8_s32(vld1q_s32(weights + 4 * r));
      for (int t = 0; t < 4; ++t) {
        const int32x4_t tokens = vld1q_s32(x + 4 * t);
        for (int r = 0; r < 4; ++r)
          total[t][r] = Planes == 1 || Plane == 0
                            ? vmmlaq_s32(total[t][r], vreinterpretq_s8_s32(tokens), rows[r])
                            : vusmmlaq_s32(total[t][r], vreinterpretq_u8_s32(tokens), rows[r]);
      }
    }
  }

  static __attribute__((noinline)) void run(const int32_t* weights, int64_t elements, const int32_t* x, int64_t width,
                                            const float* scales, const float* token_scales, float* sums) {
    const int64_t steps = elements / Planes;
    int32x4_t total[4][4];  // of two tokens and two rows
    for (int t = 0; t < 4; ++t)
      for (int r = 0; r < 4; ++r) total[t][r] = vdupq_n_s32(0);
    add_plane<0>(weights, steps, x, width, total);
    if constexpr (Planes == 2) {
      for (int t = 0; t < 4; ++t)
        for (int r = 0; r < 4; ++r) total[t][r] = vshlq_n_s32(total[t][r], 8);
      add_plane<1>(weights, steps, x + steps * width, width, total);
    }
    int32x4_t of_tokens[8][2];
    for (int t = 0; t < 4; ++t) {
      for (int r = 0; r < 4; r += 2) {
        const int64x2_t first = vreinterpretq_s64_s32(total[t][r]), second = vreinterpretq_s64_s32(total[t][r + 1]);
        of_tokens[2 * t][r / 2] = vreinterpretq_s32_s64(vtrn1q_s64(first, second));
        of_tokens[2 * t + 1][r / 2] = vreinterpretq_s32_s64(vtrn2q_s64(first, second));
      }
    }
    add_eight(of_tokens, scales, token_scales, sums);
  }
};

template <class Sparse, class Dense, int Planes>
void prefill_planes(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  using Product = EightByEight<MatrixProduct<Planes>>;
  const int32_t* values = static_cast<const int32_t*>(packed.values);
  if (w.dense())
    Prefill<MatrixSource<Dense, Planes>, Product>::run(w, blocks, values, packed.scales, tokens, y);
  else
    Prefill<MatrixSource<Sparse, Planes>, Product>::run(w, blocks, values, packed.scales, tokens, y);
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
    pack_tokens<MatricesOfTokens<1>>(w, x, tokens, tile, packed);
  else
    pack_tokens<MatricesOfTokens<2>>(w, x, tokens, tile, packed);
}

constexpr int64_t kPrefillMinTokens = 5;

}  // namespace

const KernelRow kNeonI8mmRow = {
    "neon-i8mm",
    arm_has_i8mm,
    {},  // fp32
    {},  // bf16
    {decode_bytes<SumsOfWords, SparseInt8, DenseInt8>, prefill<SparseInt8, DenseInt8>, pack, kPrefillMinTokens},
    {decode_bytes<SumsOfWords, SparseInt4, DenseInt4>, prefill<SparseInt4, DenseInt4>, pack, kPrefillMinTokens},
    nullptr,  // round
    nullptr,  // gate
    nullptr,  // attend
};

}  // namespace losa
