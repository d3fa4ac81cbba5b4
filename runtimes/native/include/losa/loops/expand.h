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
// decode.h and prefill.h say what else they need. They are included inside an anonymous namespace, for the
// reason given at LOSA_INLINE; that is also why nothing here calls the standard library.

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

template <class V>
struct Expand {
  using Vector = typename V::Vector;
  using Mask = typename MaskOf<V>::Type;
  static constexpr int kParts = losa::kBlockRows / V::kLanes;  // vectors that cover a block's rows
  static constexpr int kStep = 4;                              // columns whose masks are one 64-bit word

  /// Part `part` of the weights of column `column` of a step. `kept` is Mask(masks), and `values` are those
  /// of the step's first column: counting the bits before this part anew, rather than moving a pointer
  /// along, keeps the parts independent of each other.
  LOSA_INLINE static Vector part(const uint8_t* masks, const Mask& kept, const float* values, int column,
                                 int part) {
    const int first_bit = static_cast<int>(losa::kBlockRows) * column + V::kLanes * part;
    unsigned bits = masks[first_bit / 8];
    if (V::kLanes == 16) bits |= static_cast<unsigned>(masks[first_bit / 8 + 1]) << 8;
    return V::expand(values + kept.before(first_bit), bits);
  }

  /// The masks of the last columns where fewer than kStep are left; the rest are absent.
  struct LastStep {
    uint8_t masks[2 * kStep];
    LOSA_INLINE LastStep(const uint8_t* from, int64_t columns) : masks() {
      for (int64_t i = 0; i < 2 * columns; ++i) masks[i] = from[i];
    }
  };
};

/// A block's results for one token; the last block may have fewer rows.
LOSA_INLINE static void copy_rows(const float* rows, int64_t count, float* y) {
  if (count >= losa::kBlockRows) {
    __builtin_memcpy(y, rows, losa::kBlockRows * sizeof *y);
  } else {
    for (int64_t r = 0; r < count; ++r) y[r] = rows[r];
  }
}
