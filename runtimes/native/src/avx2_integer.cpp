// int8 and int4 weights for AVX2, with activations of 16 bits.
//
// A step of four columns has 64 positions; four vectors of 16-bit integers hold it, each with the four columns
// of four rows. vpmaddwd multiplies them by the four activations, twice repeated in each half, and sums
// neighbours up: two partial sums a row, which meet at the end of a group of columns. 16 bits cost no more
// than 8 would: AVX2 multiplies bytes only into saturating 16-bit sums, and needs a second multiplication to
// widen those.
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {

// As functions, whose addresses are known when a row is linked: a row that had to be filled at run time would be
// filled when the library is loaded, with AVX2 instructions, on any processor.
void avx2_int8_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void avx2_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void avx2_int8_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
void avx2_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
void avx2_pack(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t tile, const PackedTokens& packed);
void avx2_round(const float* x, int64_t tokens, int64_t bits, const RoundedTokens& rounded);

namespace {

/// For each 8-bit mask, which of eight packed bytes each position takes; negative means none, which is zero.
/// The packed bytes start at `base` of a 16-byte vector.
struct ExpandTable {
  alignas(64) int8_t bytes[256][8];
  constexpr explicit ExpandTable(int base) : bytes() {
    for (int bits = 0; bits < 256; ++bits) {
      int next = base;
      for (int lane = 0; lane < 8; ++lane)
        bytes[bits][lane] = static_cast<int8_t>(bits >> lane & 1 ? next++ : -128);
    }
  }
};
constexpr ExpandTable kLower(0), kUpper(8);

#include "losa/loops/expand.h"
#include "losa/loops/prefill.h"
#include "losa/loops/avx2_transpose.h"

// Values are one long stream; the processor's own prefetching stops at each page.
constexpr int64_t kPrefetchBytes = 1024;

constexpr int64_t kChunkSteps = 8;  // the masks of so many are a cache line; the smallest group has as many

/// __builtin_popcountll, without the instruction that gcc adds to break a dependency which only some
/// processors have and none waits for here.
LOSA_INLINE uint64_t bits_in(uint64_t word) {
  uint64_t count;
  asm("popcnt %1, %0" : "=r"(count) : "r"(word));
  return count;
}

LOSA_INLINE __m128i load16(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }

/// Two 8-byte halves as one vector.
LOSA_INLINE __m128i load_halves(const void* lower, const void* upper) {
  const __m128i half = _mm_loadl_epi64(static_cast<const __m128i*>(lower));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(half), static_cast<const __m64*>(upper)));
}

/// 64 positions from their mask and packed bytes, of which 8 past the last may be read; returns where the
/// packed bytes end.
LOSA_INLINE const uint8_t* expand_bytes(const uint8_t* masks, const uint8_t* packed, __m256i (&weights)[4]) {
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const uint64_t lower = masks[2 * part], upper = masks[2 * part + 1];
    const uint8_t* middle = packed + bits_in(lower);
    const __m128i lanes = load_halves(kLower.bytes[lower], kUpper.bytes[upper]);
    weights[part] = _mm256_cvtepi8_epi16(_mm_shuffle_epi8(load_halves(packed, middle), lanes));
    packed = middle + bits_in(upper);
  }
  return packed;
}

/// The levels of 32 codes, two to a byte, the low half first.
LOSA_INLINE __m256i levels_of(const uint8_t* codes, __m256i codebook) {
  const __m256i words = _mm256_cvtepu8_epi16(load16(codes));
  const __m256i halves = _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
  return _mm256_shuffle_epi8(codebook, halves);
}

LOSA_INLINE __m256i codebook_of(const Weight& w) { return _mm256_broadcastsi128_si256(load16(w.codebook)); }

LOSA_INLINE void widen(__m256i bytes, __m256i* weights) {
  weights[0] = _mm256_cvtepi8_epi16(_mm256_castsi256_si128(bytes));
  weights[1] = _mm256_cvtepi8_epi16(_mm256_extracti128_si256(bytes, 1));
}

// Steps of a block, one after the other, as 16-bit integers: one class for each way they are stored. Before
// every kChunkSteps of them, and the fewer last ones, chunk() is called.

struct SparseInt8 {
  const uint8_t *masks, *values;

  LOSA_INLINE void start(const Weight& w, int64_t block) {
    masks = w.block_masks(block);
    values = w.block_values(block);
  }
  LOSA_INLINE void chunk() { __builtin_prefetch(masks + kPrefetchBytes); }
  LOSA_INLINE void next(__m256i (&weights)[4]) {
    __builtin_prefetch(values + kPrefetchBytes);
    values = expand_bytes(masks, values, weights);
    masks += 8;
  }
};

/// Codes become levels a chunk ahead: a level that has just been stored cannot be loaded at another offset
/// without waiting for the store to reach the cache.
struct SparseInt4 {
  const uint8_t *masks, *values;
  int64_t steps_ahead;  // of which no code is a level yet
  const uint8_t* codes_masks;
  __m256i codebook;
  bool crowded;  // steps often have more than 32 codes
  const uint8_t* levels;
  int half;  // of `buffer` that the next chunk is read from
  alignas(64) uint8_t buffer[2][kChunkSteps][64];
  uint8_t padding[8];

  LOSA_INLINE void start(const Weight& w, int64_t block) {
    masks = codes_masks = w.block_masks(block);
    values = w.block_values(block);
    steps_ahead = w.steps();
    codebook = codebook_of(w);
    crowded = w.density() > 0.35;
    half = 0;
    unpack(0);
  }
  LOSA_INLINE void chunk() {
    __builtin_prefetch(codes_masks + kPrefetchBytes);
    unpack(1 - half);
    levels = buffer[half][0];
    half = 1 - half;
  }
  LOSA_INLINE void next(__m256i (&weights)[4]) {
    expand_bytes(masks, levels, weights);
    masks += 8;
    levels += 64;
  }

 private:
  LOSA_INLINE void unpack(int to) {
    const int64_t count = steps_ahead < kChunkSteps ? steps_ahead : kChunkSteps;
    steps_ahead -= count;
    for (int64_t step = 0; step < count; ++step, codes_masks += 8) {
      __builtin_prefetch(values + kPrefetchBytes);
      __m256i* place = reinterpret_cast<__m256i*>(buffer[to][step]);
      uint64_t kept;
      __builtin_memcpy(&kept, codes_masks, sizeof kept);
      const uint64_t codes = bits_in(kept);
      _mm256_store_si256(place, levels_of(values, codebook));
      if (crowded || codes > 32) _mm256_store_si256(place + 1, levels_of(values + 16, codebook));
      values += (codes + 1) / 2;
    }
  }
};

struct DenseInt8 {
  const uint8_t* values;

  LOSA_INLINE void start(const Weight& w, int64_t block) { values = w.block_values(block); }
  LOSA_INLINE void chunk() {}
  LOSA_INLINE void next(__m256i (&weights)[4]) {
    __builtin_prefetch(values + kPrefetchBytes);
    for (int part = 0; part < 4; ++part) weights[part] = _mm256_cvtepi8_epi16(load16(values + 16 * part));
    values += 64;
  }
};

struct DenseInt4 {
  const uint8_t* values;
  __m256i codebook;

  LOSA_INLINE void start(const Weight& w, int64_t block) {
    values = w.block_values(block);
    codebook = codebook_of(w);
  }
  LOSA_INLINE void chunk() {}
  LOSA_INLINE void next(__m256i (&weights)[4]) {
    __builtin_prefetch(values + kPrefetchBytes);
    widen(levels_of(values, codebook), weights);
    widen(levels_of(values + 16, codebook), weights + 2);
    values += 32;
  }
};

LOSA_INLINE __m256 half_floats(const uint16_t* from) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}

/// Rows 0..7 and 8..15 of four vectors with two partial sums a row.
LOSA_INLINE void add_neighbours(const __m256i (&sums)[4], __m256i (&rows)[2]) {
  for (int half = 0; half < 2; ++half)
    rows[half] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[2 * half], sums[2 * half + 1]), 0xd8);
}

template <int Tokens, class Steps>
void decode_block(const Weight& w, int64_t block, const RoundedTokens& x, float* y) {
  Steps steps;
  steps.start(w, block);
  const uint16_t* scales = w.block_scales(block);
  const int64_t stride = x.padded_columns();
  __m256 results[Tokens][2];
  for (int t = 0; t < Tokens; ++t) results[t][0] = results[t][1] = _mm256_setzero_ps();
  for (int64_t group = 0, first = 0; first < w.columns; ++group, first += w.group, scales += kBlockRows) {
    const int64_t left = w.columns - first;
    const int64_t columns = left < w.group ? left : w.group;
    const int16_t* activations = x.values + first;
    __m256i sums[Tokens][4];
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < 4; ++part) sums[t][part] = _mm256_setzero_si256();
    for (int64_t k = 0; k < columns;) {
      const int64_t end = k + 4 * kChunkSteps < columns ? k + 4 * kChunkSteps : columns;
      steps.chunk();
      for (; k < end; k += 4) {
        __m256i weights[4];
        steps.next(weights);
#pragma GCC unroll 4
        for (int t = 0; t < Tokens; ++t) {
          int64_t four;
          __builtin_memcpy(&four, activations + t * stride + k, sizeof four);
          const __m256i activation = _mm256_set1_epi64x(four);
#pragma GCC unroll 4
          for (int part = 0; part < 4; ++part)
            sums[t][part] = _mm256_add_epi32(sums[t][part], _mm256_madd_epi16(weights[part], activation));
        }
      }
    }
    const __m256 weight_scales[2] = {half_floats(scales), half_floats(scales + 8)};
    for (int t = 0; t < Tokens; ++t) {
      __m256i rows[2];
      add_neighbours(sums[t], rows);
      const __m256 scale = _mm256_set1_ps(x.token_scales(t)[group]);
      for (int half = 0; half < 2; ++half)
        results[t][half] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(rows[half]),
                                           _mm256_mul_ps(weight_scales[half], scale), results[t][half]);
    }
  }
  const int64_t first_row = block * kBlockRows;
  for (int t = 0; t < Tokens; ++t) {
    float rows[kBlockRows];
    for (int half = 0; half < 2; ++half) _mm256_storeu_ps(rows + 8 * half, results[t][half]);
    copy_rows(rows, w.rows - first_row, y + t * w.rows + first_row);
  }
}

template <class Steps>
void decode_with(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  constexpr int64_t kMaxTokens = 3;  // their sums, four vectors each, and a step's weights fill the registers
  const int64_t groups = (tokens + kMaxTokens - 1) / kMaxTokens;
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    int64_t token = 0;
    for (int64_t group = groups; group > 0; --group) {
      const int64_t count = (tokens - token + group - 1) / group;  // 4 tokens as 2 + 2, not 3 + 1
      const RoundedTokens from = x.from(token);
      float* to = y + token * w.rows;
      switch (count) {
        case 1: decode_block<1, Steps>(w, block, from, to); break;
        case 2: decode_block<2, Steps>(w, block, from, to); break;
        default: decode_block<3, Steps>(w, block, from, to); break;
      }
      token += count;
    }
  }
}

// ---- prefill ----

/// Pairs of 16-bit integers, as prefill.h wants them.
struct Pairs {
  static constexpr int kLanes = 8;
  static constexpr int kWideTokens = 6;
  static constexpr int kNarrowTokens = 4;
  using Element = int32_t;
  using Vector = __m256i;
  using Scale = __m256;

  static Vector load(const int32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Vector broadcast(const int32_t* p) {
    return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(p)));
  }
  /// a b + c. As intrinsics, gcc 12 gives each sum a new register at each step, and runs out of them.
  static Vector multiply_add(Vector a, Vector b, Vector c) {
    Vector product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(c), "=&x"(product) : "x"(a), "xm"(b));
    return c;
  }
  static Vector begin(const float*) { return _mm256_setzero_si256(); }
  static Scale scale(const float* p) { return _mm256_broadcast_ss(p); }
  static Scale scales(const float* p) { return _mm256_loadu_ps(p); }
  static void finish(float* sums, Vector total, Scale a, Scale b) {
    const __m256 so_far = _mm256_loadu_ps(sums);
    _mm256_storeu_ps(sums, _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_mul_ps(a, b), so_far));
  }
  static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    transpose8_to(from, from_stride, to, [=](int64_t j) { return j * to_stride; });
  }
};

/// Which pairs of a tile are kept at all: bit u of rows[r] for pair u of `steps` steps, first the first pair of
/// every step, then the second.
void pair_masks(const uint8_t* masks, int64_t steps, uint64_t (&rows)[kBlockRows]) {
  alignas(32) uint8_t padded[8 * 32] = {};
  __builtin_memcpy(padded, masks, static_cast<size_t>(8 * steps));
  // A byte has rows 2 i and 2 i + 1, four columns each. Of each pair u: the eight even rows, and the odd ones.
  alignas(32) uint8_t even[2 * 32 + 4] = {}, odd[2 * 32 + 4] = {};
  for (int pair = 0; pair < 2; ++pair) {
    for (int64_t step = 0; step < steps; step += 4) {
      const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(padded + 8 * step));
      const __m256i either = _mm256_or_si256(bytes, _mm256_srli_epi16(bytes, 1));  // of a pair, in its low bit
      const uint32_t of_even =
          static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(either, 7 - 2 * pair)));
      const uint32_t of_odd =
          static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_slli_epi16(either, 3 - 2 * pair)));
      __builtin_memcpy(even + pair * steps + step, &of_even, sizeof of_even);
      __builtin_memcpy(odd + pair * steps + step, &of_odd, sizeof of_odd);
    }
  }
  for (int half = 0; half < 2; ++half) {  // of the 64 pairs
    __m256i of_even = _mm256_load_si256(reinterpret_cast<const __m256i*>(even + 32 * half));
    __m256i of_odd = _mm256_load_si256(reinterpret_cast<const __m256i*>(odd + 32 * half));
    for (int row = 7; row >= 0; --row) {
      const uint32_t tops[2] = {static_cast<uint32_t>(_mm256_movemask_epi8(of_even)),
                                static_cast<uint32_t>(_mm256_movemask_epi8(of_odd))};
      for (int parity = 0; parity < 2; ++parity)
        __builtin_memcpy(reinterpret_cast<char*>(&rows[2 * row + parity]) + 4 * half, &tops[parity], 4);
      of_even = _mm256_add_epi8(of_even, of_even);
      of_odd = _mm256_add_epi8(of_odd, of_odd);
    }
  }
}

/// Expands group after group. An element is a pair of columns: those of first pairs of all steps, then the
/// second pairs, so that no shuffle within a vector is left to do.
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

  template <bool RowMasks>
  void expand(int64_t elements, WeightTile<int32_t>* tile) {
    const int64_t steps = elements / 2;
    int32_t *first = tile->weights, *second = first + steps * kBlockRows;
    for (int64_t step = 0; step < steps; ++step, first += kBlockRows, second += kBlockRows) {
      if (step % kChunkSteps == 0) steps_.chunk();
      __m256i weights[4];
      steps_.next(weights);
      for (int half = 0; half < 2; ++half) {
        const __m256 a = _mm256_castsi256_ps(weights[2 * half]), b = _mm256_castsi256_ps(weights[2 * half + 1]);
        store(first + 8 * half, _mm256_shuffle_ps(a, b, 0x88));
        store(second + 8 * half, _mm256_shuffle_ps(a, b, 0xdd));
      }
    }
    for (int half = 0; half < 2; ++half) _mm256_store_ps(tile->scales + 8 * half, half_floats(scales_ + 8 * half));
    scales_ += kBlockRows;
    if constexpr (RowMasks) {
      pair_masks(masks_, steps, tile->kept);
      masks_ += 8 * steps;
    }
  }

 private:
  /// Rows 0, 1, 4, 5, 2, 3, 6, 7 in order.
  LOSA_INLINE static void store(int32_t* to, __m256 rows) {
    const __m256i in_order = _mm256_permute4x64_epi64(_mm256_castps_si256(rows), 0xd8);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), in_order);
  }

  Steps steps_;
  const uint16_t* scales_;
  const uint8_t* masks_;
};

/// Tile of tokens `index`: for each group its pairs in the order of PairSource, [pair][token]; and the scales.
void pack_pairs(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t index, const PackedTokens& packed) {
  const TokenTile tile = token_tile(tokens, index);
  const int64_t stride = x.padded_columns();
  int32_t* to = static_cast<int32_t*>(packed.values) + tile.first * 2 * w.steps();
  float* scales = packed.scales + tile.first * x.groups();
  for (int64_t group = 0; group < x.groups(); ++group, scales += tile.width) {
    const int64_t first = group * x.group, left = w.columns - first;
    const int64_t steps = ((left < x.group ? left : x.group) + 3) / 4;
    for (int64_t t = 0; t < tile.width; ++t)
      scales[t] = t < tile.tokens ? x.token_scales(tile.first + t)[group] : 0.0f;
    for (int64_t t = 0; t < tile.width; t += 8) {
      const int16_t* from = x.token(tile.first + t) + first;
      int64_t step = 0;
      if (t + 8 <= tile.tokens) {
        for (; step + 4 <= steps; step += 4)
          transpose8_to(reinterpret_cast<const float*>(from + 4 * step), stride / 2,
                        reinterpret_cast<float*>(to + step * tile.width + t),
                        [&](int64_t j) { return (j % 2 * steps + j / 2) * tile.width; });
      }
      for (; step < steps; ++step) {
        for (int64_t i = t; i < t + 8; ++i) {
          int32_t pairs[2] = {};
          if (i < tile.tokens) __builtin_memcpy(pairs, from + (i - t) * stride + 4 * step, sizeof pairs);
          to[step * tile.width + i] = pairs[0];
          to[(steps + step) * tile.width + i] = pairs[1];
        }
      }
    }
    to += 2 * steps * tile.width;
  }
}

bool skipping_wins(double density, int64_t width) {
  const double kept_pairs = 1.0 - (1.0 - density) * (1.0 - density);
  return kept_pairs <= 0.8 && kept_pairs * kTileTokens <= static_cast<double>(width);
}

template <class Sparse, class Dense>
void decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  if (w.dense())
    decode_with<Dense>(w, blocks, x, tokens, y);
  else
    decode_with<Sparse>(w, blocks, x, tokens, y);
}

template <class Sparse, class Dense>
void prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  const int32_t* values = static_cast<const int32_t*>(packed.values);
  const TokenTile narrowest = token_tile(tokens, token_tile_count(tokens) - 1);
  if (w.dense())
    Prefill<PairSource<Dense>, DenseProduct<Pairs>>::run(w, blocks, values, packed.scales, tokens, y);
  else if (skipping_wins(w.density(), narrowest.width))
    Prefill<PairSource<Sparse>, SkipProduct<Pairs>>::run(w, blocks, values, packed.scales, tokens, y);
  else
    Prefill<PairSource<Sparse>, DenseProduct<Pairs>>::run(w, blocks, values, packed.scales, tokens, y);
}

// ---- rounding ----

/// A group of `columns` activations, a multiple of 16, to `to`; returns its scale.
float round_group(const float* x, int64_t columns, float largest, int16_t* to) {
  // As integers, the bits of magnitudes are in the order of their values; infinities and NaN come last.
  const __m256i magnitude_bits = _mm256_set1_epi32(0x7fffffff);
  __m256i tops = _mm256_setzero_si256();
  for (int64_t k = 0; k < columns; k += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + k));
    tops = _mm256_max_epi32(tops, _mm256_and_si256(bits, magnitude_bits));
  }
  __m128i top = _mm_max_epi32(_mm256_castsi256_si128(tops), _mm256_extracti128_si256(tops, 1));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0x4e));
  top = _mm_max_epi32(top, _mm_shuffle_epi32(top, 0xb1));
  const float amax = _mm_cvtss_f32(_mm_castsi128_ps(top));
  const bool finite = _mm_cvtsi128_si32(top) < 0x7f800000;
  const float inverse = largest / amax;
  // So small an amax that its inverse overflows is no information: it counts as zero.
  const bool usable = finite && amax > 0 && inverse <= 3.402823466e38f;
  if (!usable) {
    __builtin_memset(to, 0, static_cast<size_t>(2 * columns));
    return finite ? 0.0f : __builtin_nanf("");
  }
  const __m256 factor = _mm256_set1_ps(inverse);
  for (int64_t k = 0; k < columns; k += 16) {
    const __m256i lower = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k), factor));
    const __m256i upper = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + k + 8), factor));
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(lower, upper), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + k), both);
  }
  return amax / largest;
}

}  // namespace

void avx2_round(const float* x, int64_t tokens, int64_t bits, const RoundedTokens& rounded) {
  const float largest = bits == 8 ? 127.0f : 32767.0f;
  for (int64_t token = 0; token < tokens; ++token, x += rounded.columns) {
    for (int64_t group = 0; group < rounded.groups(); ++group) {
      const int64_t first = group * rounded.group, left = rounded.columns - first;
      const float* from = x + first;
      float padded[kMaxGroup];
      if (left < rounded.group) {
        __builtin_memset(padded, 0, sizeof padded);
        __builtin_memcpy(padded, from, static_cast<size_t>(left) * sizeof *from);
        from = padded;
      }
      rounded.token_scales(token)[group] = round_group(from, rounded.group, largest, rounded.token(token) + first);
    }
  }
}

void avx2_int8_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  decode<SparseInt8, DenseInt8>(w, blocks, x, tokens, y);
}
void avx2_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  decode<SparseInt4, DenseInt4>(w, blocks, x, tokens, y);
}
void avx2_int8_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  prefill<SparseInt8, DenseInt8>(w, blocks, packed, tokens, y);
}
void avx2_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  prefill<SparseInt4, DenseInt4>(w, blocks, packed, tokens, y);
}
void avx2_pack(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t tile, const PackedTokens& packed) {
  pack_pairs(w, x, tokens, tile, packed);
}

}  // namespace losa
