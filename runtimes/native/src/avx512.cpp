// Kernels for AVX-512F (Skylake-SP, Ice Lake, Zen 4 and later).
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {
namespace {

#include "losa/loops/expand.h"
#include "losa/loops/decode.h"
#include "losa/loops/prefill.h"
#include "losa/loops/gate.h"

struct Avx512 {
  static constexpr int kLanes = 16;
  static constexpr int kDecodeSums = 2;
  static constexpr int kWideTokens = 16;
  static constexpr int kNarrowTokens = 8;
  using Element = float;
  using Vector = __m512;
  using Scale = int;  // floats have none
  static Vector begin(const float* sums) { return load(sums); }
  static void finish(float* sums, Vector total, Scale, Scale) { store(sums, total); }
  static Scale scale(const float*) { return 0; }
  static Scale scales(const float*) { return 0; }
  static Vector zero() { return _mm512_setzero_ps(); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Vector load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector multiply_add(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
  static Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
  static Vector expand(const float* values, unsigned bits) {
    return _mm512_maskz_expandloadu_ps(static_cast<__mmask16>(bits), values);
  }
  static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    for (int j = 0; j < 8; ++j)
      for (int i = 0; i < 8; ++i) to[j * to_stride + i] = from[i * from_stride + j];
  }
};

bool supported() { return __builtin_cpu_supports("avx512f"); }

constexpr int64_t kPrefillMinTokens = 12;  // as measured for AVX2; the loops are the same

}  // namespace

const KernelRow kAvx512Row = {
    "avx512",
    supported,
    {Decode<Avx512>::run, Prefill<Fp32Source<Avx512>, DenseProduct<Avx512>>::run_floats, pack<Avx512>,
     kPrefillMinTokens},
    {},  // bf16
    {},  // int8
    {},  // int4
    nullptr,
    gate,
};

}  // namespace losa
