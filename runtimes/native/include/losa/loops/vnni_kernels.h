// The kernels of int8 and int4 weights with AVX-512 VNNI, one set for each type.

#include "losa/loops/expand.h"
#include "losa/loops/prefill.h"
#include "losa/loops/avx512_instructions.h"
#include "losa/loops/avx512_lanes.h"
#include "losa/loops/avx512_prefill.h"
#include "losa/loops/avx512_products.h"
#include "losa/loops/avx512_decode.h"
#include "losa/loops/vnni_steps.h"
#include "losa/loops/vnni_elements.h"
#include "losa/loops/vnni_decode.h"
#include "losa/loops/vnni_prefill.h"

/// `Sparse` and `Dense` walk a weight of that type (vnni_steps.h).
template <class Sparse, class Dense>
struct VnniKernels {
  static void decode(const losa::Weight& w, losa::BlockRange blocks, const losa::RoundedTokens& x, int64_t tokens,
                     float* y) {
    if (w.activation_bits == 8)
      w.dense() ? IntegerDecode<Dense, Quads>::run(w, blocks, x, tokens, y)
                : IntegerDecode<Sparse, Quads>::run(w, blocks, x, tokens, y);
    else
      w.dense() ? IntegerDecode<Dense, Pairs>::run(w, blocks, x, tokens, y)
                : IntegerDecode<Sparse, Pairs>::run(w, blocks, x, tokens, y);
  }

  static void pack(const losa::Weight& w, const losa::RoundedTokens& x, int64_t tokens, int64_t tile,
                   const losa::PackedTokens& packed) {
    if (w.activation_bits == 8)
      pack_rounded<Quads>(w, x, tokens, tile, packed);
    else
      pack_rounded<Pairs>(w, x, tokens, tile, packed);
  }

  static void prefill(const losa::Weight& w, losa::BlockRange blocks, const losa::PackedTokens& packed,
                      int64_t tokens, float* y) {
    if (w.activation_bits == 8)
      prefill_with<Quads>(w, blocks, packed, tokens, y);
    else
      prefill_with<Pairs>(w, blocks, packed, tokens, y);
  }

  template <class Elements>
  static void prefill_with(const losa::Weight& w, losa::BlockRange blocks, const losa::PackedTokens& packed,
                           int64_t tokens, float* y) {
    if (w.dense())
      prefill_integers<Dense, Elements, WideProduct>(w, blocks, packed, tokens, y);
    else if (skip_cost(kept_elements<Elements>(w.density()), tokens) < Elements::kWideCost)
      prefill_integers<Sparse, Elements, SparseProduct>(w, blocks, packed, tokens, y);
    else
      prefill_integers<Sparse, Elements, WideProduct>(w, blocks, packed, tokens, y);
  }
};

// From more tokens on than decoding keeps in registers; where it pays is not measured.
template <class Sparse, class Dense>
constexpr losa::IntegerKernels kVnniKernels = {VnniKernels<Sparse, Dense>::decode, VnniKernels<Sparse, Dense>::prefill,
                                               VnniKernels<Sparse, Dense>::pack, kMaxDecodeTokens + 1};
