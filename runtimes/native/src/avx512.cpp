// The row for AVX-512 as of Skylake-SP: fp32, and gating.
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {
namespace {

#include "losa/loops/expand.h"
#include "losa/loops/prefill.h"
#include "losa/loops/gate.h"
#include "losa/loops/attend.h"
#include "losa/loops/avx512_instructions.h"
#include "losa/loops/avx512_lanes.h"
#include "losa/loops/avx512_prefill.h"
#include "losa/loops/avx512_products.h"
#include "losa/loops/avx512_decode.h"
#include "losa/loops/avx512_floats.h"

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

}  // namespace

constexpr KernelRow kAvx512Row = {
    "avx512",
    supported,
    {FloatDecode<Fp32<Floats>>::run, prefill_sparse_floats<Fp32<Floats>>, pack<Floats>, kMaxDecodeTokens + 1},
    {},  // bf16
    {},  // int8
    {},  // int4
    nullptr,  // round
    gate,
    Attend<Floats>::run,
};

}  // namespace losa
