// From masks and packed values to vectors with zeros in place.
//
// The files in this folder hold the loops of the SIMD kernels, written once over a small vector type V
// that an instruction set gives:
//   kLanes                    floats in a vector, 8 or 16
//   Vector                    its register type
//   zero(), broadcast(p), load(p), store(p, v)      no alignment assumed
//   multiply_add(a, b, c)     a * b + c, rounded once
//   add(a, b)
//   expand(values, bits)      lane i = bits >> i & 1 ? the next of `values` : 0
// decode.h, prefill.h and bf16.h say what else they need. They are included inside an anonymous namespace, for the
// reason given at LOSA_INLINE; that is also why nothing here calls the standard library.
//
// What is stored is described by a class such as Fp32 below, of which the loops want
//   Words                     walks a block: start(w, block), then next() for each four columns, and last(n, padded)
//                             for the last n where fewer are left
//   Packed, kTogether         what one expansion gives: kTogether columns of kLanes rows
//   packed(word, i, part)     rows kLanes * part and on of the i-th kTogether columns of a word
//   column(packed, i)         the i-th of these columns, a Vector

constexpr int kWordColumns = 4;  // of fp32 or bf16: their masks are 64 bits

/// Masks of four columns, 64 bits: how many values lie before a bit. A processor without an instruction that counts
/// bits gives its own class, by specialising MaskOf.
struct PopcountMask {
  uint64_t bits;
  LOSA_INLINE explicit PopcountMask(const uint8_t* masks) { __builtin_memcpy(&bits, masks, sizeof bits); }
  LOSA_INLINE int before(int bit) const { return bit == 0 ? 0 : __builtin_popcountll(bits << (64 - bit)); }
  LOSA_INLINE int count() const { return __builtin_popcountll(bits); }
};

template <class V>
struct MaskOf {
  using Type = PopcountMask;
};

/// Four columns: their masks, and their values.
template <class V, class Value>
struct Word {
  const uint8_t* masks;
  const Value* values;
  typename MaskOf<V>::Type kept;

  LOSA_INLINE Word(const uint8_t* masks_of_four, const Value* first_value)
      : masks(masks_of_four), values(first_value), kept(masks_of_four) {}
};

/// The words of one block of a sparse weight whose steps have `StepColumns` columns.
template <class V, class Value, int StepColumns>
class SparseWords {
 public:
  /// Of masks, for so many columns.
  static constexpr int64_t mask_bytes(int64_t columns) {
    return (columns + StepColumns - 1) / StepColumns * (2 * StepColumns);
  }
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    masks_ = w.block_masks(block);
    values_ = reinterpret_cast<const Value*>(w.block_values(block));
  }
  LOSA_INLINE const uint8_t* masks() const { return masks_; }
  LOSA_INLINE const void* values() const { return values_; }
  LOSA_INLINE Word<V, Value> next() {
    const Word<V, Value> word(masks_, values_);
    masks_ += mask_bytes(kWordColumns);
    values_ += word.kept.count();
    return word;
  }
  /// `padded` takes its masks.
  LOSA_INLINE Word<V, Value> last(int64_t columns, uint8_t (&padded)[8]) const {
    __builtin_memset(padded, 0, sizeof padded);
    for (int64_t i = 0; i < mask_bytes(columns); ++i) padded[i] = masks_[i];
    return Word<V, Value>(padded, values_);
  }

 private:
  const uint8_t* masks_;
  const Value* values_;
};

/// Kept float32 values.
template <class V>
struct Fp32 {
  using Words = SparseWords<V, float, 1>;
  using Packed = typename V::Vector;
  static constexpr int kTogether = 1;

  /// Counting the values before this part anew, rather than moving a pointer along, keeps the parts independent of
  /// each other.
  LOSA_INLINE static Packed packed(const Word<V, float>& word, int column, int part) {
    const int first_bit = static_cast<int>(losa::kBlockRows) * column + V::kLanes * part;
    unsigned bits = word.masks[first_bit / 8];
    if (V::kLanes == 16) bits |= static_cast<unsigned>(word.masks[first_bit / 8 + 1]) << 8;
    return V::expand(word.values + word.kept.before(first_bit), bits);
  }
  LOSA_INLINE static typename V::Vector column(const Packed& packed, int) { return packed; }
  static void row_masks(const uint8_t* masks, uint64_t (&rows)[losa::kBlockRows]) { V::row_masks(masks, rows); }
};

/// A block's results for one token; the last block may have fewer rows.
LOSA_INLINE static void copy_rows(const float* rows, int64_t count, float* y) {
  if (count >= losa::kBlockRows) {
    __builtin_memcpy(y, rows, losa::kBlockRows * sizeof *y);
  } else {
    for (int64_t r = 0; r < count; ++r) y[r] = rows[r];
  }
}
