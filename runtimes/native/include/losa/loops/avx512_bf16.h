// Pairs of bf16 in 16 lanes, as bf16.h wants them.

struct BfloatPairs : Floats {
  using Pairs = __m512i;

  static Pairs load_pairs(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static Pairs expand_pairs(const Word<BfloatPairs, uint16_t>& word, int bit) {
    return expand_words(load_mask32(word.masks + bit / 8), _mm512_loadu_si512(word.values + word.kept.before(bit)));
  }
  static Vector first(Pairs pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
  static Vector second(Pairs pairs) {
    return _mm512_castsi512_ps(_mm512_and_epi32(pairs, _mm512_set1_epi32(-0x10000)));
  }
  static void pair_row_masks(const uint8_t* masks, uint64_t (&rows)[losa::kBlockRows]) {
    uint16_t columns[64];
    for (int step = 0; step < 32; ++step) {
      uint32_t kept;
      __builtin_memcpy(&kept, masks + 4 * step, sizeof kept);
      columns[2 * step] = static_cast<uint16_t>(_pext_u32(kept, 0x55555555));
      columns[2 * step + 1] = static_cast<uint16_t>(_pext_u32(kept, 0xaaaaaaaa));
    }
    transpose_masks(columns, rows);
  }
};
