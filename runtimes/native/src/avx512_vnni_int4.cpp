// int4 weights with AVX-512 VNNI; see avx512_vnni.cpp.
#include <immintrin.h>

#include "losa/kernel_table.h"
#include "losa/token_tiles.h"

namespace losa {

void vnni_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
void vnni_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);

namespace {
#include "losa/loops/vnni_kernels.h"
}  // namespace

void vnni_int4_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  decode_integers<SparseInt4, DenseInt4>(w, blocks, x, tokens, y);
}

void vnni_int4_prefill(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y) {
  prefill_integers<SparseInt4, DenseInt4>(w, blocks, packed, tokens, y);
}

}  // namespace losa
