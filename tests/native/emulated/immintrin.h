// The AVX-512 instructions that avx512.cpp uses, in plain C++ after their published descriptions, so that
// its loops are tested on processors without them. Found before the compiler's own header by -I.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

struct __m512 {
  float lane[16];
};
using __mmask16 = uint16_t;

inline __m512 _mm512_set1_ps(float value) {
  __m512 result;
  for (float& lane : result.lane) lane = value;
  return result;
}
inline __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
inline __m512 _mm512_loadu_ps(const void* from) {
  __m512 result;
  std::memcpy(result.lane, from, sizeof result.lane);
  return result;
}
inline void _mm512_storeu_ps(void* to, __m512 value) { std::memcpy(to, value.lane, sizeof value.lane); }
inline __m512 _mm512_add_ps(__m512 a, __m512 b) {
  for (int i = 0; i < 16; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  for (int i = 0; i < 16; ++i) c.lane[i] = std::fma(a.lane[i], b.lane[i], c.lane[i]);
  return c;
}
/// Contiguous floats from memory to the lanes whose bit is set; reads no further than it needs.
inline __m512 _mm512_maskz_expandloadu_ps(__mmask16 mask, const void* from) {
  __m512 result = _mm512_setzero_ps();
  const char* next = static_cast<const char*>(from);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) {
      std::memcpy(&result.lane[i], next, sizeof(float));
      next += sizeof(float);
    }
  }
  return result;
}
