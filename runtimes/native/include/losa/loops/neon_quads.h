// int8 and int4 weights on ARM processors with dot products: four neighbouring columns are one element, whose four
// bytes one lane multiplies and sums up. Needs neon_steps.h and prefill.h, and sdot.
//
// Activations of 16 bits come as two bytes, 256 high + low: two planes, one after the other, of which the sums of the
// first are multiplied by 256 before the second joins them. The high byte is signed, the low one is not; sdot wants
// it signed as well and gets low - 128, so that 128 times the sum of a row's weights must be added.

/// Sixteen columns of a token as bytes.
struct TokenBytes {
  int8x16_t high;  // of 8 bits: all there is
  uint8x16_t low;

  LOSA_INLINE explicit TokenBytes(const int16_t* x) {
    const int8x16_t first = vreinterpretq_s8_s16(vld1q_s16(x)), second = vreinterpretq_s8_s16(vld1q_s16(x + 8));
    high = vuzp2q_s8(first, second);
    low = vreinterpretq_u8_s8(vuzp1q_s8(first, second));
  }
  /// The bytes of plane `Plane` of `Planes`; the lower one of two as signed bytes, 128 less.
  template <int Planes, int Plane>
  LOSA_INLINE int8x16_t plane() const {
    if constexpr (Planes == 1) return vreinterpretq_s8_u8(low);
    if constexpr (Plane == 0) return high;
    return vreinterpretq_s8_u8(veorq_u8(low, vdupq_n_u8(128)));
  }
};

// ---- decode ----

template <int Tokens>
struct SumsOfBytes {
  static constexpr int kTokens = Tokens;
  int32x4_t sums[Tokens][4];
  int8x16_t x[Tokens];

  LOSA_INLINE void clear() {
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < 4; ++part) sums[t][part] = vdupq_n_s32(0);
  }
  LOSA_INLINE void start(const int16_t* from, int64_t stride) {
    for (int t = 0; t < Tokens; ++t) x[t] = TokenBytes(from + t * stride).template plane<1, 0>();
  }
  template <int Step>
  LOSA_INLINE void add(const int8x16_t (&weights)[4]) {
#pragma GCC unroll 4
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < 4; ++part) sums[t][part] = vdotq_laneq_s32(sums[t][part], weights[part], x[t], Step);
  }
  LOSA_INLINE int32x4_t total(int t, int part) const { return sums[t][part]; }
};

/// `Words` does the same for activations of 16 bits.
template <template <int> class Words, class Sparse, class Dense>
static void decode_bytes(const losa::Weight& w, losa::BlockRange blocks, const losa::RoundedTokens& x, int64_t tokens,
                         float* y) {
  if (w.activation_bits == 8) {
    if (w.dense())
      decode_tokens<SumsOfBytes, 4, Dense>(w, blocks, x, tokens, y);
    else
      decode_tokens<SumsOfBytes, 4, Sparse>(w, blocks, x, tokens, y);
  } else {
    if (w.dense())
      decode_tokens<Words, 2, Dense>(w, blocks, x, tokens, y);
    else
      decode_tokens<Words, 2, Sparse>(w, blocks, x, tokens, y);
  }
}

// ---- prefill ----

/// Where in a tile of weights 128 times the sums of its rows are: behind the last step it can have.
constexpr int64_t kRowSums = kMaxGroupSteps * losa::kBlockRows;

/// Expands group after group.
template <class Steps, int Planes>
class QuadSource {
 public:
  using Element = int32_t;
  static int64_t elements(const losa::Weight& w) { return Planes * w.steps(); }
  static int64_t tile_elements(const losa::Weight& w) { return Planes * w.group / 4; }
  static constexpr bool kSums = Planes == 2;

  void start(const losa::Weight& w, int64_t block) {
    steps_.start(w, block);
    scales_ = w.block_scales(block);
    masks_ = w.block_masks(block);
  }

  template <bool RowMasks>
  void expand(int64_t elements, WeightTile<int32_t>* tile) {
    const int64_t steps = elements / Planes;
    int32_t* to = tile->weights;
    int32x4_t sums[4];
    for (int part = 0; part < 4; ++part) sums[part] = vdupq_n_s32(0);
    steps_.start_group(steps);
    for (int64_t step = 0; step < steps; ++step, to += losa::kBlockRows) {
      int8x16_t weights[4];
      steps_.next(weights);
      for (int part = 0; part < 4; ++part) {
        vst1q_s32(to + 4 * part, vreinterpretq_s32_s8(weights[part]));
        if constexpr (kSums) sums[part] = vdotq_s32(sums[part], weights[part], vdupq_n_s8(1));
      }
    }
    if constexpr (kSums)
      for (int part = 0; part < 4; ++part)
        vst1q_s32(tile->weights + kRowSums + 4 * part, vshlq_n_s32(sums[part], 7));
    store_scales(scales_, tile->scales);
    scales_ += losa::kBlockRows;
    if constexpr (RowMasks) {
      element_masks<1>(masks_, steps, tile->kept);
      masks_ += 8 * steps;
    }
  }

 private:
  Steps steps_;
  const uint16_t* scales_;
  const uint8_t* masks_;
};

template <int Planes>
struct QuadProduct {
  static constexpr int kApart = 1;

  template <int Token>
  LOSA_INLINE static void add_token(int8x16_t low, int8x16_t high, int8x16_t tokens, int32x4_t (&total)[2]) {
    total[0] = vdotq_laneq_s32(total[0], low, tokens, Token);
    total[1] = vdotq_laneq_s32(total[1], high, tokens, Token);
  }

  static __attribute__((noinline)) void run(const int32_t* weights, int64_t elements, const int32_t* x, int64_t width,
                                            const float* scales, const float* token_scales, float* sums) {
    const int64_t steps = elements / Planes;
    int32x4_t total[8][2];
    for (int t = 0; t < 8; ++t) total[t][0] = total[t][1] = vdupq_n_s32(0);
    for (int plane = 0; plane < Planes; ++plane) {
      if (plane == 1) {
        const int32x4_t low = vld1q_s32(weights + kRowSums), high = vld1q_s32(weights + kRowSums + 4);
        for (int t = 0; t < 8; ++t) {
          total[t][0] = vaddq_s32(vshlq_n_s32(total[t][0], 8), low);
          total[t][1] = vaddq_s32(vshlq_n_s32(total[t][1], 8), high);
        }
      }
      const int32_t* from = weights;
      for (int64_t step = 0; step < steps; ++step, from += losa::kBlockRows, x += width) {
        const int8x16_t low = vreinterpretq_s8_s32(vld1q_s32(from)), high = vreinterpretq_s8_s32(vld1q_s32(from + 4));
        const int8x16_t first = vreinterpretq_s8_s32(vld1q_s32(x)), second = vreinterpretq_s8_s32(vld1q_s32(x + 4));
        add_token<0>(low, high, first, total[0]);
        add_token<1>(low, high, first, total[1]);
        add_token<2>(low, high, first, total[2]);
        add_token<3>(low, high, first, total[3]);
        add_token<0>(low, high, second, total[4]);
        add_token<1>(low, high, second, total[5]);
        add_token<2>(low, high, second, total[6]);
        add_token<3>(low, high, second, total[7]);
      }
    }
    add_eight(total, scales, token_scales, sums);
  }
};

/// Lanes run along tokens, so that four absent weights cost nothing.
template <int Planes>
struct QuadSkip {
  static constexpr bool kNeedsRowMasks = true;

  template <int Vectors>
  static void rows(const WeightTile<int32_t>& tile, int64_t steps, const int32_t* x, const float* token_scales,
                   float* sums) {
    for (int row = 0; row < losa::kBlockRows; ++row, sums += Vectors * 4) {
      const int32_t* weights = tile.weights + row;
      int32x4_t total[Vectors];
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v) total[v] = vdupq_n_s32(0);
      for (int plane = 0; plane < Planes; ++plane) {
        if (plane == 1) {
          const int32x4_t row_sum = vld1q_dup_s32(weights + kRowSums);
#pragma GCC unroll 16
          for (int v = 0; v < Vectors; ++v) total[v] = vaddq_s32(vshlq_n_s32(total[v], 8), row_sum);
        }
        const int32_t* plane_x = x + plane * steps * (Vectors * 4);
        for (uint64_t kept = tile.kept[row]; kept != 0; kept &= kept - 1) {
          const int64_t step = __builtin_ctzll(kept);
          const int8x16_t weight = vreinterpretq_s8_s32(vld1q_dup_s32(weights + step * losa::kBlockRows));
          const int32_t* tokens = plane_x + step * (Vectors * 4);
#pragma GCC unroll 16
          for (int v = 0; v < Vectors; ++v)
            total[v] = vdotq_s32(total[v], weight, vreinterpretq_s8_s32(vld1q_s32(tokens + 4 * v)));
        }
      }
#pragma GCC unroll 16
      for (int v = 0; v < Vectors; ++v)
        add_scaled(sums + 4 * v, total[v], vmulq_n_f32(vld1q_f32(token_scales + 4 * v), tile.scales[row]));
    }
  }

  static void add(const WeightTile<int32_t>& tile, int64_t elements, const int32_t* x, int64_t width, int64_t,
                  const float* token_scales, float* sums) {
    const int64_t steps = elements / Planes;
    switch (width / 8) {
      case 1: return rows<2>(tile, steps, x, token_scales, sums);
      case 2: return rows<4>(tile, steps, x, token_scales, sums);
      case 3: return rows<6>(tile, steps, x, token_scales, sums);
      case 4: return rows<8>(tile, steps, x, token_scales, sums);
      case 5: return rows<10>(tile, steps, x, token_scales, sums);
      case 6: return rows<12>(tile, steps, x, token_scales, sums);
      case 7: return rows<14>(tile, steps, x, token_scales, sums);
      default: return rows<16>(tile, steps, x, token_scales, sums);
    }
  }

  static void store(const float* sums, const losa::TokenTile& tile, int64_t token, int64_t count, int64_t rows,
                    float* y, int64_t stride) {
    sums += token;
    for (int64_t t = 0; t < count; t += 4) {
      float of_rows[4][losa::kBlockRows];
      for (int part = 0; part < losa::kBlockRows; part += 4) {
        int32x4_t from[4], to[4];
        for (int i = 0; i < 4; ++i) from[i] = vreinterpretq_s32_f32(vld1q_f32(sums + (part + i) * tile.width + t));
        transpose4(from, to);
        for (int i = 0; i < 4; ++i) vst1q_f32(of_rows[i] + part, vreinterpretq_f32_s32(to[i]));
      }
      for (int64_t i = 0; i < 4 && t + i < count; ++i) copy_rows(of_rows[i], rows, y + (t + i) * stride);
    }
  }
};

/// Plane after plane, and in each of them step after step, each with the four bytes of all tokens.
template <int Planes>
struct QuadsOfTokens {
  static constexpr int kTokens = 4;
  static int64_t elements(const losa::Weight& w) { return Planes * w.steps(); }
  static int64_t group_elements(int64_t steps) { return Planes * steps; }

  static void group(const int16_t* const (&from)[4], int64_t steps, int64_t width, int64_t t, int32_t* to) {
    for (int64_t step = 0; step < steps; step += 4) {
      int32x4_t planes[2][4];
      for (int i = 0; i < 4; ++i) {
        const TokenBytes bytes(from[i] + 4 * step);
        planes[0][i] = vreinterpretq_s32_s8(bytes.template plane<Planes, 0>());
        planes[1][i] = vreinterpretq_s32_s8(bytes.template plane<Planes, 1>());
      }
      for (int plane = 0; plane < Planes; ++plane) {
        int32x4_t quads[4];
        transpose4(planes[plane], quads);
        int32_t* first = to + (plane * steps + step) * width + t;
        for (int i = 0; i < 4 && step + i < steps; ++i) vst1q_s32(first + i * width, quads[i]);
      }
    }
  }
};
