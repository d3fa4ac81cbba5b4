// The instructions of which gcc makes a mess: its intrinsics for sums of products copy each sum from register to
// register (12.2), and those for masks may go through a general register, which takes twice as long as from memory.
// vpexpand is written for a register that is source and destination at once: a Zen 5 waits for what the destination
// held before, though nothing of it remains, and so runs one expansion in 6.6 cycles instead of each cycle where a
// compiler reuses the register. The tests' emulated instructions (tests/native/emulated) stand in for intrinsics only.

#ifdef LOSA_EMULATED_AVX512

template <class Mask>
LOSA_INLINE static Mask load_mask(const uint8_t* from) {
  Mask mask;
  __builtin_memcpy(&mask, from, sizeof mask);
  return mask;
}
LOSA_INLINE static __mmask16 load_mask16(const uint8_t* from) { return load_mask<__mmask16>(from); }
LOSA_INLINE static __mmask32 load_mask32(const uint8_t* from) { return load_mask<__mmask32>(from); }
LOSA_INLINE static __mmask64 load_mask64(const uint8_t* from) { return load_mask<__mmask64>(from); }
LOSA_INLINE static __m512 expand_floats(__mmask16 kept, __m512 packed) { return _mm512_maskz_expand_ps(kept, packed); }
LOSA_INLINE static __m512i expand_words(__mmask32 kept, __m512i packed) {
  return _mm512_maskz_expand_epi16(kept, packed);
}
LOSA_INLINE static __m512i expand_bytes(__mmask64 kept, __m512i packed) {
  return _mm512_maskz_expand_epi8(kept, packed);
}
LOSA_INLINE static __m512i expand_bytes_into(__m512i others, __mmask64 kept, __m512i packed) {
  return _mm512_mask_expand_epi8(others, kept, packed);
}
LOSA_INLINE static void add_pairs(__m512i& sums, __m512i a, __m512i b) { sums = _mm512_dpwssd_epi32(sums, a, b); }
LOSA_INLINE static void add_quads(__m512i& sums, __m512i a, __m512i b) { sums = _mm512_dpbusd_epi32(sums, a, b); }
LOSA_INLINE static void add_pairs(__m512i& sums, __m512i a, const int32_t* b) {
  add_pairs(sums, a, _mm512_set1_epi32(*b));
}
LOSA_INLINE static void add_quads(__m512i& sums, __m512i a, const int32_t* b) {
  add_quads(sums, a, _mm512_set1_epi32(*b));
}

#else

LOSA_INLINE static __mmask16 load_mask16(const uint8_t* from) {
  __mmask16 mask;
  asm("kmovw %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const uint8_t(*)[2]>(from)));
  return mask;
}
LOSA_INLINE static __mmask32 load_mask32(const uint8_t* from) {
  __mmask32 mask;
  asm("kmovd %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const uint8_t(*)[4]>(from)));
  return mask;
}
LOSA_INLINE static __mmask64 load_mask64(const uint8_t* from) {
  __mmask64 mask;
  asm("kmovq %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const uint8_t(*)[8]>(from)));
  return mask;
}

/// The elements of `packed`, one after the other, where `kept` has a bit, and 0 elsewhere.
LOSA_INLINE static __m512 expand_floats(__mmask16 kept, __m512 packed) {
  asm("vexpandps %0, %0%{%1%}%{z%}" : "+v"(packed) : "Yk"(kept));
  return packed;
}
LOSA_INLINE static __m512i expand_words(__mmask32 kept, __m512i packed) {
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(packed) : "Yk"(kept));
  return packed;
}
LOSA_INLINE static __m512i expand_bytes(__mmask64 kept, __m512i packed) {
  asm("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(packed) : "Yk"(kept));
  return packed;
}

/// The same with bytes of `others` elsewhere.
LOSA_INLINE static __m512i expand_bytes_into(__m512i others, __mmask64 kept, __m512i packed) {
  asm("vpexpandb %2, %0%{%1%}" : "+v"(others) : "Yk"(kept), "v"(packed));
  return others;
}

/// Each sum + the products of two pairs of signed 16-bit integers.
LOSA_INLINE static void add_pairs(__m512i& sums, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}
/// Each sum + the products of four unsigned bytes of `a` and four signed ones of `b`.
LOSA_INLINE static void add_quads(__m512i& sums, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
}
/// The same with one pair or four for all sums.
LOSA_INLINE static void add_pairs(__m512i& sums, __m512i a, const int32_t* b) {
  asm("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(a), "m"(*b));
}
LOSA_INLINE static void add_quads(__m512i& sums, __m512i a, const int32_t* b) {
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sums) : "v"(a), "m"(*b));
}

#endif
