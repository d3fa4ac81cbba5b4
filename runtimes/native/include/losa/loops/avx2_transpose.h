// Turns 8 x 8 corners of 32-bit elements; included inside an anonymous namespace, as expand.h says.

/// to[j, i] = from[i, j] for i, j < 8. Writes row j at to + place(j).
template <class Place>
LOSA_INLINE static void transpose8_to(const float* from, int64_t from_stride, float* to, Place place) {
  __m256 rows[8];  // of 4 x 4 corners: left ones of input rows i and i + 4, then right ones
  for (int i = 0; i < 4; ++i) {
    const float* upper = from + i * from_stride;
    const float* lower = upper + 4 * from_stride;
    rows[i] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper)), _mm_loadu_ps(lower), 1);
    rows[i + 4] =
        _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(upper + 4)), _mm_loadu_ps(lower + 4), 1);
  }
#pragma GCC unroll 2
  for (int half = 0; half < 8; half += 4) {
    const __m256* r = rows + half;
    const __m256 low01 = _mm256_unpacklo_ps(r[0], r[1]), high01 = _mm256_unpackhi_ps(r[0], r[1]);
    const __m256 low23 = _mm256_unpacklo_ps(r[2], r[3]), high23 = _mm256_unpackhi_ps(r[2], r[3]);
    _mm256_storeu_ps(to + place(half), _mm256_shuffle_ps(low01, low23, 0x44));
    _mm256_storeu_ps(to + place(half + 1), _mm256_shuffle_ps(low01, low23, 0xee));
    _mm256_storeu_ps(to + place(half + 2), _mm256_shuffle_ps(high01, high23, 0x44));
    _mm256_storeu_ps(to + place(half + 3), _mm256_shuffle_ps(high01, high23, 0xee));
  }
}

/// to[j, i] = from[i, j] for i, j < 8.
LOSA_INLINE static void transpose8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  transpose8_to(from, from_stride, to, [=](int64_t j) { return j * to_stride; });
}
