// The kernels of int8 and int4 weights with AVX-512 VNNI.

#include "losa/loops/expand.h"
#include "losa/loops/prefill.h"
#include "losa/loops/avx512_instructions.h"
#include "losa/loops/avx512_lanes.h"
#include "losa/loops/avx512_prefill.h"
#include "losa/loops/avx512_products.h"
#include "losa/loops/avx512_decode.h"
#include "losa/loops/vnni_masks.h"
#include "losa/loops/vnni_steps.h"
#include "losa/loops/vnni_elements.h"
#include "losa/loops/vnni_decode.h"
#include "losa/loops/vnni_prefill.h"

// `Sparse` and `Dense` walk a weight of the type (vnni_steps.h).

/// Activations were arranged by arrange_integers (vnni_pack.h), which chooses alike.
template <class Steps>
static void decode_steps(const losa::Weight& w, losa::BlockRange blocks, const losa::RoundedTokens& x, int64_t tokens,
                         float* y) {
  if (w.activation_bits == 8)
    IntegerDecode<Steps, Quads>::run(w, blocks, x, tokens, y);
  else if (tokens == 1)
    IntegerDecode<Steps, SplitQuads>::run_one(w, blocks, x, y);
  else
    IntegerDecode<Steps, Pairs>::run(w, blocks, x, tokens, y);
}

template <template <bool> class Sparse, class Dense>
static void decode_integers(const losa::Weight& w, losa::BlockRange blocks, const losa::RoundedTokens& x,
                            int64_t tokens, float* y) {
  if (w.dense())
    decode_steps<Dense>(w, blocks, x, tokens, y);
  else if (narrow(w))
    decode_steps<Sparse<true>>(w, blocks, x, tokens, y);
  else
    decode_steps<Sparse<false>>(w, blocks, x, tokens, y);
}

template <class Sparse, class Dense, class Elements>
static void prefill_elements(const losa::Weight& w, losa::BlockRange blocks, const losa::PackedTokens& packed,
                             int64_t tokens, float* y) {
  if (w.dense())
    prefill_with<Dense, Elements, WideProduct>(w, blocks, packed, tokens, y);
  else if (skipping_pays(Elements::kCosts, kept_elements<Elements>(w.density()), tokens))
    prefill_with<Sparse, Elements, SparseProduct>(w, blocks, packed, tokens, y);
  else
    prefill_with<Sparse, Elements, WideProduct>(w, blocks, packed, tokens, y);
}

/// Many tokens share a step, so that it hardly matters how wide it is loaded.
template <template <bool> class Sparse, class Dense>
static void prefill_integers(const losa::Weight& w, losa::BlockRange blocks, const losa::PackedTokens& packed,
                             int64_t tokens, float* y) {
  if (w.activation_bits == 8)
    prefill_elements<Sparse<false>, Dense, Quads>(w, blocks, packed, tokens, y);
  else
    prefill_elements<Sparse<false>, Dense, Pairs>(w, blocks, packed, tokens, y);
}
