// int8 and int4 weights for many tokens: tiles of a group of columns (avx512_prefill.h).

/// A block's weights, group after group, as elements in the order of steps.
template <class Steps, class Elements>
class IntegerSource {
 public:
  using Element = int32_t;
  static int64_t elements(const losa::Weight& w) { return w.steps() * Elements::kOfStep; }
  static int64_t tile_elements(const losa::Weight& w) { return w.group / 4 * Elements::kOfStep; }

  void start(const losa::Weight& w, int64_t block) {
    steps_.start(w, block);
    scales_ = w.block_scales(block);
  }

  template <bool RowMasks>
  void expand(int64_t elements, WeightTile<int32_t>* tile) {
    __m512i excess = _mm512_setzero_si512();
    Steps steps = steps_;  // whose pointers stay in registers: a store to the tile might change the members
    for (int64_t e = 0; e < elements; e += Elements::kOfStep) {
      steps.prefetch();
      Elements::widen(steps.next(), tile->weights + e * losa::kBlockRows, excess);
    }
    steps_ = steps;
    Elements::set_starts(tile, excess);
    _mm512_store_ps(tile->scales, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales_))));
    scales_ += losa::kBlockRows;
    if constexpr (RowMasks) mark_kept(elements, tile);
  }

 private:
  /// Kept is what is not zero.
  static void mark_kept(int64_t elements, WeightTile<int32_t>* tile) {
    uint16_t masks[64] = {};
    for (int64_t e = 0; e < elements; ++e) {
      const __m512i rows = _mm512_load_si512(tile->weights + e * losa::kBlockRows);
      masks[e] = _mm512_test_epi32_mask(rows, rows);
    }
    transpose_masks(masks, tile->kept);
  }

  Steps steps_;
  const uint16_t* scales_;
};

template <class Steps, class Elements, template <class> class Product>
static void prefill_with(const losa::Weight& w, losa::BlockRange blocks, const losa::PackedTokens& packed,
                         int64_t tokens, float* y) {
  PrefillPairs<IntegerSource<Steps, Elements>, Product<Elements>>::run(
      w, blocks, static_cast<const int32_t*>(packed.values), packed.scales, tokens, y);
}

/// Share of the elements of which not everything is absent, if absent weights lie at random.
template <class Elements>
static double kept_elements(double density) {
  double absent = 1.0;
  for (int column = 0; column < 4 / Elements::kOfStep; ++column) absent *= 1.0 - density;
  return 1.0 - absent;
}
