// Kernels for AVX2 with FMA (Haswell, Zen and later).
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {

// avx2_integer.cpp
// As functions, whose addresses are known when a row is linked: a row that had to be filled at run time would be
// filled when the library is loaded, with AVX2 instructions, on any processor.
void avx2_int8_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void avx2_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void avx2_int8_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
void avx2_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
void avx2_pack(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t tile, const PackedTokens& packed);
void avx2_round(const float* x, int64_t tokens, int64_t bits, const RoundedTokens& rounded);

namespace {

/// For each 8-bit mask, which of the packed values each lane takes; negative means none.
struct ExpandTable {
  alignas(64) int8_t lanes[256][8];
  constexpr ExpandTable() : lanes() {
    for (int bits = 0; bits < 256; ++bits) {
      int8_t next = 0;
      for (int lane = 0; lane < 8; ++lane) lanes[bits][lane] = bits >> lane & 1 ? next++ : int8_t{-128};
    }
  }
};
constexpr ExpandTable kExpand;

/// The same for pairs of bytes.
struct ExpandPairsTable {
  alignas(64) int8_t bytes[256][16];
  constexpr ExpandPairsTable() : bytes() {
    for (int bits = 0; bits < 256; ++bits) {
      for (int lane = 0, next = 0; lane < 8; ++lane) {
        const bool kept = (bits >> lane & 1) != 0;
        for (int i = 0; i < 2; ++i) bytes[bits][2 * lane + i] = static_cast<int8_t>(kept ? next++ : -128);
      }
    }
  }
};
constexpr ExpandPairsTable kExpandPairs;

#include "losa/loops/expand.h"
#include "losa/loops/bf16.h"
#include "losa/loops/decode.h"
#include "losa/loops/prefill.h"
#include "losa/loops/gate.h"
#include "losa/loops/attend.h"
#include "losa/loops/avx2_transpose.h"

struct Avx2 {
  static constexpr int kLanes = 8;
  static constexpr int kDecodeSums = 1;  // a column takes two expansions, longer than a multiply-add's latency
  static constexpr int kWideTokens = 6;
  static constexpr int kNarrowTokens = 4;
  using Element = float;
  using Vector = __m256;
  using Scale = int;  // floats have none

  static Vector begin(const float* sums) { return load(sums); }
  static void finish(float* sums, Vector total, Scale, Scale) { store(sums, total); }
  static Scale scale(const float*) { return 0; }
  static Scale scales(const float*) { return 0; }
  static Vector zero() { return _mm256_setzero_ps(); }
  static Vector broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Vector load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm256_storeu_ps(p, v); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }

  static Vector expand(const float* values, unsigned bits) {
    const __m256i lanes =
        _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kExpand.lanes[bits])));
    Vector packed = _mm256_loadu_ps(values);
    // Keeps the load apart: the permutation takes 2 cycles with an operand in memory, 1.3 without (Zen 3).
    asm("" : "+x"(packed));
    const Vector spread = _mm256_permutevar8x32_ps(packed, lanes);
    // By the sign of `lanes`. gcc makes two instructions of the intrinsic when one side is zero.
    Vector result;
    asm("vblendvps %1, %2, %3, %0" : "=x"(result) : "x"(lanes), "x"(_mm256_setzero_ps()), "x"(spread));
    return result;
  }

  using Pairs = __m256i;

  static Pairs load_pairs(const uint16_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Pairs expand_pairs(const Word<Avx2, uint16_t>& word, int bit) {
    return _mm256_set_m128i(expand_four_pairs(word, bit + 8), expand_four_pairs(word, bit));
  }
  static __m128i expand_four_pairs(const Word<Avx2, uint16_t>& word, int bit) {
    // Counted byte by byte, since each byte is at hand for the table: this saves a tenth of the time.
    const uint16_t* values = word.values;
#pragma GCC unroll 8
    for (int before = 0; before < bit; before += 8)
      values += __builtin_popcountll(table_offset(word.kept.bits, before));
    const __m128i packed = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
    const int8_t* bytes = kExpandPairs.bytes[0] + table_offset(word.kept.bits, bit);
    return _mm_shuffle_epi8(packed, _mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  /// Eight bits of a mask, from `bit` on, times the 16 bytes that the table has for each value of them. To rotate
  /// takes one instruction where a shift takes two, and to read the byte from memory would keep a load unit busy.
  static uint64_t table_offset(uint64_t kept, int bit) {
    const int by = (bit + 60) % 64;
    return (kept >> by | kept << (64 - by)) & 0xff0;
  }
  static Vector first(Pairs pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
  static Vector second(Pairs pairs) {
    return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-0x10000)));
  }

  static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    losa::transpose8(from, from_stride, to, to_stride);
  }

  static void row_masks(const uint8_t* masks, uint64_t (&rows)[kBlockRows]) {
    const __m256i even_then_odd = _mm256_setr_epi8(0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15,  //
                                                   0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15);
    for (int part = 0; part < 4; ++part) {
      __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + 32 * part));
      // 16 columns: the bytes of rows 0..7 first, then those of rows 8..15.
      bytes = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(bytes, even_then_odd), 0xd8);
      for (int row = 7; row >= 0; --row) {
        const uint32_t tops = static_cast<uint32_t>(_mm256_movemask_epi8(bytes));
        const uint16_t low = static_cast<uint16_t>(tops), high = static_cast<uint16_t>(tops >> 16);
        __builtin_memcpy(reinterpret_cast<char*>(&rows[row]) + 2 * part, &low, sizeof low);
        __builtin_memcpy(reinterpret_cast<char*>(&rows[row + 8]) + 2 * part, &high, sizeof high);
        bytes = _mm256_add_epi8(bytes, bytes);
      }
    }
  }

  /// The same from the masks of pairs.
  static void pair_row_masks(const uint8_t* masks, uint64_t (&rows)[kBlockRows]) {
    const __m256i by_byte = _mm256_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15,  //
                                             0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    const __m256i halves_together = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    for (int part = 0; part < 4; ++part) {
      __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(masks + 32 * part));
      // 8 steps: their bytes of rows 0..3 first, then those of rows 4..7, and so on.
      bytes = _mm256_permutevar8x32_epi32(_mm256_shuffle_epi8(bytes, by_byte), halves_together);
      // Each byte twice, first with the first column's bits moved to where the second's are.
      const __m256i moved = _mm256_add_epi8(bytes, bytes);
      __m256i columns[2] = {_mm256_unpacklo_epi8(moved, bytes), _mm256_unpackhi_epi8(moved, bytes)};
      for (int row = 3; row >= 0; --row) {
        for (int half = 0; half < 2; ++half) {
          const uint32_t tops = static_cast<uint32_t>(_mm256_movemask_epi8(columns[half]));
          const uint16_t low = static_cast<uint16_t>(tops), high = static_cast<uint16_t>(tops >> 16);
          __builtin_memcpy(reinterpret_cast<char*>(&rows[4 * half + row]) + 2 * part, &low, sizeof low);
          __builtin_memcpy(reinterpret_cast<char*>(&rows[4 * half + row + 8]) + 2 * part, &high, sizeof high);
          columns[half] = _mm256_slli_epi16(columns[half], 2);
        }
      }
    }
  }
};

/// All that CMakeLists.txt compiles these files with. It runs before that is known, so without them itself.
__attribute__((target("no-avx,no-bmi,no-bmi2"))) bool supported() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
}

// GFLOP/s (dense-equivalent) of one 3.1 GHz Zen 3 core, fp32, 576 x 576, by tokens and density of the weight; the
// core's peak is 100, and a dense matrix product of ONNX Runtime 1.32 reaches 86 to 91 at 128 tokens:
//
//   tokens                      8    12    16    24    32    40    64   128
//   expanding for each 6       45    47    47    47    47    47    47    46
//   dense tile, any density    55    64    70    75    77    79    81    80
//   skipping, density 1.0      13    18    25    34    48    55    68    64
//   skipping, density 0.7      16    20    26    42    63    72    89    90
//   skipping, density 0.5      20    25    33    54    81    91   116   114
//   skipping, density 0.3      28    36    48    76   110   123   150   157
//
// bf16 has the same figures but for the first row, 55 (60 where tokens are a multiple of 5): values are half as long
// and expanded two columns at once. 4096 columns out of memory leave the order of the rows as it is.
constexpr int64_t kFp32PrefillTokens = 8;
constexpr int64_t kBf16PrefillTokens = 10;
constexpr int64_t kIntegerPrefillTokens = 7;  // avx2_integer.cpp has their figures

/// Below eight vectors of tokens the latency of a multiply-add shows, and a weight must be sparser for
/// skipping to win.
bool skipping_wins(double density, int64_t width) {
  return density <= 0.75 && density * kTileTokens <= static_cast<double>(width);
}

template <class From>
void prefill(const Weight& w, BlockRange blocks, const float* packed, int64_t tokens, float* y) {
  using Source = FloatSource<Avx2, From>;
  const TokenTile narrowest = token_tile(tokens, token_tile_count(tokens) - 1);
  if (skipping_wins(w.density(), narrowest.width))
    Prefill<Source, SkipProduct<Avx2>>::run_floats(w, blocks, packed, tokens, y);
  else
    Prefill<Source, DenseProduct<Avx2>>::run_floats(w, blocks, packed, tokens, y);
}

void bf16_decode(const Weight& w, BlockRange blocks, const float* x, int64_t tokens, float* y) {
  if (w.dense())
    Decode<Avx2, DenseBf16<Avx2>>::run(w, blocks, x, tokens, y);
  else
    Decode<Avx2, Bf16<Avx2>>::run(w, blocks, x, tokens, y);
}

void bf16_prefill(const Weight& w, BlockRange blocks, const float* packed, int64_t tokens, float* y) {
  if (w.dense())
    Prefill<FloatSource<Avx2, DenseBf16<Avx2>>, DenseProduct<Avx2>>::run_floats(w, blocks, packed, tokens, y);
  else
    prefill<Bf16<Avx2>>(w, blocks, packed, tokens, y);
}

}  // namespace

const KernelRow kAvx2Row = {
    "avx2",
    supported,
    {Decode<Avx2>::run, prefill<Fp32<Avx2>>, pack<Avx2>, kFp32PrefillTokens},
    {bf16_decode, bf16_prefill, pack<Avx2>, kBf16PrefillTokens},
    {avx2_int8_decode, avx2_int8_prefill, avx2_pack, kIntegerPrefillTokens},
    {avx2_int4_decode, avx2_int4_prefill, avx2_pack, kIntegerPrefillTokens},
    avx2_round,
    gate,
    Attend<Avx2>::run,
};

}  // namespace losa
