// Rounds activations as scalar.cpp does, bit for bit.

/// |x| as bits: they are in the order of the numbers, with infinity and NaN above all others.
LOSA_INLINE static __m512i magnitudes(__m512 x) {
  return _mm512_and_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
}

/// The `lane`-th 16 of `count` floats; those beyond are zero.
LOSA_INLINE static __m512 load_up_to(const float* x, int64_t lane, int64_t count) {
  const int64_t left = count - lane;
  if (left >= kVectorLanes) return _mm512_loadu_ps(x + lane);
  return left <= 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(row_mask(left), x + lane);
}

static void round_tokens(const float* x, int64_t tokens, int64_t bits, const losa::RoundedTokens& rounded) {
  constexpr uint32_t kInfinity = 0x7f800000;
  const float largest = bits == 8 ? 127.0f : 32767.0f;
  for (int64_t token = 0; token < tokens; ++token) {
    int16_t* to = rounded.token(token);
    for (int64_t group = 0; group < rounded.groups(); ++group) {
      const int64_t first = group * rounded.group, left = rounded.columns - first;
      const float* from = x + token * rounded.columns + first;
      __m512i most = _mm512_setzero_si512();
      for (int64_t k = 0; k < rounded.group; k += kVectorLanes)
        most = _mm512_max_epu32(most, magnitudes(load_up_to(from, k, left)));
      const uint32_t amax_bits = _mm512_reduce_max_epu32(most);
      const float amax = losa::float_from_bits(amax_bits);
      // So small an amax that its inverse overflows counts as zero, as zero itself does.
      const float inverse = largest / amax;
      const bool finite = amax_bits < kInfinity, usable = finite && inverse <= 3.402823466e38f;
      rounded.token_scales(token)[group] = usable ? amax / largest : finite ? 0.0f : __builtin_nanf("");
      const __m512 factor = _mm512_set1_ps(usable ? inverse : 0.0f);
      for (int64_t k = 0; k < rounded.group; k += kVectorLanes) {
        const __m512i whole = _mm512_cvtps_epi32(_mm512_mul_ps(load_up_to(from, k, left), factor));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + first + k), _mm512_cvtepi32_epi16(whole));
      }
    }
  }
}
