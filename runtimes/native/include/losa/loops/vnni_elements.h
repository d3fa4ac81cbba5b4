// Activations of 16 or 8 bits, and how a step of weights meets them. An element is what one lane of a multiply-add
// takes: a pair of 16-bit integers (vpdpwssd), or four bytes (vpdpbusd).
//
// A pair is of every other column: of a step's columns 0 to 3, the first pair has 0 and 2, the second 1 and 3, since
// even and odd bytes become 16-bit integers without a shuffle.
//
// vpdpbusd wants one side unsigned, and taking even bytes is cheapest so, too. What is added to a side, 128, comes off
// again as 128 times the sum of the other side, which is where the sums of a group start. All of it is exact in int32.

/// A token's activations as decode reads them, in RoundedTokens::arranged.
struct ArrangedToken {
  ArrangedToken(const losa::RoundedTokens& x, int64_t token)
      : elements(reinterpret_cast<int32_t*>(x.arranged_token(token))), starts(elements + x.padded_columns() / 2) {}

  int32_t* elements;  // in the order of steps
  int32_t* starts;    // of each group, what its sums start at
};

/// What prefill's products (avx512_products.h) want of either kind.
struct IntegerElements {
  using Element = int32_t;
  using Vector = __m512i;
  using Sums = __m512i;
  static constexpr bool kMixes = true;

  static Vector broadcast(const int32_t* p) { return _mm512_set1_epi32(*p); }
  template <int Lanes>
  static Vector load(const int32_t* p) {
    if constexpr (Lanes == kVectorLanes) return _mm512_loadu_si512(p);
    return _mm512_maskz_loadu_epi32(kLaneMask<Lanes>, p);
  }
  template <int Lanes>
  static Sums begin(const float*, Sums start) { return start; }
  static __m512 scale(const float* p) { return _mm512_set1_ps(*p); }
  template <int Lanes>
  static __m512 scales(const float* p) { return load_floats<Lanes>(p); }
  template <int Lanes>
  static void finish(float* sums, Sums total, __m512 a, __m512 b) {
    const __m512 so_far = load_floats<Lanes>(sums);
    store_floats<Lanes>(sums, _mm512_fmadd_ps(_mm512_cvtepi32_ps(total), _mm512_mul_ps(a, b), so_far));
  }
};

/// The sum of partial sums.
template <int Partial>
LOSA_INLINE static __m512i sum_up(const __m512i (&sums)[Partial]) {
  __m512i total = sums[0];
#pragma GCC unroll 4
  for (int p = 1; p < Partial; ++p) total = _mm512_add_epi32(total, sums[p]);
  return total;
}

struct Pairs : IntegerElements {
  static constexpr int kOfStep = 2;
  static constexpr PrefillCosts kCosts = {1.12, 0.14, 1.0};

  // Decoding: x stays signed, weights in even columns get the 128.

  template <class Steps>
  LOSA_INLINE static __m512i next(Steps& walk) { return walk.next(); }

  /// 32 columns of one token as elements; returns 16 parts of what the sum of a group starts at.
  LOSA_INLINE static __m512i arrange(const int16_t* from, int32_t* to) {
    const __m512i x = _mm512_shuffle_epi8(_mm512_loadu_si512(from), _mm512_broadcast_i32x4(swap_inner()));
    _mm512_store_si512(to, x);
    return _mm512_madd_epi16(x, _mm512_set1_epi64(0xff80ff80));  // of each step, -128 times the first pair
  }

  /// sums[block][t] += each block's step times the elements of each token at x[t * stride]. `turn` says which of the
  /// partial sums are due.
  template <int Blocks, int Tokens, int Partial>
  LOSA_INLINE static void add_steps(const __m512i (&steps)[Blocks], const int32_t* x, int64_t stride, int turn,
                                    __m512i (&sums)[Blocks][Tokens][Partial]) {
    constexpr int kXorAnd = 0x28;  // (a ^ b) & c
    const int first = 2 * turn % Partial, second = (2 * turn + 1) % Partial;
    __m512i even[Blocks], odd[Blocks];
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      even[b] = _mm512_ternarylogic_epi32(steps[b], _mm512_set1_epi16(0x80), _mm512_set1_epi16(0xff), kXorAnd);
      odd[b] = _mm512_srai_epi16(steps[b], 8);
    }
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      if constexpr (Blocks == 1) {
        add_pairs(sums[0][t][first], even[0], x + t * stride);
        add_pairs(sums[0][t][second], odd[0], x + t * stride + 1);
      } else {
        const __m512i of_even = broadcast(x + t * stride), of_odd = broadcast(x + t * stride + 1);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) {
          add_pairs(sums[b][t][first], even[b], of_even);
          add_pairs(sums[b][t][second], odd[b], of_odd);
        }
      }
    }
  }

  template <int Partial>
  LOSA_INLINE static __m512i total(const __m512i (&sums)[Partial]) { return sum_up(sums); }

  // Prefill: all signed, nothing to come off.

  LOSA_INLINE static void widen(__m512i step, int32_t* to, __m512i&) {
    _mm512_store_si512(to, _mm512_srai_epi16(_mm512_slli_epi16(step, 8), 8));
    _mm512_store_si512(to + kVectorLanes, _mm512_srai_epi16(step, 8));
  }
  /// The first pair of a step has its columns 0 and 2.
  LOSA_INLINE static void mark_kept(const TurnedMasks& masks, uint64_t (&kept)[losa::kBlockRows]) {
    uint32_t first[losa::kBlockRows], second[losa::kBlockRows];
    masks.steps_with<0x5>(first);
    masks.steps_with<0xa>(second);
    for (int row = 0; row < losa::kBlockRows; ++row)
      kept[row] = _pdep_u64(first[row], 0x5555555555555555) | _pdep_u64(second[row], 0xaaaaaaaaaaaaaaaa);
  }
  static void set_starts(WeightTile<int32_t>*, __m512i) {}
  static Sums starts(const WeightTile<int32_t>&) { return _mm512_setzero_si512(); }
  static Sums start(const WeightTile<int32_t>&, int) { return _mm512_setzero_si512(); }
  /// Eight elements of a token's activations, from element `first` on.
  LOSA_INLINE static __m256i piece(const int16_t* x, int64_t first) {
    return _mm256_shuffle_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + 2 * first)),
                               _mm256_broadcastsi128_si256(swap_inner()));
  }
  static Sums multiply_add(Vector weight, Vector x, Sums sums) {
    add_pairs(sums, weight, x);
    return sums;
  }

 private:
  /// Of four 16-bit integers the inner two change places.
  LOSA_INLINE static __m128i swap_inner() {
    return _mm_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  }
};

struct Quads : IntegerElements {
  static constexpr int kOfStep = 1;
  static constexpr PrefillCosts kCosts = {1.22, 0.29, 1.0};

  // Decoding: x stays signed, all weights get the 128.

  template <class Steps>
  LOSA_INLINE static __m512i next(Steps& walk) { return walk.next_above(); }

  LOSA_INLINE static __m512i arrange(const int16_t* from, int32_t* to) {
    const __m512i x = _mm512_loadu_si512(from);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi16_epi8(x));
    return _mm512_madd_epi16(x, _mm512_set1_epi16(-128));
  }

  template <int Blocks, int Tokens, int Partial>
  LOSA_INLINE static void add_steps(const __m512i (&steps)[Blocks], const int32_t* x, int64_t stride, int turn,
                                    __m512i (&sums)[Blocks][Tokens][Partial]) {
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      if constexpr (Blocks == 1) {
        add_quads(sums[0][t][turn % Partial], steps[0], x + t * stride);
      } else {
        const __m512i of_all = broadcast(x + t * stride);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) add_quads(sums[b][t][turn % Partial], steps[b], of_all);
      }
    }
  }

  template <int Partial>
  LOSA_INLINE static __m512i total(const __m512i (&sums)[Partial]) { return sum_up(sums); }

  // Prefill: x gets the 128, so that an absent element of weights adds nothing and may be skipped.

  /// `excess` grows by 128 times each row's levels.
  LOSA_INLINE static void widen(__m512i step, int32_t* to, __m512i& excess) {
    _mm512_store_si512(to, step);
    add_quads(excess, _mm512_set1_epi8(-128), step);
  }
  LOSA_INLINE static void mark_kept(const TurnedMasks& masks, uint64_t (&kept)[losa::kBlockRows]) {
    masks.steps_with<0xf>(kept);
  }
  static void set_starts(WeightTile<int32_t>* tile, __m512i excess) {
    _mm512_store_si512(tile->weights + kStarts, _mm512_sub_epi32(_mm512_setzero_si512(), excess));
  }
  static Sums starts(const WeightTile<int32_t>& tile) { return _mm512_load_si512(tile.weights + kStarts); }
  static Sums start(const WeightTile<int32_t>& tile, int row) { return broadcast(tile.weights + kStarts + row); }
  LOSA_INLINE static __m256i piece(const int16_t* x, int64_t first) {
    const __m256i narrow = _mm512_cvtepi16_epi8(_mm512_loadu_si512(x + 4 * first));
    return _mm256_xor_si256(narrow, _mm256_set1_epi8(-128));
  }
  static Sums multiply_add(Vector weight, Vector x, Sums sums) {
    add_quads(sums, x, weight);
    return sums;
  }

 private:
  static constexpr int64_t kStarts = losa::kMaxGroup / 4 * losa::kBlockRows;  // in a tile, behind a group's elements
};

/// One token's 16-bit activations as two fours of bytes, x = 256 high + low: weights need not become 16-bit integers,
/// which takes the same units as expanding them does. There is no use in it for more tokens: high and low have sums of
/// their own, for which there are not registers enough.
struct SplitQuads {
  static constexpr int kOfStep = 2;

  template <class Steps>
  LOSA_INLINE static __m512i next(Steps& walk) { return walk.next(); }

  /// For each step its four high bytes, signed, and then its four low ones, unsigned.
  LOSA_INLINE static __m512i arrange(const int16_t* from, int32_t* to) {
    const __m512i x = _mm512_loadu_si512(from), high = _mm512_srai_epi16(x, 8);
    const __m512i fours = _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(_mm_setr_epi8(1, 3, 5, 7, 0, 2, 4, 6, 9, 11, 13,
                                                                                      15, 8, 10, 12, 14)));
    _mm512_store_si512(to, fours);
    return _mm512_madd_epi16(high, _mm512_set1_epi16(-128));  // weights get the 128 where they meet high bytes
  }

  /// Sums of high bytes and of low ones take turns.
  template <int Blocks, int Tokens, int Partial>
  LOSA_INLINE static void add_steps(const __m512i (&steps)[Blocks], const int32_t* x, int64_t, int turn,
                                    __m512i (&sums)[Blocks][Tokens][Partial]) {
    static_assert(Tokens == 1 && Partial % 2 == 0, "a register for each sum");
    const int first = 2 * turn % Partial;
    const __m512i high = _mm512_set1_epi32(x[0]), low = _mm512_set1_epi32(x[1]);
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) {
      add_quads(sums[b][0][first], above(steps[b]), high);
      add_quads(sums[b][0][first + 1], low, steps[b]);
    }
  }

  /// Exact: what overflows on the way comes back, as the total does not.
  template <int Partial>
  LOSA_INLINE static __m512i total(const __m512i (&sums)[Partial]) {
    __m512i high = sums[0], low = sums[1];
#pragma GCC unroll 2
    for (int p = 2; p < Partial; p += 2) {
      high = _mm512_add_epi32(high, sums[p]);
      low = _mm512_add_epi32(low, sums[p + 1]);
    }
    return _mm512_add_epi32(_mm512_slli_epi32(high, 8), low);
  }
};
