// Floats in 16 lanes: fp32 weights, and bf16 ones made floats.

/// As expand.h, prefill.h's FloatSource, attend.h and avx512_products.h want them.
struct Floats {
  static constexpr int kLanes = kVectorLanes;
  using Element = float;
  using Vector = __m512;
  using Sums = __m512;
  static constexpr bool kMixes = false;

  template <int Lanes = kVectorLanes>
  static Vector load(const float* p) { return load_floats<Lanes>(p); }
  static void store(float* p, Vector v) { _mm512_storeu_ps(p, v); }
  static Vector broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Sums multiply_add(Vector weight, Vector x, Sums sums) { return _mm512_fmadd_ps(weight, x, sums); }
  static Vector zero() { return _mm512_setzero_ps(); }
  static Sums add(Sums a, Sums b) { return _mm512_add_ps(a, b); }
  static Vector expand(const float* values, unsigned bits) {
    return expand_floats(static_cast<__mmask16>(bits), _mm512_loadu_ps(values));
  }
  static void row_masks(const uint8_t* masks, uint64_t (&rows)[losa::kBlockRows]) {
    uint16_t columns[64];
    __builtin_memcpy(columns, masks, sizeof columns);
    transpose_masks(columns, rows);
  }
  static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    transpose_floats8(from, from_stride, to, to_stride);
  }

  // A tile's products are added to the sums so far; there are no scales.
  static int starts(const WeightTile<float>&) { return 0; }
  static int start(const WeightTile<float>&, int) { return 0; }
  template <int Lanes>
  static Sums begin(const float* sums, int) { return load_floats<Lanes>(sums); }
  static int scale(const float*) { return 0; }
  template <int Lanes>
  static int scales(const float*) { return 0; }
  template <int Lanes>
  static void finish(float* sums, Sums total, int, int) { store_floats<Lanes>(sums, total); }
};

/// Tokens of (tokens, columns) floats.
struct FloatTokens {
  const float* values;
  int64_t columns;
  FloatTokens from(int64_t token) const { return {values + token * columns, columns}; }
};

/// Few tokens (avx512_decode.h) and weights of a type of expand.h.
template <class From>
struct FloatDecode {
  template <int Tokens>
  class Kernel {
   public:
    static constexpr int64_t kPanelColumns = panel_columns(Tokens, 1);
    static constexpr int kBlocks = Tokens == 1 ? 1 : 2;  // which share each activation that is loaded
    using Walk = typename From::Words;

    void begin(const FloatTokens& x, int64_t first, int64_t count) {
#pragma GCC unroll 1
      for (int t = 0; t < Tokens; ++t)
        __builtin_memcpy(x_[t], x.from(t).values + first, static_cast<size_t>(count) * sizeof(float));
    }

    template <int Blocks>
    void blocks(const losa::Weight& w, int64_t index, int64_t first, int64_t count, Walk (&walks)[Blocks],
                float* y) const {
      // So many sums of a token and a block that no multiply-add waits for the one before.
      constexpr int kPartial = Tokens == 1 ? 4 : Tokens <= 3 ? 2 : 1;
      using Word = decltype(walks[0].next());
      __m512 sums[Blocks][Tokens][kPartial];
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
          sums[b][t][0] = first == 0 ? _mm512_setzero_ps() : load_results(w, index + b, t, y);
#pragma GCC unroll 4
          for (int p = 1; p < kPartial; ++p) sums[b][t][p] = _mm512_setzero_ps();
        }
      const float* x = x_[0];
      for (; count >= kWordColumns; count -= kWordColumns, x += kWordColumns) {
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) {
          __builtin_prefetch(static_cast<const char*>(walks[b].values()) + kPrefetchFloats);
          __builtin_prefetch(static_cast<const char*>(walks[b].values()) + kPrefetchFloats + 64);
        }
        if constexpr (Blocks == 1) {
          const Word words[1] = {walks[0].next()};
          add_words(words, kWordColumns, x, sums);
        } else {
          const Word words[2] = {walks[0].next(), walks[1].next()};
          add_words(words, kWordColumns, x, sums);
        }
      }
      if (count > 0) {
        uint8_t padded[Blocks][8];
        if constexpr (Blocks == 1) {
          const Word words[1] = {walks[0].last(count, padded[0])};
          add_words(words, count, x, sums);
        } else {
          const Word words[2] = {walks[0].last(count, padded[0]), walks[1].last(count, padded[1])};
          add_words(words, count, x, sums);
        }
      }
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
#pragma GCC unroll 4
          for (int p = 1; p < kPartial; ++p) sums[b][t][0] = _mm512_add_ps(sums[b][t][0], sums[b][t][p]);
          store_results(w, index + b, t, sums[b][t][0], y);
        }
    }

   private:
    static constexpr int64_t kPrefetchFloats = 4096;  // 2 KiB ahead is 8 % slower, 16 KiB 5 %, on a Zen 5
    static constexpr int64_t kStride = kPanelColumns + 16;  // one line off a page

    /// The first `columns` of a word of each block.
    template <class Word, int Blocks, int Partial>
    LOSA_INLINE static void add_words(const Word (&words)[Blocks], int64_t columns, const float* x,
                                      __m512 (&sums)[Blocks][Tokens][Partial]) {
#pragma GCC unroll 4
      for (int i = 0; i < kWordColumns / From::kTogether; ++i) {
        if (i * From::kTogether >= columns) return;
        typename From::Packed packed[Blocks];
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) packed[b] = From::packed(words[b], i, 0);
#pragma GCC unroll 2
        for (int j = 0; j < From::kTogether; ++j) {
          const int column = i * From::kTogether + j;
          if (column >= columns) return;
          __m512 weights[Blocks];
#pragma GCC unroll 2
          for (int b = 0; b < Blocks; ++b) weights[b] = From::column(packed[b], j);
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t) {
            const __m512 activation = _mm512_set1_ps(x[t * kStride + column]);
#pragma GCC unroll 2
            for (int b = 0; b < Blocks; ++b) {
              __m512& sum = sums[b][t][column % Partial];
              sum = _mm512_fmadd_ps(weights[b], activation, sum);
            }
          }
        }
      }
    }

    alignas(64) float x_[Tokens][kStride];
  };

  static void run(const losa::Weight& w, losa::BlockRange blocks, const float* x, int64_t tokens, float* y) {
    decode_tokens<Kernel>(w, blocks, FloatTokens{x, w.columns}, tokens, y);
  }
};

/// Many tokens.
template <class From, template <class> class Product>
static void prefill_floats(const losa::Weight& w, losa::BlockRange blocks, const float* packed, int64_t tokens,
                           float* y) {
  // There are no scales, but where they would lie is computed: never past the packed values.
  PrefillPairs<FloatSource<Floats, From>, Product<Floats>>::run(w, blocks, packed, packed, tokens, y);
}

constexpr PrefillCosts kFloatCosts = {1.14, 0.125, 1.12};

template <class From>
static void prefill_sparse_floats(const losa::Weight& w, losa::BlockRange blocks, const float* packed, int64_t tokens,
                                  float* y) {
  if (skipping_pays(kFloatCosts, w.density(), tokens))
    prefill_floats<From, SparseProduct>(w, blocks, packed, tokens, y);
  else
    prefill_floats<From, WideProduct>(w, blocks, packed, tokens, y);
}
