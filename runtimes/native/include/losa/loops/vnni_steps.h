// Steps of int8 and int4 weights, one after the other, as vectors of 64 signed bytes: byte 4 r + k % 4 is the level of
// row r in column k, and 0 where none is kept. There is a class for each way a weight is stored:
//   start(w, block)   begins with a block's first step
//   next()            the next step
//   prefetch()        asks memory for what four steps need later on

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

 private:
  const uint8_t* next_;
};

/// The levels of 64 codes, two to a byte, the low half first.
class Codebook {
 public:
  LOSA_INLINE void start(const int8_t* levels) {
    levels_ = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
  }

  LOSA_INLINE __m512i levels(const uint8_t* codes) const {
    // Four bytes to each 64 bits, of which every byte takes 8 bits that start with its code. The rest of them is no
    // matter: the codebook is there four times over.
    const __m512i first_bits = _mm512_set1_epi64(0x1c1814100c080400);
    const __m512i spread = _mm512_cvtepu32_epi64(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    return _mm512_permutexvar_epi8(_mm512_multishift_epi64_epi8(first_bits, spread), levels_);
  }

 private:
  __m512i levels_;
};

class SparseInt8 {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    masks_.start(w, block);
    values_ = w.block_values(block);
  }
  LOSA_INLINE __m512i next() {
    int64_t count;
    const __mmask64 kept = masks_.next(&count);
    const __m512i levels = expand_bytes(kept, _mm512_loadu_si512(values_));
    values_ += count;
    return levels;
  }
  LOSA_INLINE void prefetch() const {
    masks_.prefetch();
    __builtin_prefetch(values_ + kPrefetchValues);
    __builtin_prefetch(values_ + kPrefetchValues + 64);
  }

 private:
  Masks masks_;
  const uint8_t* values_;
};

class SparseInt4 {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    masks_.start(w, block);
    codebook_.start(w.codebook);
    values_ = w.block_values(block);
  }
  LOSA_INLINE __m512i next() {
    int64_t count;
    const __mmask64 kept = masks_.next(&count);
    const __m512i levels = expand_bytes(kept, codebook_.levels(values_));
    values_ += (count + 1) / 2;
    return levels;
  }
  LOSA_INLINE void prefetch() const {
    masks_.prefetch();
    __builtin_prefetch(values_ + kPrefetchValues);
  }

 private:
  Masks masks_;
  Codebook codebook_;
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
  LOSA_INLINE void prefetch() const {
    for (int64_t line = 0; line < 4; ++line) __builtin_prefetch(values_ + kPrefetchValues + 64 * line);
  }

 private:
  const uint8_t* values_;
};

class DenseInt4 {
 public:
  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    codebook_.start(w.codebook);
    values_ = w.block_values(block);
  }
  LOSA_INLINE __m512i next() {
    const __m512i levels = codebook_.levels(values_);
    values_ += 32;
    return levels;
  }
  LOSA_INLINE void prefetch() const {
    for (int64_t line = 0; line < 2; ++line) __builtin_prefetch(values_ + kPrefetchValues + 64 * line);
  }

 private:
  Codebook codebook_;
  const uint8_t* values_;
};
