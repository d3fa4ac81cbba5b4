// The AVX-512 instructions that the rows avx512*.cpp use, in plain C++ after their published descriptions, so that
// their loops are tested on processors without them. Found before the compiler's own header by -I.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#define LOSA_EMULATED_AVX512  // where a kernel has assembly, it takes the intrinsic instead

// The kernels' unrolled loops over these would take minutes to compile with optimisation and sanitizers. So the kernels
// are compiled without, and only what is here, each instruction a function of its own, with it.
#pragma GCC push_options
#pragma GCC optimize("O2")
#define EMULATED __attribute__((noinline)) inline

struct __m512 {
  float lane[16];
};
struct __m512i {
  uint8_t byte[64];
};
struct __m256i {
  uint8_t byte[32];
};
struct __m128i {
  uint8_t byte[16];
};
using __mmask8 = uint8_t;
using __mmask16 = uint16_t;
using __mmask32 = uint32_t;
using __mmask64 = uint64_t;

namespace emulated {

/// Lane `index` of a register, taken as lanes of type Lane.
template <class Lane, class Register>
Lane get(const Register& from, int index) {
  Lane value;
  std::memcpy(&value, reinterpret_cast<const char*>(&from) + index * sizeof value, sizeof value);
  return value;
}
template <class Lane, class Register>
void set(Register& to, int index, Lane value) {
  std::memcpy(reinterpret_cast<char*>(&to) + index * sizeof value, &value, sizeof value);
}

/// The register whose lane i is make(i).
template <class Lane, class Register, class Make>
Register lanes(Make make) {
  Register result;
  for (int i = 0; i < static_cast<int>(sizeof(Register) / sizeof(Lane)); ++i)
    set<Lane>(result, i, static_cast<Lane>(make(i)));
  return result;
}

template <class Register>
Register load(const void* from) {
  Register result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
/// Of what must be aligned to its size, on pain of a fault.
template <class Register>
Register load_aligned(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(Register) != 0) std::abort();
  return load<Register>(from);
}
template <class Register>
void store_aligned(void* to, const Register& value) {
  if (reinterpret_cast<uintptr_t>(to) % sizeof(Register) != 0) std::abort();
  std::memcpy(to, &value, sizeof value);
}

/// Lanes whose bit is set, from memory; the others are zero and not touched.
template <class Lane, class Register>
Register masked_load(uint64_t mask, const void* from) {
  return lanes<Lane, Register>([&](int i) {
    Lane value{};
    if (mask >> i & 1) std::memcpy(&value, static_cast<const char*>(from) + i * sizeof value, sizeof value);
    return value;
  });
}
/// Contiguous values to the lanes whose bit is set.
template <class Lane, class Register>
Register expand(uint64_t mask, const void* from) {
  const char* next = static_cast<const char*>(from);
  return lanes<Lane, Register>([&](int i) {
    Lane value{};
    if (mask >> i & 1) {
      std::memcpy(&value, next, sizeof value);
      next += sizeof value;
    }
    return value;
  });
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace emulated

// ---- floats ----

EMULATED __m512 _mm512_set1_ps(float value) {
  return emulated::lanes<float, __m512>([&](int) { return value; });
}
EMULATED __m512 _mm512_setzero_ps() { return _mm512_set1_ps(0.0f); }
EMULATED __m512 _mm512_loadu_ps(const void* from) { return emulated::load<__m512>(from); }
EMULATED void _mm512_storeu_ps(void* to, __m512 value) { std::memcpy(to, &value, sizeof value); }
EMULATED void _mm512_store_ps(void* to, __m512 value) { emulated::store_aligned(to, value); }
EMULATED __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) {
  return emulated::masked_load<float, __m512>(mask, from);
}
EMULATED void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 value) {
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<char*>(to) + 4 * i, &value.lane[i], 4);
}
EMULATED __m512 _mm512_maskz_expand_ps(__mmask16 mask, __m512 a) {
  return emulated::expand<float, __m512>(mask, &a);
}
EMULATED __m512 _mm512_add_ps(__m512 a, __m512 b) {
  return emulated::lanes<float, __m512>([&](int i) { return a.lane[i] + b.lane[i]; });
}
EMULATED __m512 _mm512_mul_ps(__m512 a, __m512 b) {
  return emulated::lanes<float, __m512>([&](int i) { return a.lane[i] * b.lane[i]; });
}
EMULATED __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return emulated::lanes<float, __m512>([&](int i) { return std::fma(a.lane[i], b.lane[i], c.lane[i]); });
}
EMULATED __m512 _mm512_cvtepi32_ps(__m512i a) {
  return emulated::lanes<float, __m512>([&](int i) { return static_cast<float>(emulated::get<int32_t>(a, i)); });
}
/// Rounds half to even; what int32 has no room for becomes its least.
EMULATED __m512i _mm512_cvtps_epi32(__m512 a) {
  return emulated::lanes<int32_t, __m512i>([&](int i) {
    const float whole = std::nearbyint(a.lane[i]);
    return whole >= -2147483648.0f && whole < 2147483648.0f ? static_cast<int32_t>(whole) : INT32_MIN;
  });
}
/// IEEE binary16.
EMULATED __m512 _mm512_cvtph_ps(__m256i a) {
  return emulated::lanes<float, __m512>([&](int i) {
    const uint32_t half = emulated::get<uint16_t>(a, i), sign = (half & 0x8000u) << 16;
    const int exponent = static_cast<int>(half >> 10 & 31u);
    const float fraction = static_cast<float>(half & 0x3ffu);
    if (exponent == 31) return emulated::bits_to_float(sign | 0x7f800000u | (half & 0x3ffu) << 13);
    const float size = exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024.0f + fraction, exponent - 25);
    return sign != 0 ? -size : size;
  });
}
EMULATED __m512i _mm512_castps_si512(__m512 a) { return emulated::load<__m512i>(&a); }
EMULATED __m512 _mm512_castsi512_ps(__m512i a) { return emulated::load<__m512>(&a); }

// ---- integers: loads, stores, constants ----

EMULATED __m512i _mm512_loadu_si512(const void* from) { return emulated::load<__m512i>(from); }
EMULATED __m512i _mm512_load_si512(const void* from) { return emulated::load_aligned<__m512i>(from); }
EMULATED void _mm512_store_si512(void* to, __m512i value) { emulated::store_aligned(to, value); }
EMULATED __m512i _mm512_maskz_loadu_epi32(__mmask16 mask, const void* from) {
  return emulated::masked_load<int32_t, __m512i>(mask, from);
}
EMULATED __m512i _mm512_maskz_loadu_epi64(__mmask8 mask, const void* from) {
  return emulated::masked_load<int64_t, __m512i>(mask, from);
}
EMULATED __m512i _mm512_maskz_expand_epi16(__mmask32 mask, __m512i a) {
  return emulated::expand<uint16_t, __m512i>(mask, &a);
}
EMULATED __m512i _mm512_maskz_expand_epi8(__mmask64 mask, __m512i a) {
  return emulated::expand<uint8_t, __m512i>(mask, &a);
}
EMULATED __m512i _mm512_mask_expand_epi8(__m512i others, __mmask64 mask, __m512i a) {
  const __m512i expanded = _mm512_maskz_expand_epi8(mask, a);
  return emulated::lanes<uint8_t, __m512i>(
      [&](int i) { return mask >> i & 1 ? expanded.byte[i] : others.byte[i]; });
}
EMULATED __m512i _mm512_set1_epi8(char value) {
  return emulated::lanes<char, __m512i>([&](int) { return value; });
}
EMULATED __m512i _mm512_set1_epi16(short value) {
  return emulated::lanes<short, __m512i>([&](int) { return value; });
}
EMULATED __m512i _mm512_set1_epi32(int value) {
  return emulated::lanes<int, __m512i>([&](int) { return value; });
}
EMULATED __m512i _mm512_set1_epi64(long long value) {
  return emulated::lanes<long long, __m512i>([&](int) { return value; });
}
EMULATED __m512i _mm512_setzero_si512() { return _mm512_set1_epi32(0); }
EMULATED __m512i _mm512_broadcast_i32x4(__m128i a) {
  return emulated::lanes<__m128i, __m512i>([&](int) { return a; });
}

// ---- integers: arithmetic ----

EMULATED __m512i _mm512_add_epi32(__m512i a, __m512i b) {
  return emulated::lanes<uint32_t, __m512i>(
      [&](int i) { return emulated::get<uint32_t>(a, i) + emulated::get<uint32_t>(b, i); });
}
EMULATED __m512i _mm512_sub_epi32(__m512i a, __m512i b) {
  return emulated::lanes<uint32_t, __m512i>(
      [&](int i) { return emulated::get<uint32_t>(a, i) - emulated::get<uint32_t>(b, i); });
}
EMULATED __m512i _mm512_and_epi32(__m512i a, __m512i b) {
  return emulated::lanes<uint8_t, __m512i>([&](int i) { return a.byte[i] & b.byte[i]; });
}
EMULATED __m512i _mm512_or_si512(__m512i a, __m512i b) {
  return emulated::lanes<uint8_t, __m512i>([&](int i) { return a.byte[i] | b.byte[i]; });
}
EMULATED __m512i _mm512_xor_si512(__m512i a, __m512i b) {
  return emulated::lanes<uint8_t, __m512i>([&](int i) { return a.byte[i] ^ b.byte[i]; });
}
/// Bit 4 a + 2 b + c of `table`, for each bit of the three.
EMULATED __m512i _mm512_ternarylogic_epi32(__m512i a, __m512i b, __m512i c, int table) {
  return emulated::lanes<uint8_t, __m512i>([&](int i) {
    int result = 0;
    for (int bit = 0; bit < 8; ++bit) {
      const int entry = (a.byte[i] >> bit & 1) * 4 + (b.byte[i] >> bit & 1) * 2 + (c.byte[i] >> bit & 1);
      result |= (table >> entry & 1) << bit;
    }
    return result;
  });
}
EMULATED __m512i _mm512_slli_epi16(__m512i a, unsigned count) {
  return emulated::lanes<uint16_t, __m512i>([&](int i) { return emulated::get<uint16_t>(a, i) << count; });
}
EMULATED __m512i _mm512_srli_epi16(__m512i a, unsigned count) {
  return emulated::lanes<uint16_t, __m512i>([&](int i) { return emulated::get<uint16_t>(a, i) >> count; });
}
EMULATED __m512i _mm512_srai_epi16(__m512i a, unsigned count) {
  return emulated::lanes<int16_t, __m512i>([&](int i) { return emulated::get<int16_t>(a, i) >> count; });
}
EMULATED __m512i _mm512_slli_epi32(__m512i a, unsigned count) {
  return emulated::lanes<uint32_t, __m512i>([&](int i) { return emulated::get<uint32_t>(a, i) << count; });
}
EMULATED __m512i _mm512_max_epu32(__m512i a, __m512i b) {
  return emulated::lanes<uint32_t, __m512i>([&](int i) {
    const uint32_t x = emulated::get<uint32_t>(a, i), y = emulated::get<uint32_t>(b, i);
    return x > y ? x : y;
  });
}
EMULATED unsigned _mm512_reduce_max_epu32(__m512i a) {
  unsigned most = 0;
  for (int i = 0; i < 16; ++i)
    if (emulated::get<uint32_t>(a, i) > most) most = emulated::get<uint32_t>(a, i);
  return most;
}
EMULATED int _mm512_reduce_add_epi32(__m512i a) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += emulated::get<uint32_t>(a, i);
  return static_cast<int>(sum);
}
EMULATED __mmask64 _mm512_test_epi8_mask(__m512i a, __m512i b) {
  __mmask64 mask = 0;
  for (int i = 0; i < 64; ++i) mask |= static_cast<__mmask64>((a.byte[i] & b.byte[i]) != 0) << i;
  return mask;
}
/// Products of signed 16-bit integers, neighbours summed up; wraps.
EMULATED __m512i _mm512_madd_epi16(__m512i a, __m512i b) {
  return emulated::lanes<uint32_t, __m512i>([&](int i) {
    uint32_t sum = 0;
    for (int j = 2 * i; j < 2 * i + 2; ++j)
      sum += static_cast<uint32_t>(int32_t{emulated::get<int16_t>(a, j)} * emulated::get<int16_t>(b, j));
    return sum;
  });
}
EMULATED __m512i _mm512_dpwssd_epi32(__m512i sums, __m512i a, __m512i b) {
  return _mm512_add_epi32(sums, _mm512_madd_epi16(a, b));
}
/// Adds four products of unsigned bytes of a and signed bytes of b; wraps.
EMULATED __m512i _mm512_dpbusd_epi32(__m512i sums, __m512i a, __m512i b) {
  return emulated::lanes<uint32_t, __m512i>([&](int i) {
    uint32_t sum = emulated::get<uint32_t>(sums, i);
    for (int j = 4 * i; j < 4 * i + 4; ++j)
      sum += static_cast<uint32_t>(int32_t{a.byte[j]} * static_cast<int8_t>(b.byte[j]));
    return sum;
  });
}

// ---- integers: lanes that move ----

EMULATED __m512i _mm512_shuffle_epi8(__m512i a, __m512i from) {
  return emulated::lanes<uint8_t, __m512i>(
      [&](int i) { return from.byte[i] & 0x80 ? 0 : a.byte[i / 16 * 16 + (from.byte[i] & 15)]; });
}
EMULATED __m512i _mm512_permutexvar_epi8(__m512i from, __m512i a) {
  return emulated::lanes<uint8_t, __m512i>([&](int i) { return a.byte[from.byte[i] & 63]; });
}
EMULATED __m512i _mm512_permutex2var_epi32(__m512i a, __m512i from, __m512i b) {
  return emulated::lanes<uint32_t, __m512i>([&](int i) {
    const int index = static_cast<int>(emulated::get<uint32_t>(from, i));
    return emulated::get<uint32_t>(index & 16 ? b : a, index & 15);
  });
}
EMULATED __m512i _mm512_permutex2var_epi64(__m512i a, __m512i from, __m512i b) {
  return emulated::lanes<uint64_t, __m512i>([&](int i) {
    const int index = static_cast<int>(emulated::get<uint64_t>(from, i));
    return emulated::get<uint64_t>(index & 8 ? b : a, index & 7);
  });
}
EMULATED __m512i _mm512_cvtepu8_epi16(__m256i a) {
  return emulated::lanes<uint16_t, __m512i>([&](int i) { return a.byte[i]; });
}
EMULATED __m256i _mm512_cvtepi16_epi8(__m512i a) {
  return emulated::lanes<uint8_t, __m256i>([&](int i) { return emulated::get<uint16_t>(a, i); });
}
EMULATED __m256i _mm512_cvtepi32_epi16(__m512i a) {
  return emulated::lanes<uint16_t, __m256i>([&](int i) { return emulated::get<uint32_t>(a, i); });
}
/// The upper half is undefined: here, whatever is unlikely to pass for a result.
EMULATED __m512i _mm512_castsi256_si512(__m256i a) {
  return emulated::lanes<__m256i, __m512i>(
      [&](int i) { return i == 0 ? a : emulated::load<__m256i>("undefined upper half of 512 bits"); });
}
EMULATED __m256i _mm512_castsi512_si256(__m512i a) { return emulated::get<__m256i>(a, 0); }
EMULATED __m256i _mm512_extracti64x4_epi64(__m512i a, int half) { return emulated::get<__m256i>(a, half & 1); }
EMULATED __m512i _mm512_inserti64x4(__m512i a, __m256i b, int half) {
  emulated::set(a, half & 1, b);
  return a;
}

// ---- 256 and 128 bits ----

EMULATED __m256i _mm256_loadu_si256(const __m256i* from) { return emulated::load<__m256i>(from); }
EMULATED void _mm256_storeu_si256(__m256i* to, __m256i value) {
  std::memcpy(static_cast<void*>(to), &value, sizeof value);
}
EMULATED void _mm256_store_si256(__m256i* to, __m256i value) { emulated::store_aligned(to, value); }
EMULATED __m256i _mm256_setzero_si256() { return {}; }
EMULATED __m256i _mm256_set1_epi8(char value) {
  return emulated::lanes<char, __m256i>([&](int) { return value; });
}
EMULATED __m256i _mm256_or_si256(__m256i a, __m256i b) {
  return emulated::lanes<uint8_t, __m256i>([&](int i) { return a.byte[i] | b.byte[i]; });
}
EMULATED __m256i _mm256_slli_epi16(__m256i a, int count) {
  return emulated::lanes<uint16_t, __m256i>([&](int i) { return emulated::get<uint16_t>(a, i) << count; });
}
EMULATED __m256i _mm256_cvtepu8_epi16(__m128i a) {
  return emulated::lanes<uint16_t, __m256i>([&](int i) { return a.byte[i]; });
}
EMULATED __m256i _mm256_permutexvar_epi8(__m256i from, __m256i a) {
  return emulated::lanes<uint8_t, __m256i>([&](int i) { return a.byte[from.byte[i] & 31]; });
}
EMULATED __m256i _mm256_xor_si256(__m256i a, __m256i b) {
  return emulated::lanes<uint8_t, __m256i>([&](int i) { return a.byte[i] ^ b.byte[i]; });
}
EMULATED __m256i _mm256_shuffle_epi8(__m256i a, __m256i from) {
  return emulated::lanes<uint8_t, __m256i>(
      [&](int i) { return from.byte[i] & 0x80 ? 0 : a.byte[i / 16 * 16 + (from.byte[i] & 15)]; });
}
EMULATED __m256i _mm256_broadcastsi128_si256(__m128i a) {
  return emulated::lanes<__m128i, __m256i>([&](int) { return a; });
}
EMULATED __m128i _mm_loadu_si128(const __m128i* from) { return emulated::load<__m128i>(from); }
EMULATED __m128i _mm_setr_epi8(char a, char b, char c, char d, char e, char f, char g, char h, char i, char j, char k,
                             char l, char m, char n, char o, char p) {
  const char bytes[16] = {a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p};
  return emulated::load<__m128i>(bytes);
}

// ---- general registers ----

/// The bits of `a` that `mask` selects, next to each other.
EMULATED unsigned _pext_u32(unsigned a, unsigned mask) {
  unsigned result = 0;
  for (int from = 0, to = 0; from < 32; ++from)
    if (mask >> from & 1) result |= (a >> from & 1) << to++;
  return result;
}
/// The lowest bits of `a` where `mask` has ones.
EMULATED uint64_t _pdep_u64(uint64_t a, uint64_t mask) {
  uint64_t result = 0;
  for (int from = 0, to = 0; to < 64; ++to)
    if (mask >> to & 1) result |= (a >> from++ & 1) << to;
  return result;
}
#pragma GCC pop_options
