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
    const int64_t count = elements / Elements::kOfStep;
    Steps steps = steps_;  // whose pointers stay in registers: a store to the tile might change the members
    if constexpr (RowMasks) Elements::mark_kept(TurnedMasks(steps.masks(), count), tile->kept);
    __m512i excess[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};  // so that no sum waits for the one before
    int32_t* to = tile->weights;
    int64_t step = 0;
    for (; step + kTogether <= count; step += kTogether) {
      __m512i expanded[kTogether];
#pragma GCC unroll 8
      for (int turn = 0; turn < kTogether; ++turn) {
        if (turn % 4 == 0) steps.prefetch();
        expanded[turn] = steps.next();
      }
#pragma GCC unroll 8
      for (int turn = 0; turn < kTogether; ++turn, to += kStepElements)
        Elements::widen(expanded[turn], to, excess[turn % 2]);
    }
    for (; step < count; ++step, to += kStepElements) Elements::widen(steps.next(), to, excess[0]);
    steps_ = steps;
    Elements::set_starts(tile, _mm512_add_epi32(excess[0], excess[1]));
    _mm512_store_ps(tile->scales, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales_))));
    scales_ += losa::kBlockRows;
  }

 private:
  // Steps that are expanded before the first of them is stored: on a Zen 4 a prompt takes 1 to 2 % less time so.
  static constexpr int kTogether = 8;
  static constexpr int64_t kStepElements = Elements::kOfStep * losa::kBlockRows;  // of a tile

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
