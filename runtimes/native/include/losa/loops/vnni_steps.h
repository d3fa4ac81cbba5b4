// Steps of int8 and int4 weights, one after the other, as vectors of 64 signed bytes: byte 4 r + k % 4 is the level of
// row r in column k, and 0 where none is kept. There is a class for each way a weight is stored:
//   start(w, block)   begins with a block's first step
//   next()            the next step
//   next_above()      the same with 128 added to each byte, which makes it unsigned
//   prefetch()        asks memory for what four steps need later on
//   masks()           of a sparse weight: those of the steps to come

// Values are one long stream, and masks another, shorter one; the processor's own prefetching stops at each page.
// On a Zen 5 1 KiB of values ahead is 15 % slower than 3, and 8 KiB 10 %.
constexpr int64_t kPrefetchValues = 3072;
constexpr int64_t kPrefetchMasks = 1536;

/// The masks of a sparse weight.
class Masks {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) { next_ = w.block_masks(block); }
  LOSA_INLINE __mmask64 next(int64_t* count) {
    uint64_t bits;
    __builtin_memcpy(&bits, next_, sizeof bits);
    *count = __builtin_popcountll(bits);
    const __mmask64 kept = load_mask64(next_);
    next_ += sizeof bits;
    return kept;
  }
  LOSA_INLINE void prefetch() const { __builtin_prefetch(next_ + kPrefetchMasks); }
  LOSA_INLINE const uint8_t* ahead() const { return next_; }

 private:
  const uint8_t* next_;
};

/// Whether most steps of a weight keep so little that half a vector holds it: 32 of 64. A load that crosses lines and
/// the look-up of codes then cost half, and the branch for other steps is hardly ever taken. Of masks at random that
/// keep 38 %, one step in 60 is such another; of those that keep 50 %, every other one, which takes three times as long.
inline bool narrow(const losa::Weight& w) { return w.density() <= 0.38; }
constexpr int64_t kNarrowStep = 32;

/// 128 more, in unsigned bytes.
LOSA_INLINE static __m512i above(__m512i levels) { return _mm512_xor_si512(levels, _mm512_set1_epi8(-128)); }

/// A weight's codebook, four times over.
LOSA_INLINE static __m512i load_codebook(const losa::Weight& w) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.codebook)));
}

/// The levels of codes, two to a byte, the low half first.
class Codebook {
 public:
  LOSA_INLINE void start(__m512i levels) { levels_ = levels; }

  // A byte with two codes becomes two bytes that begin with one each. Their upper bits are no matter: the codebook is
  // there four times over. On a Zen 4 half a vector takes up to 0.6 cycles less so than with vpmultishiftqb.

  /// Of 64 codes.
  LOSA_INLINE __m512i levels(const uint8_t* codes) const {
    const __m512i apart = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    return _mm512_permutexvar_epi8(_mm512_or_si512(apart, _mm512_slli_epi16(apart, 4)), levels_);
  }
  /// Of 32 codes; above them is anything.
  LOSA_INLINE __m512i narrow_levels(const uint8_t* codes) const {
    const __m256i apart = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return _mm512_castsi256_si512(_mm256_permutexvar_epi8(_mm256_or_si256(apart, _mm256_slli_epi16(apart, 4)),
                                                          _mm512_castsi512_si256(levels_)));
  }

 private:
  __m512i levels_;
};

template <bool Narrow>
class SparseInt8 {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    masks_.start(w, block);
    values_ = w.block_values(block);
  }
  LOSA_INLINE __m512i next() {
    int64_t count;
    const __mmask64 kept = masks_.next(&count);
    const __m512i levels = expand_bytes(kept, packed(count));
    values_ += count;
    return levels;
  }
  LOSA_INLINE __m512i next_above() { return above(next()); }
  LOSA_INLINE void prefetch() const {
    masks_.prefetch();
    __builtin_prefetch(values_ + kPrefetchValues);
    __builtin_prefetch(values_ + kPrefetchValues + 64);
  }
  LOSA_INLINE const uint8_t* masks() const { return masks_.ahead(); }

 private:
  LOSA_INLINE __m512i packed(int64_t count) const {
    if (Narrow && __builtin_expect(count <= kNarrowStep, 1))
      return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(values_)));
    return _mm512_loadu_si512(values_);
  }

  Masks masks_;
  const uint8_t* values_;
};

template <bool Narrow>
class SparseInt4 {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    masks_.start(w, block);
    codebook_.start(load_codebook(w));
    codebook_above_.start(above(load_codebook(w)));
    values_ = w.block_values(block);
  }
  LOSA_INLINE __m512i next() {
    int64_t count;
    const __mmask64 kept = masks_.next(&count);
    const __m512i levels = expand_bytes(kept, packed(codebook_, count));
    values_ += (count + 1) / 2;
    return levels;
  }
  LOSA_INLINE __m512i next_above() {
    int64_t count;
    const __mmask64 kept = masks_.next(&count);
    const __m512i levels = expand_bytes_into(_mm512_set1_epi8(-128), kept, packed(codebook_above_, count));
    values_ += (count + 1) / 2;
    return levels;
  }
  LOSA_INLINE void prefetch() const {
    masks_.prefetch();
    __builtin_prefetch(values_ + kPrefetchValues);
  }
  LOSA_INLINE const uint8_t* masks() const { return masks_.ahead(); }

 private:
  LOSA_INLINE __m512i packed(const Codebook& codebook, int64_t count) const {
    if (Narrow && __builtin_expect(count <= kNarrowStep, 1)) return codebook.narrow_levels(values_);
    return codebook.levels(values_);
  }

  Masks masks_;
  Codebook codebook_, codebook_above_;
  const uint8_t* values_;
};

class DenseInt8 {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) { values_ = w.block_values(block); }
  LOSA_INLINE __m512i next() {
    const __m512i levels = _mm512_loadu_si512(values_);
    values_ += 64;
    return levels;
  }
  LOSA_INLINE __m512i next_above() { return above(next()); }
  LOSA_INLINE void prefetch() const {
    for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(values_ + kPrefetchValues + 64 * line);
  }

 private:
  const uint8_t* values_;
};

class DenseInt4 {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    codebook_.start(load_codebook(w));
    values_ = w.block_values(block);
  }
  LOSA_INLINE __m512i next() {
    const __m512i levels = codebook_.levels(values_);
    values_ += 32;
    return levels;
  }
  LOSA_INLINE __m512i next_above() { return above(next()); }
  LOSA_INLINE void prefetch() const {
    for (int64_t line = 0; line < 2; ++line) __builtin_prefetch(values_ + kPrefetchValues + 64 * line);
  }

 private:
  Codebook codebook_;
  const uint8_t* values_;
};
