// What all files of ARM rows share. Included inside an anonymous namespace like the rest of this folder.

/// How many values each byte of eight mask bytes keeps, summed up: ARM counts bits only byte by byte, and only in
/// vector registers, so that counting each part anew would cost a way there and back.
struct NeonMask {
  uint64_t ends;  // byte i: values kept in bytes 0 to i

  LOSA_INLINE explicit NeonMask(uint8x8_t masks)
      : ends(vget_lane_u64(vreinterpret_u64_u8(vcnt_u8(masks)), 0) * 0x0101010101010101u) {}
  LOSA_INLINE explicit NeonMask(const uint8_t* masks) : NeonMask(vld1_u8(masks)) {}
  LOSA_INLINE int64_t before(int bit) const { return bit == 0 ? 0 : ends >> (bit - 8) & 255; }
  LOSA_INLINE int64_t count() const { return static_cast<int64_t>(ends >> 56); }
};

/// `parts[i]` has a byte for each of 16 rows; afterwards row r has its eight bytes, that of part 0 first.
LOSA_INLINE static void bytes_of_rows(const uint8x16_t (&parts)[8], uint64_t (&rows)[losa::kBlockRows]) {
  uint8x16_t from[8], to[8];
  for (int i = 0; i < 8; ++i) from[i] = parts[i];
  for (int level = 0; level < 3; ++level) {  // of a perfect shuffle of all 128 bytes
    for (int i = 0; i < 4; ++i) {
      to[2 * i] = vzip1q_u8(from[i], from[i + 4]);
      to[2 * i + 1] = vzip2q_u8(from[i], from[i + 4]);
    }
    for (int i = 0; i < 8; ++i) from[i] = to[i];
  }
  for (int i = 0; i < 8; ++i) vst1q_u64(rows + 2 * i, vreinterpretq_u64_u8(from[i]));
}

/// Appends one bit to each byte from above: whether `bytes` has any of `bits`. After eight of them, the first one is
/// the lowest.
LOSA_INLINE static uint8x16_t append_bit(uint8x16_t so_far, uint8x16_t bytes, uint8x16_t bits) {
  return vsriq_n_u8(vtstq_u8(bytes, bits), so_far, 1);
}

/// to[j] = lane j of the rows, for four rows of four.
LOSA_INLINE static void transpose4(const int32x4_t (&rows)[4], int32x4_t (&to)[4]) {
  const int64x2_t even01 = vreinterpretq_s64_s32(vtrn1q_s32(rows[0], rows[1]));
  const int64x2_t odd01 = vreinterpretq_s64_s32(vtrn2q_s32(rows[0], rows[1]));
  const int64x2_t even23 = vreinterpretq_s64_s32(vtrn1q_s32(rows[2], rows[3]));
  const int64x2_t odd23 = vreinterpretq_s64_s32(vtrn2q_s32(rows[2], rows[3]));
  to[0] = vreinterpretq_s32_s64(vtrn1q_s64(even01, even23));
  to[1] = vreinterpretq_s32_s64(vtrn1q_s64(odd01, odd23));
  to[2] = vreinterpretq_s32_s64(vtrn2q_s64(even01, even23));
  to[3] = vreinterpretq_s32_s64(vtrn2q_s64(odd01, odd23));
}

/// As prefill.h wants it.
LOSA_INLINE static void transpose_eight(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 8; j += 4) {
      int32x4_t rows[4], columns[4];
      for (int k = 0; k < 4; ++k) rows[k] = vreinterpretq_s32_f32(vld1q_f32(from + (i + k) * from_stride + j));
      transpose4(rows, columns);
      for (int k = 0; k < 4; ++k) vst1q_f32(to + (j + k) * to_stride + i, vreinterpretq_f32_s32(columns[k]));
    }
  }
}
