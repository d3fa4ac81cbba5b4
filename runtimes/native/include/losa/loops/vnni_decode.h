// int8 and int4 weights for few tokens (avx512_decode.h).

template <class Steps, class Elements>
struct IntegerDecode {
  template <int Tokens>
  class Kernel {
   public:
    static constexpr int64_t kPanelColumns = panel_columns(Tokens, 4 / Elements::kOfStep);
    // Two blocks share each activation that is loaded. One token waits for memory, which likes one stream better.
    static constexpr int kBlocks = Tokens == 1 ? 1 : 2;
    using Walk = Steps;

    void begin(const losa::RoundedTokens& x, int64_t first, int64_t) {
      const ArrangedToken arranged(x, 0);
      elements_ = arranged.elements + first / 4 * Elements::kOfStep;
      starts_ = arranged.starts + first / x.group;
      scales_ = x.token_scales(0) + first / x.group;
      stride_ = x.arranged_bytes() / static_cast<int64_t>(sizeof(int32_t));
      groups_ = x.groups();
    }

    /// Blocks from `index` on, as many as there are walks.
    template <int Blocks>
    void blocks(const losa::Weight& w, int64_t index, int64_t first, int64_t count, Walk (&walks)[Blocks],
                float* y) const {
      const uint16_t* scales[Blocks];
      __m512 results[Blocks][Tokens];
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) {
        scales[b] = w.block_scales(index + b) + first / w.group * losa::kBlockRows;
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t)
          results[b][t] = first == 0 ? _mm512_setzero_ps() : load_results(w, index + b, t, y);
      }
      const int32_t* x = elements_;
      for (int64_t group = 0; count > 0; ++group, count -= w.group) {
        const int64_t group_steps = ((count < w.group ? count : w.group) + 3) / 4;
        __m512i sums[Blocks][Tokens];
        add_group(walks, x, group, group_steps, sums);
        x += group_steps * Elements::kOfStep;
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) {
          const __m512 weight_scales = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales[b])));
#pragma GCC unroll 8
          for (int t = 0; t < Tokens; ++t) {
            const __m512 both = _mm512_mul_ps(weight_scales, _mm512_set1_ps(scales_[t * groups_ + group]));
            results[b][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sums[b][t]), both, results[b][t]);
          }
          scales[b] += losa::kBlockRows;
        }
      }
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) store_results(w, index + b, t, results[b][t], y);
    }

   private:
    // Several tokens wait for multiply-adds, these for expansions unless those are a step ahead. On a Zen 4 eight tokens
    // of 8 bits take 2 to 4 % less time so, of 16 bits 8 to 10 %; one token waits for memory.
    static constexpr bool kAhead = Tokens > 1;

    template <int Blocks>
    LOSA_INLINE void add_group(Walk (&walks)[Blocks], const int32_t* x, int64_t group, int64_t count,
                               __m512i (&totals)[Blocks][Tokens]) const {
      // So many sums of a token and a block that no multiply-add waits for the one before.
      constexpr int kPartial = Tokens * Blocks == 1 ? 4 : Tokens * Blocks <= 4 ? 2 : 1;
      __m512i sums[Blocks][Tokens][kPartial];
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) {
          sums[b][t][0] = _mm512_set1_epi32(starts_[t * stride_ + group]);
#pragma GCC unroll 4
          for (int p = 1; p < kPartial; ++p) sums[b][t][p] = _mm512_setzero_si512();
        }
      const int64_t stride = stride_;
      __m512i steps[Blocks];
      if (kAhead) expand(walks, steps);
      int64_t left = kAhead ? count - 1 : count;
      for (; left >= 4; left -= 4) {
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) walks[b].prefetch();
#pragma GCC unroll 4
        for (int turn = 0; turn < 4; ++turn, x += Elements::kOfStep) add_step(walks, x, stride, turn, steps, sums);
      }
#pragma GCC unroll 1
      for (; left > 0; --left, x += Elements::kOfStep) add_step(walks, x, stride, 0, steps, sums);
      if (kAhead) Elements::add_steps(steps, x, stride, 0, sums);
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
#pragma GCC unroll 8
        for (int t = 0; t < Tokens; ++t) totals[b][t] = Elements::total(sums[b][t]);
    }

    /// Of each block a step meets its activations, and one is expanded: the next one if kAhead, in place of `steps`.
    template <int Blocks, int Partial>
    LOSA_INLINE static void add_step(Walk (&walks)[Blocks], const int32_t* x, int64_t stride, int turn,
                                     __m512i (&steps)[Blocks], __m512i (&sums)[Blocks][Tokens][Partial]) {
      __m512i expanded[Blocks];
      expand(walks, expanded);
      Elements::add_steps(kAhead ? steps : expanded, x, stride, turn, sums);
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) steps[b] = expanded[b];
    }

    template <int Blocks>
    LOSA_INLINE static void expand(Walk (&walks)[Blocks], __m512i (&steps)[Blocks]) {
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) steps[b] = Elements::next(walks[b]);
    }

    // Of the first token and column; another token's elements and starts are `stride_` on, its scales `groups_`.
    const int32_t *elements_, *starts_;
    const float* scales_;
    int64_t stride_, groups_;
  };

  static void run(const losa::Weight& w, losa::BlockRange blocks, const losa::RoundedTokens& x, int64_t tokens,
                  float* y) {
    decode_tokens<Kernel>(w, blocks, x, tokens, y);
  }

  static void run_one(const losa::Weight& w, losa::BlockRange blocks, const losa::RoundedTokens& x, float* y) {
    decode_tokens_as<Kernel<1>>(w, blocks, x, y);
  }
};
