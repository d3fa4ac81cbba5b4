// Kernels for every 64-bit ARM processor: fp32 and bf16, and what all types share. neon_integer.cpp has int8 and int4.
#include <arm_neon.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {

// neon_integer.cpp. As functions, whose addresses are known when a row is linked: a row that had to be filled at run
// time would be filled before anything has asked the CPU what it can do.
void neon_int8_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void neon_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void neon_int8_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
void neon_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
void neon_pack(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t tile, const PackedTokens& packed);

namespace {

/// For each 8-bit mask, which bytes of the packed values the eight lanes take, each `Bytes` wide; 255 means none.
template <int Bytes>
struct ExpandTable {
  alignas(64) uint8_t lanes[256][8 * Bytes];
  constexpr ExpandTable() : lanes() {
    for (int bits = 0; bits < 256; ++bits) {
      int next = 0;
      for (int lane = 0; lane < 8; ++lane) {
        const bool kept = (bits >> lane & 1) != 0;
        for (int byte = 0; byte < Bytes; ++byte)
          lanes[bits][lane * Bytes + byte] = static_cast<uint8_t>(kept ? next * Bytes + byte : 255);
        next += kept;
      }
    }
  }
};
constexpr ExpandTable<4> kExpandFloats;
constexpr ExpandTable<2> kExpandHalves;

#include "losa/loops/neon.h"
#include "losa/loops/expand.h"

struct Neon;
template <>
struct MaskOf<Neon> {
  using Type = NeonMask;
};

#include "losa/loops/bf16.h"
#include "losa/loops/decode.h"
#include "losa/loops/prefill.h"
#include "losa/loops/gate.h"
#include "losa/loops/attend.h"

/// Eight lanes in two registers: there are twice as many of them as AVX2 has, so that the same loops fit.
struct Neon {
  static constexpr int kLanes = 8;
  static constexpr int kDecodeSums = 1;
  static constexpr int kWideTokens = 6;
  static constexpr int kNarrowTokens = 4;
  struct Vector {
    float32x4_t low, high;
  };
  using Element = float;
  using Scale = int;  // floats have none

  static Vector begin(const float* sums) { return load(sums); }
  static void finish(float* sums, Vector total, Scale, Scale) { store(sums, total); }
  static Scale scale(const float*) { return 0; }
  static Scale scales(const float*) { return 0; }
  static Vector zero() { return {vdupq_n_f32(0), vdupq_n_f32(0)}; }
  static float broadcast(const float* p) { return *p; }  // fmla multiplies by one lane of a register
  static Vector load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
  static void store(float* p, Vector v) {
    vst1q_f32(p, v.low);
    vst1q_f32(p + 4, v.high);
  }
  static Vector multiply_add(Vector a, float b, Vector c) {
    return {vfmaq_n_f32(c.low, a.low, b), vfmaq_n_f32(c.high, a.high, b)};
  }
  static Vector multiply_add(float a, Vector b, Vector c) { return multiply_add(b, a, c); }
  static Vector add(Vector a, Vector b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }

  static Vector expand(const float* values, unsigned bits) {
    const uint8x16x2_t packed = vld1q_u8_x2(reinterpret_cast<const uint8_t*>(values));
    const uint8_t* lanes = kExpandFloats.lanes[bits];
    return {vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(lanes))),
            vreinterpretq_f32_u8(vqtbl2q_u8(packed, vld1q_u8(lanes + 16)))};
  }

  struct Pairs {
    uint16x8_t low, high;  // four rows each
  };

  static Pairs load_pairs(const uint16_t* p) { return {halves(p), halves(p + 8)}; }
  static Pairs expand_pairs(const Word<Neon, uint16_t>& word, int bit) {
    return {expand_halves(word, bit), expand_halves(word, bit + 8)};
  }
  static uint16x8_t halves(const uint16_t* p) {
    return vreinterpretq_u16_u8(vld1q_u8(reinterpret_cast<const uint8_t*>(p)));
  }
  static uint16x8_t expand_halves(const Word<Neon, uint16_t>& word, int bit) {
    const uint8x16_t packed = vreinterpretq_u8_u16(halves(word.values + word.kept.before(bit)));
    return vreinterpretq_u16_u8(vqtbl1q_u8(packed, vld1q_u8(kExpandHalves.lanes[word.masks[bit / 8]])));
  }
  static Vector first(Pairs pairs) { return {first_of(pairs.low), first_of(pairs.high)}; }
  static Vector second(Pairs pairs) { return {second_of(pairs.low), second_of(pairs.high)}; }
  static float32x4_t first_of(uint16x8_t pairs) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(pairs), 16));
  }
  static float32x4_t second_of(uint16x8_t pairs) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(pairs), vdupq_n_u32(0xffff0000u)));
  }

  static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    transpose_eight(from, from_stride, to, to_stride);
  }

  static void row_masks(const uint8_t* masks, uint64_t (&rows)[kBlockRows]) {
    constexpr uint8x16_t kRowBit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    constexpr uint8x16_t kTwoBytes = {0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1};
    uint8x16_t parts[8];  // of eight columns each
    for (int part = 0; part < 8; ++part) {
      const uint8x16_t bytes = vld1q_u8(masks + 16 * part);
      uint8x16_t bits = vdupq_n_u8(0);
#pragma GCC unroll 8
      for (int column = 0; column < 8; ++column)
        bits = append_bit(bits, vqtbl1q_u8(bytes, vaddq_u8(kTwoBytes, vdupq_n_u8(2 * column))), kRowBit);
      parts[part] = bits;
    }
    bytes_of_rows(parts, rows);
  }

  /// The same from the masks of pairs.
  static void pair_row_masks(const uint8_t* masks, uint64_t (&rows)[kBlockRows]) {
    constexpr uint8x16_t kFirstBit = {1, 4, 16, 64, 1, 4, 16, 64, 1, 4, 16, 64, 1, 4, 16, 64};
    constexpr uint8x16_t kFourBytes = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
    uint8x16_t parts[8];  // of eight columns each
    for (int part = 0; part < 8; ++part) {
      const uint8x16_t bytes = vld1q_u8(masks + 16 * part);
      uint8x16_t bits = vdupq_n_u8(0);
#pragma GCC unroll 4
      for (int step = 0; step < 4; ++step) {
        const uint8x16_t of_rows = vqtbl1q_u8(bytes, vaddq_u8(kFourBytes, vdupq_n_u8(4 * step)));
        bits = append_bit(bits, of_rows, kFirstBit);
        bits = append_bit(bits, of_rows, vshlq_n_u8(kFirstBit, 1));
      }
      parts[part] = bits;
    }
    bytes_of_rows(parts, rows);
  }
};

void bf16_decode(const Weight& w, BlockRange blocks, const float* x, int64_t tokens, float* y) {
  if (w.dense())
    Decode<Neon, DenseBf16<Neon>>::run(w, blocks, x, tokens, y);
  else
    Decode<Neon, Bf16<Neon>>::run(w, blocks, x, tokens, y);
}

// ---- prefill ----

// Both as measured for AVX2, whose loops and registers these are; no ARM processor has been measured.
constexpr int64_t kPrefillMinTokens = 12;
constexpr int64_t kIntegerPrefillMinTokens = 5;
bool skipping_wins(const Weight& w, int64_t tokens) {
  const TokenTile narrowest = token_tile(tokens, token_tile_count(tokens) - 1);
  return w.density() <= 0.75 && w.density() * kTileTokens <= static_cast<double>(narrowest.width);
}

template <class From>
void prefill(const Weight& w, BlockRange blocks, const float* packed, int64_t tokens, float* y) {
  using Source = FloatSource<Neon, From>;
  if (skipping_wins(w, tokens))
    Prefill<Source, SkipProduct<Neon>>::run_floats(w, blocks, packed, tokens, y);
  else
    Prefill<Source, DenseProduct<Neon>>::run_floats(w, blocks, packed, tokens, y);
}

void bf16_prefill(const Weight& w, BlockRange blocks, const float* packed, int64_t tokens, float* y) {
  if (w.dense())
    Prefill<FloatSource<Neon, DenseBf16<Neon>>, DenseProduct<Neon>>::run_floats(w, blocks, packed, tokens, y);
  else
    prefill<Bf16<Neon>>(w, blocks, packed, tokens, y);
}

// ---- rounding ----

void round_group(const float* x, float largest, int16_t* to, int64_t count, float* scale) {
  float32x4_t most[4];
  for (int i = 0; i < 4; ++i) most[i] = vdupq_n_f32(0);
  for (int64_t k = 0; k < count; k += 16)
    for (int i = 0; i < 4; ++i) most[i] = vmaxq_f32(most[i], vabsq_f32(vld1q_f32(x + k + 4 * i)));  // NaN if any is
  const float amax = vmaxvq_f32(vmaxq_f32(vmaxq_f32(most[0], most[1]), vmaxq_f32(most[2], most[3])));
  constexpr float kLargestFloat = 3.402823466e38f;
  const bool finite = amax <= kLargestFloat;
  const float inverse = largest / amax;
  const bool usable = finite && amax > 0 && inverse <= kLargestFloat;
  *scale = finite ? (usable ? amax / largest : 0.0f) : __builtin_nanf("");
  const float factor = usable ? inverse : 0.0f;
  for (int64_t k = 0; k < count; k += 8) {
    const int32x4_t low = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + k), factor));
    const int32x4_t high = vcvtnq_s32_f32(vmulq_n_f32(vld1q_f32(x + k + 4), factor));
    vst1q_s16(to + k, vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)));
  }
}

void round_tokens(const float* x, int64_t tokens, int64_t bits, const RoundedTokens& rounded) {
  const float largest = bits == 8 ? 127.0f : 32767.0f;
  for (int64_t token = 0; token < tokens; ++token, x += rounded.columns) {
    int16_t* to = rounded.token(token);
    float* scales = rounded.token_scales(token);
    int64_t k = 0;
    for (; k + rounded.group <= rounded.columns; k += rounded.group)
      round_group(x + k, largest, to + k, rounded.group, scales++);
    if (k < rounded.columns) {
      float last[kMaxGroup] = {};
      __builtin_memcpy(last, x + k, static_cast<size_t>(rounded.columns - k) * sizeof *x);
      round_group(last, largest, to + k, rounded.group, scales);
    }
  }
}

bool supported() { return true; }

}  // namespace

const KernelRow kNeonRow = {
    "neon",
    supported,
    {Decode<Neon>::run, prefill<Fp32<Neon>>, pack<Neon>, kPrefillMinTokens},
    {bf16_decode, bf16_prefill, pack<Neon>, kPrefillMinTokens},
    {neon_int8_decode, neon_int8_prefill, neon_pack, kIntegerPrefillMinTokens},
    {neon_int4_decode, neon_int4_prefill, neon_pack, kIntegerPrefillMinTokens},
    round_tokens,
    gate,
    Attend<Neon>::run,
};

}  // namespace losa
