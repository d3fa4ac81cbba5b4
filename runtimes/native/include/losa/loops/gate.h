// SwiGLU's pairing of two products. Plain loops: the compiler makes vectors of them under each row's flags.

LOSA_INLINE static uint32_t bits_of(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}

/// 2^n for -127 < n < 128.
LOSA_INLINE static float power_of_two(int32_t n) {
  const uint32_t bits = static_cast<uint32_t>(n + 127) << 23;
  float power;
  __builtin_memcpy(&power, &bits, sizeof power);
  return power;
}

/// e^x for x <= 0, infinity included; NaN stays NaN. Relative error at most 9e-8 where the result is a normal
/// number.
LOSA_INLINE static float exponential(float x) {
  x = x < -104.0f ? -104.0f : x;  // where the result is 0 already
  // x = n log(2) + rest with |rest| <= log(2) / 2. Adding 1.5 * 2^23 leaves no bits for a fraction, so the
  // sum's last bits are n.
  constexpr float kShift = 12582912.0f;
  const float shifted = x * 1.44269504f + kShift;
  const float n = shifted - kShift;
  // log(2) in two parts; n times the first is exact.
  const float rest = x - n * 0.693359375f - n * -2.12194440e-4f;
  // Least largest error over that range (4e-9), for the first two coefficients fixed at 1.
  float y = 1.38145988e-3f;
  y = y * rest + 8.36871658e-3f;
  y = y * rest + 4.16683890e-2f;
  y = y * rest + 1.66665211e-1f;
  y = y * rest + 4.99999940e-1f;
  y = y * (rest * rest) + rest + 1.0f;
  // 2^n as a product of two, since n may lie below the exponents of normal numbers.
  const int32_t exponent = static_cast<int32_t>(bits_of(shifted) - bits_of(kShift));
  const int32_t half = exponent >> 1;
  return y * power_of_two(half) * power_of_two(exponent - half);
}

static void gate(const float* products, int64_t tokens, int64_t outputs, float* y, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t first = 0; first < outputs; first += losa::kBlockRows, products += 2 * losa::kBlockRows) {
      float rows[losa::kBlockRows];
      for (int64_t r = 0; r < losa::kBlockRows; ++r) {
        const float z = products[r];
        // Where z < 0, the fraction of the definition times e^z above and below: nothing overflows.
        const float e = exponential(-__builtin_fabsf(z));
        const float silu = z * (z < 0.0f ? e : 1.0f) / (1.0f + e);
        rows[r] = silu * products[losa::kBlockRows + r];
      }
      copy_rows(rows, outputs - first, y + t * stride + first);
    }
  }
}
