// Which elements of a row are kept, from the masks of steps.

/// Indices for TurnedMasks.
struct MaskTurns {
  alignas(64) uint8_t bytes[64];        // eight by eight bytes turned
  alignas(64) uint64_t eights[2][8];    // of two vectors, rows 0 to 7 or 8 to 15: their eights of steps side by side
  alignas(64) uint64_t sixteens[2][8];  // of two of those, the first four rows or the other four: sixteens side by side
  constexpr MaskTurns() : bytes(), eights(), sixteens() {
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i % 8 * 8 + i / 8);
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < 8; ++i) {
        eights[half][i] = static_cast<uint64_t>(i % 2 * 8 + 4 * half + i / 2);
        sixteens[half][i] = static_cast<uint64_t>(i / 2 % 2 * 8 + 4 * half + i / 4 * 2 + i % 2);
      }
    }
  }
};
constexpr MaskTurns kMaskTurns;

/// The masks of up to 32 steps, one bit for each of four columns and 16 rows, turned so that a row's bits lie together.
class TurnedMasks {
 public:
  LOSA_INLINE TurnedMasks(const uint8_t* masks, int64_t steps) {
    __m512i eights[4];  // of eight steps each: first the eight bytes of rows 0 and 1, then those of rows 2 and 3, ...
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const int64_t left = steps - 8 * i;
      __m512i in_steps = _mm512_setzero_si512();
      if (left >= 8)
        in_steps = _mm512_loadu_si512(masks + 64 * i);
      else if (left > 0)
        in_steps = _mm512_maskz_loadu_epi64(static_cast<__mmask8>((1 << left) - 1), masks + 64 * i);
      eights[i] = _mm512_permutexvar_epi8(_mm512_load_si512(kMaskTurns.bytes), in_steps);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i pairs = _mm512_load_si512(kMaskTurns.eights[half]);
      const __m512i first = _mm512_permutex2var_epi64(eights[0], pairs, eights[1]);
      const __m512i second = _mm512_permutex2var_epi64(eights[2], pairs, eights[3]);
#pragma GCC unroll 2
      for (int quarter = 0; quarter < 2; ++quarter)
        fours_[2 * half + quarter] =
            _mm512_permutex2var_epi64(first, _mm512_load_si512(kMaskTurns.sixteens[quarter]), second);
    }
  }

  /// Bit e of kept[r]: does row r keep any of `Columns` (bit c: column c) in step e?
  template <int Columns, class Bits>
  LOSA_INLINE void steps_with(Bits (&kept)[losa::kBlockRows]) const {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const uint64_t even = _mm512_test_epi8_mask(fours_[i], _mm512_set1_epi8(Columns));
      const uint64_t odd = _mm512_test_epi8_mask(fours_[i], _mm512_set1_epi8(static_cast<char>(Columns << 4)));
      kept[4 * i] = static_cast<uint32_t>(even);
      kept[4 * i + 1] = static_cast<uint32_t>(odd);
      kept[4 * i + 2] = static_cast<uint32_t>(even >> 32);
      kept[4 * i + 3] = static_cast<uint32_t>(odd >> 32);
    }
  }

 private:
  __m512i fours_[4];  // of four rows each: a byte of rows 4 i and 4 i + 1 for each step, then of rows 4 i + 2 and 4 i + 3
};
