// bfloat16 values for the loops of decode.h and prefill.h.
//
// A bf16 is the upper half of a float32, so nothing is converted: where a vector of floats has a lane, a vector of
// pairs has the two bf16 of one row and two columns. V also gives
//   Pairs                     its register type
//   load_pairs(p)             kLanes pairs; no alignment assumed
//   expand_pairs(word, bit)   those from bit `bit` of a word's masks on, absent values 0
//   first(pairs), second(pairs)        a column of them, as floats
//   pair_row_masks(masks, rows)        as prefill.h wants row_masks()

template <class V>
struct Bf16 {
  using Words = SparseWords<V, uint16_t, 2>;
  using Packed = typename V::Pairs;
  static constexpr int kTogether = 2;

  LOSA_INLINE static Packed packed(const Word<V, uint16_t>& word, int pair, int part) {
    return V::expand_pairs(word, 2 * (static_cast<int>(losa::kBlockRows) * pair + V::kLanes * part));
  }
  LOSA_INLINE static typename V::Vector column(const Packed& packed, int i) {
    return i == 0 ? V::first(packed) : V::second(packed);
  }
  static void row_masks(const uint8_t* masks, uint64_t (&rows)[losa::kBlockRows]) { V::pair_row_masks(masks, rows); }
};

/// A dense weight's words are pointers to their values.
class DenseBf16Words {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    values_ = reinterpret_cast<const uint16_t*>(w.block_values(block));
  }
  LOSA_INLINE const void* values() const { return values_; }
  LOSA_INLINE const uint16_t* next() {
    const uint16_t* word = values_;
    values_ += kWordColumns * losa::kBlockRows;
    return word;
  }
  LOSA_INLINE const uint16_t* last(int64_t, uint8_t (&)[8]) const { return values_; }

 private:
  const uint16_t* values_;
};

template <class V>
struct DenseBf16 : Bf16<V> {
  using Words = DenseBf16Words;

  LOSA_INLINE static typename V::Pairs packed(const uint16_t* word, int pair, int part) {
    return V::load_pairs(word + 2 * (losa::kBlockRows * pair + V::kLanes * part));
  }
};
