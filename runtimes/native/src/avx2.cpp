// Kernels for AVX2 with FMA (Haswell, Zen and later).
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {

// avx2_integer.cpp
extern const IntegerKernels kAvx2Int8, kAvx2Int4;
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

#include "losa/loops/expand.h"
#include "losa/loops/decode.h"
#include "losa/loops/prefill.h"
#include "losa/loops/gate.h"

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

  static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    Vector rows[8];  // of 4 x 4 corners: left ones of input rows i and i + 4, then right ones
    for (int i = 0; i < 4; ++i) {
      const float* upper = from + i * from_stride;
      const float* lower = upper + 4 * from_stride;
      rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper)), _mm_loadu_ps(lower), 1);
      rows[i + 4] =
          _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper + 4)), _mm_loadu_ps(lower + 4), 1);
    }
    for (int half = 0; half < 8; half += 4, to += 4 * to_stride) {
      const Vector* r = rows + half;
      const Vector low01 = _mm256_unpacklo_ps(r[0], r[1]), high01 = _mm256_unpackhi_ps(r[0], r[1]);
      const Vector low23 = _mm256_unpacklo_ps(r[2], r[3]), high23 = _mm256_unpackhi_ps(r[2], r[3]);
      _mm256_storeu_ps(to, _mm256_shuffle_ps(low01, low23, 0x44));
      _mm256_storeu_ps(to + to_stride, _mm256_shuffle_ps(low01, low23, 0xee));
      _mm256_storeu_ps(to + 2 * to_stride, _mm256_shuffle_ps(high01, high23, 0x44));
      _mm256_storeu_ps(to + 3 * to_stride, _mm256_shuffle_ps(high01, high23, 0xee));
    }
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
};

bool supported() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

// GFLOP/s (dense-equivalent) of one 3.2 GHz Zen 3 core, 576 x 576, by tokens and density of the weight; the
// core's peak is 103, and a dense matrix product of ONNX Runtime 1.32 reaches 86 to 91 at 128 tokens:
//
//   tokens                     12    16    24    32    40    64   128
//   expanding for each 6       49    49    49    49    49    49    49
//   dense tile, any density    53    71    77    79    80    83    83
//   skipping, density 1.0      19    26    36    49    56    71    73
//   skipping, density 0.7      21    27    42    64    66    88    94
//   skipping, density 0.5      26    35    53    80    91   112   127
//   skipping, density 0.3      38    51    75   109   125   157   186
constexpr int64_t kPrefillMinTokens = 12;

/// Below eight vectors of tokens the latency of a multiply-add shows, and a weight must be sparser for
/// skipping to win.
bool skipping_wins(double density, int64_t width) {
  return density <= 0.75 && density * kTileTokens <= static_cast<double>(width);
}

void fp32_prefill(const Weight& w, BlockRange blocks, const float* packed, int64_t tokens, float* y) {
  const TokenTile narrowest = token_tile(tokens, token_tile_count(tokens) - 1);
  if (skipping_wins(w.density(), narrowest.width))
    Prefill<Fp32Source<Avx2>, SkipProduct<Avx2>>::run_floats(w, blocks, packed, tokens, y);
  else
    Prefill<Fp32Source<Avx2>, DenseProduct<Avx2>>::run_floats(w, blocks, packed, tokens, y);
}

}  // namespace

const KernelRow kAvx2Row = {
    "avx2",
    supported,
    {Decode<Avx2>::run, fp32_prefill, pack<Avx2>, kPrefillMinTokens},
    {},  // bf16
    kAvx2Int8,
    kAvx2Int4,
    avx2_round,
    gate,
};

}  // namespace losa
