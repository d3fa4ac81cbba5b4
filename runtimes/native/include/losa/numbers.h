// Number formats that C++17 has no types for. Inlined without exception (see LOSA_INLINE).
#pragma once
#include <cstdint>

#include "losa/weight.h"

namespace losa {

LOSA_INLINE float float_from_bits(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

/// bfloat16 is the upper half of a float32.
LOSA_INLINE float from_bf16(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }

/// IEEE binary16, subnormal numbers, infinities and NaN included.
LOSA_INLINE float from_fp16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = bits >> 10 & 31u, fraction = bits & 0x3ffu;
  if (exponent == 31) return float_from_bits(sign | 0x7f800000u | fraction << 13);
  if (exponent != 0) return float_from_bits(sign | (exponent + 112) << 23 | fraction << 13);
  const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign != 0 ? -magnitude : magnitude;
}

/// Element `index` at an address that need not be aligned.
template <class T>
LOSA_INLINE T load_at(const void* from, int64_t index) {
  T value;
  __builtin_memcpy(&value, static_cast<const char*>(from) + index * static_cast<int64_t>(sizeof(T)), sizeof value);
  return value;
}

}  // namespace losa
