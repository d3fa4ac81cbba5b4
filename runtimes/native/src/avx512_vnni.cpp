// The row for AVX-512 as of Ice Lake and Zen 4, which expands bytes (VBMI2) and sums up their products (VNNI): int8,
// int4 and bf16.
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/numbers.h"
#include "losa/token_tiles.h"

namespace losa {

// Functions have constant addresses. A row with parts copied from elsewhere would be filled when the library is loaded,
// with AVX-512 instructions, on any processor; constexpr forbids it.
void vnni_int8_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void vnni_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void vnni_int8_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
void vnni_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);

namespace {

#include "losa/loops/expand.h"
#include "losa/loops/bf16.h"
#include "losa/loops/prefill.h"
#include "losa/loops/avx512_instructions.h"
#include "losa/loops/avx512_lanes.h"
#include "losa/loops/avx512_prefill.h"
#include "losa/loops/avx512_products.h"
#include "losa/loops/avx512_decode.h"
#include "losa/loops/avx512_floats.h"
#include "losa/loops/avx512_bf16.h"
#include "losa/loops/vnni_masks.h"
#include "losa/loops/vnni_elements.h"
#include "losa/loops/vnni_pack.h"
#include "losa/loops/vnni_round.h"

// To expand an int8 step two or three times, for 8 tokens each, takes about as long as to write it to a tile once: up to
// 16 tokens on a Zen 4, and 32 on a Zen 5. int4, whose levels are looked up, is expanded once.
constexpr int64_t kInt8PrefillTokens = 25;

bool supported() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vbmi2") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __builtin_cpu_supports("fma") && __builtin_cpu_supports("popcnt");
}

void bf16_decode(const Weight& w, BlockRange blocks, const float* x, int64_t tokens, float* y) {
  if (w.dense())
    FloatDecode<DenseBf16<BfloatPairs>>::run(w, blocks, x, tokens, y);
  else
    FloatDecode<Bf16<BfloatPairs>>::run(w, blocks, x, tokens, y);
}

void bf16_prefill(const Weight& w, BlockRange blocks, const float* packed, int64_t tokens, float* y) {
  if (w.dense())
    prefill_floats<DenseBf16<BfloatPairs>, WideProduct>(w, blocks, packed, tokens, y);
  else
    prefill_sparse_floats<Bf16<BfloatPairs>>(w, blocks, packed, tokens, y);
}

}  // namespace

constexpr KernelRow kAvx512VnniRow = {
    "avx512vnni",
    supported,
    {},  // fp32
    {bf16_decode, bf16_prefill, pack<Floats>, kMaxDecodeTokens + 1},
    {vnni_int8_decode, vnni_int8_prefill, pack_integers, kInt8PrefillTokens, arrange_integers},
    {vnni_int4_decode, vnni_int4_prefill, pack_integers, kMaxDecodeTokens + 1, arrange_integers},
    round_tokens,
    nullptr,  // gate
    nullptr,  // attend
};

}  // namespace losa
