// int8 and int4 weights for every 64-bit ARM processor, with activations of 16 bits.
//
// smlal multiplies four 16-bit integers into four 32-bit sums. Without the dot product of later processors
// (neon_dotprod.cpp) there is nothing to gain from activations of 8 bits.
#include <arm_neon.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {
namespace {

#include "losa/loops/neon.h"
#include "losa/loops/expand.h"
#include "losa/loops/prefill.h"
#include "losa/loops/neon_steps.h"

/// One vector for each of four columns, 16 rows each.
LOSA_INLINE void columns_of(const int8x16_t (&weights)[4], int8x16_t (&columns)[4]) {
  const int8x16_t even_low = vuzp1q_s8(weights[0], weights[1]), odd_low = vuzp2q_s8(weights[0], weights[1]);
  const int8x16_t even_high = vuzp1q_s8(weights[2], weights[3]), odd_high = vuzp2q_s8(weights[2], weights[3]);
  columns[0] = vuzp1q_s8(even_low, even_high);
  columns[1] = vuzp1q_s8(odd_low, odd_high);
  columns[2] = vuzp2q_s8(even_low, even_high);
  columns[3] = vuzp2q_s8(odd_low, odd_high);
}

template <int Tokens>
struct SumsOfWords {
  static constexpr int kTokens = Tokens;
  int32x4_t sums[Tokens][4];
  const int16_t* x;
  int64_t stride;

  LOSA_INLINE void clear() {
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < 4; ++part) sums[t][part] = vdupq_n_s32(0);
  }
  LOSA_INLINE void start(const int16_t* from, int64_t apart) {
    x = from;
    stride = apart;
  }
  template <int Step>
  LOSA_INLINE void add(const int8x16_t (&weights)[4]) {
    int8x16_t columns[4];
    columns_of(weights, columns);
    int16x4_t four[Tokens];
    for (int t = 0; t < Tokens; ++t) four[t] = vld1_s16(x + t * stride + 4 * Step);
    add_column<0>(columns[0], four);
    add_column<1>(columns[1], four);
    add_column<2>(columns[2], four);
    add_column<3>(columns[3], four);
  }
  template <int Column>
  LOSA_INLINE void add_column(int8x16_t weights, const int16x4_t (&four)[Tokens]) {
    const int16x8_t low = vmovl_s8(vget_low_s8(weights)), high = vmovl_high_s8(weights);
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t) {
      sums[t][0] = vmlal_lane_s16(sums[t][0], vget_low_s16(low), four[t], Column);
      sums[t][1] = vmlal_high_lane_s16(sums[t][1], low, four[t], Column);
      sums[t][2] = vmlal_lane_s16(sums[t][2], vget_low_s16(high), four[t], Column);
      sums[t][3] = vmlal_high_lane_s16(sums[t][3], high, four[t], Column);
    }
  }
  LOSA_INLINE int32x4_t total(int t, int part) const { return sums[t][part]; }
};

// ---- prefill ----

// An element is a pair of columns, 16 bits each. smlal has no use for neighbours: of eight tokens, or rows, the first
// halves of a pair lie together, and then the second ones.

/// Eight tokens times eight rows.
struct PairProduct {
  static constexpr int kApart = 1;

  template <int Token>
  LOSA_INLINE static void add_token(int16x8_t weights, int16x8_t x, int32x4_t (&total)[2]) {
    total[0] = vmlal_laneq_s16(total[0], vget_low_s16(weights), x, Token);
    total[1] = vmlal_high_laneq_s16(total[1], weights, x, Token);
  }

  static __attribute__((noinline)) void run(const int32_t* weights, int64_t elements, const int32_t* x, int64_t width,
                                            const float* scales, const float* token_scales, float* sums) {
    int32x4_t total[8][2];
    for (int t = 0; t < 8; ++t) total[t][0] = total[t][1] = vdupq_n_s32(0);
    for (int64_t k = 0; k < elements; ++k, weights += kBlockRows, x += width) {
#pragma GCC unroll 2
      for (int half = 0; half < 8; half += 4) {
        const int16x8_t rows = vreinterpretq_s16_s32(vld1q_s32(weights + half));
        const int16x8_t tokens = vreinterpretq_s16_s32(vld1q_s32(x + half));
        add_token<0>(rows, tokens, total[0]);
        add_token<1>(rows, tokens, total[1]);
        add_token<2>(rows, tokens, total[2]);
        add_token<3>(rows, tokens, total[3]);
        add_token<4>(rows, tokens, total[4]);
        add_token<5>(rows, tokens, total[5]);
        add_token<6>(rows, tokens, total[6]);
        add_token<7>(rows, tokens, total[7]);
      }
    }
    add_eight(total, scales, token_scales, sums);
  }
};

/// For SkipProduct, which multiplies single pairs of weights, each in its place, by eight tokens.
struct Pairs {
  static constexpr int kLanes = 8;
  using Element = int32_t;
  struct Vector {
    int32x4_t low, high;
  };
  struct Scale {
    float32x4_t low, high;
  };

  static int16x8x2_t load(const int32_t* p) {
    return {{vreinterpretq_s16_s32(vld1q_s32(p)), vreinterpretq_s16_s32(vld1q_s32(p + 4))}};
  }
  static int16x4_t broadcast(const int32_t* p) { return vreinterpret_s16_s32(vld1_dup_s32(p)); }
  static Vector multiply_add(int16x4_t a, int16x8x2_t b, Vector c) {
    c.low = vmlal_lane_s16(c.low, vget_low_s16(b.val[0]), a, 0);
    c.high = vmlal_high_lane_s16(c.high, b.val[0], a, 0);
    c.low = vmlal_lane_s16(c.low, vget_low_s16(b.val[1]), a, 1);
    c.high = vmlal_high_lane_s16(c.high, b.val[1], a, 1);
    return c;
  }
  static Vector begin(const float*) { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
  static Scale scale(const float* p) { return {vld1q_dup_f32(p), vld1q_dup_f32(p)}; }
  static Scale scales(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void finish(float* sums, Vector total, Scale a, Scale b) {
    add_scaled(sums, total.low, vmulq_f32(a.low, b.low));
    add_scaled(sums + 4, total.high, vmulq_f32(a.high, b.high));
  }
  static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    transpose_eight(from, from_stride, to, to_stride);
  }
};

/// Expands group after group; an element is a pair of columns.
template <class Steps>
class PairSource {
 public:
  using Element = int32_t;
  static int64_t elements(const Weight& w) { return 2 * w.steps(); }
  static int64_t tile_elements(const Weight& w) { return w.group / 2; }

  void start(const Weight& w, int64_t block) {
    steps_.start(w, block);
    scales_ = w.block_scales(block);
    masks_ = w.block_masks(block);
  }

  /// With row masks the tile is for SkipProduct, which reads single pairs of it.
  template <bool RowMasks>
  void expand(int64_t elements, WeightTile<int32_t>* tile) {
    const int64_t steps = elements / 2;
    int32_t* to = tile->weights;
    steps_.start_group(steps);
    for (int64_t step = 0; step < steps; ++step, to += 2 * kBlockRows) {
      int8x16_t weights[4];
      steps_.next(weights);
      if constexpr (RowMasks)
        store_pairs(weights, to);
      else
        store_halves(weights, to);
    }
    store_scales(scales_, tile->scales);
    scales_ += kBlockRows;
    if constexpr (RowMasks) {
      element_masks<2>(masks_, steps, tile->kept);
      masks_ += 8 * steps;
    }
  }

 private:
  LOSA_INLINE static void store_pairs(const int8x16_t (&weights)[4], int32_t* to) {
    for (int part = 0; part < 4; ++part) {
      const int32x4_t low = vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(weights[part])));
      const int32x4_t high = vreinterpretq_s32_s16(vmovl_high_s8(weights[part]));
      vst1q_s32(to + 4 * part, vuzp1q_s32(low, high));
      vst1q_s32(to + kBlockRows + 4 * part, vuzp2q_s32(low, high));
    }
  }
  LOSA_INLINE static void store_halves(const int8x16_t (&weights)[4], int32_t* to) {
    int8x16_t columns[4];
    columns_of(weights, columns);
    int16_t* halves = reinterpret_cast<int16_t*>(to);
    for (int column = 0; column < 4; ++column) {
      int16_t* first = halves + column / 2 * 32 + column % 2 * 8;
      vst1q_s16(first, vmovl_s8(vget_low_s8(columns[column])));
      vst1q_s16(first + 16, vmovl_high_s8(columns[column]));
    }
  }

  Steps steps_;
  const uint16_t* scales_;
  const uint8_t* masks_;
};

/// Pair after pair, each with those of all tokens.
struct PairsOfTokens {
  static constexpr int kTokens = 8;
  static int64_t elements(const Weight& w) { return 2 * w.steps(); }
  static int64_t group_elements(int64_t steps) { return 2 * steps; }

  static void group(const int16_t* const (&from)[8], int64_t steps, int64_t width, int64_t t, int32_t* to) {
    for (int64_t step = 0; step < steps; step += 2) {
      int32x4_t tokens[2][4], pairs[2][4];
      for (int half = 0; half < 2; ++half) {
        for (int i = 0; i < 4; ++i)
          tokens[half][i] = vreinterpretq_s32_s16(vld1q_s16(from[4 * half + i] + 4 * step));
        transpose4(tokens[half], pairs[half]);
      }
      for (int i = 0; i < (step + 1 < steps ? 4 : 2); ++i) {
        const int16x8_t low = vreinterpretq_s16_s32(pairs[0][i]), high = vreinterpretq_s16_s32(pairs[1][i]);
        int16_t* halves = reinterpret_cast<int16_t*>(to + (2 * step + i) * width + t);
        vst1q_s16(halves, vuzp1q_s16(low, high));
        vst1q_s16(halves + 8, vuzp2q_s16(low, high));
      }
    }
  }
};

/// As measured for AVX2, whose loops these are; no ARM processor has been measured.
bool skipping_wins(const Weight& w, int64_t tokens) {
  const TokenTile narrowest = token_tile(tokens, token_tile_count(tokens) - 1);
  const double absent = 1.0 - w.density();
  const double kept_pairs = 1.0 - absent * absent;
  return kept_pairs <= 0.8 && kept_pairs * kTileTokens <= static_cast<double>(narrowest.width);
}

template <class Sparse, class Dense>
void decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  if (w.dense())
    decode_tokens<SumsOfWords, 4, Dense>(w, blocks, x, tokens, y);
  else
    decode_tokens<SumsOfWords, 4, Sparse>(w, blocks, x, tokens, y);
}

template <class Sparse, class Dense>
void prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  const int32_t* values = static_cast<const int32_t*>(packed.values);
  if (w.dense())
    Prefill<PairSource<Dense>, EightByEight<PairProduct>>::run(w, blocks, values, packed.scales, tokens, y);
  else if (skipping_wins(w, tokens))
    Prefill<PairSource<Sparse>, SkipProduct<Pairs>>::run(w, blocks, values, packed.scales, tokens, y);
  else
    Prefill<PairSource<Sparse>, EightByEight<PairProduct>>::run(w, blocks, values, packed.scales, tokens, y);
}

}  // namespace

void neon_int8_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  decode<SparseInt8, DenseInt8>(w, blocks, x, tokens, y);
}
void neon_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  decode<SparseInt4, DenseInt4>(w, blocks, x, tokens, y);
}
void neon_int8_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  prefill<SparseInt8, DenseInt8>(w, blocks, packed, tokens, y);
}
void neon_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  prefill<SparseInt4, DenseInt4>(w, blocks, packed, tokens, y);
}
void neon_pack(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t tile, const PackedTokens& packed) {
  pack_tokens<PairsOfTokens>(w, x, tokens, tile, packed);
}

}  // namespace losa
