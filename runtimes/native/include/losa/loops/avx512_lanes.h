// Small pieces that the AVX-512 rows share: floats at the end of a row, and 8 x 8 transpositions.

constexpr int kVectorLanes = 16;

/// The first `Lanes` of 16 floats: 8 of them for the last tokens of a tile, whose width is a multiple of 8.
template <int Lanes>
constexpr __mmask16 kLaneMask = static_cast<__mmask16>((1u << Lanes) - 1);

/// A number of lanes as a type, for a choice while compiling.
template <int Count>
struct Lanes {
  constexpr int operator()() const { return Count; }
};

template <int Lanes>
LOSA_INLINE static __m512 load_floats(const float* from) {
  if constexpr (Lanes == kVectorLanes) return _mm512_loadu_ps(from);
  return _mm512_maskz_loadu_ps(kLaneMask<Lanes>, from);
}

template <int Lanes>
LOSA_INLINE static void store_floats(float* to, __m512 values) {
  if constexpr (Lanes == kVectorLanes)
    _mm512_storeu_ps(to, values);
  else
    _mm512_mask_storeu_ps(to, kLaneMask<Lanes>, values);
}

/// The rows of a block that exist: `count` is how many are left from its first row on.
LOSA_INLINE static __mmask16 row_mask(int64_t count) {
  return static_cast<__mmask16>(count >= losa::kBlockRows ? 0xffffu : (1u << count) - 1);
}

/// Indices for transpose8: a vector holds row i and, above it, row i + 4.
struct TransposeTable {
  alignas(64) int32_t pairs[2][kVectorLanes];   // of two such vectors, columns 0..3 and 4..7: four rows each
  alignas(64) int32_t eights[2][kVectorLanes];  // of two of those, the first two columns and the others: eight rows
  constexpr TransposeTable() : pairs(), eights() {
    for (int half = 0; half < 2; ++half) {
      for (int column = 0; column < 4; ++column) {
        for (int upper = 0; upper < 2; ++upper) {
          const int from = 8 * upper + 4 * half + column;
          pairs[half][4 * column + 2 * upper] = from;
          pairs[half][4 * column + 2 * upper + 1] = kVectorLanes + from;
        }
      }
      for (int row = 0; row < 8; ++row) {
        const int source = row / 2 % 2 * kVectorLanes, place = row / 4 * 2 + row % 2;
        eights[half][row] = source + 8 * half + place;
        eights[half][8 + row] = source + 8 * half + 4 + place;
      }
    }
  }
};
constexpr TransposeTable kTranspose;

/// to[j * stride + i] = element j of row(i), for i < 8 and j < count <= 8; rows are 8 elements of 4 bytes, and
/// `stride` counts elements.
template <class Row>
LOSA_INLINE static void transpose8(Row row, int64_t count, void* to, int64_t stride) {
  const auto rows = [&](int i) { return _mm512_inserti64x4(_mm512_castsi256_si512(row(i)), row(i + 4), 1); };
  const __m512i a = rows(0), b = rows(1), c = rows(2), d = rows(3);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i pairs = _mm512_load_si512(kTranspose.pairs[half]);
    const __m512i ab = _mm512_permutex2var_epi32(a, pairs, b), cd = _mm512_permutex2var_epi32(c, pairs, d);
#pragma GCC unroll 2
    for (int two = 0; two < 2; ++two) {
      const __m512i columns = _mm512_permutex2var_epi32(ab, _mm512_load_si512(kTranspose.eights[two]), cd);
      const int64_t column = 4 * half + 2 * two;
      char* first = static_cast<char*>(to) + column * stride * 4;
      if (column < count) _mm256_storeu_si256(reinterpret_cast<__m256i*>(first), _mm512_castsi512_si256(columns));
      if (column + 1 < count)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(first + stride * 4), _mm512_extracti64x4_epi64(columns, 1));
    }
  }
}

/// to[j, i] = from[i, j] for i, j < 8.
LOSA_INLINE static void transpose_floats8(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  const auto row = [&](int i) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i * from_stride)); };
  transpose8(row, 8, to, to_stride);
}

/// A tile of `elements` of four bytes for its tokens, padded with zero tokens: to[element * width + token].
/// piece(token, first) gives eight elements of a token from `first` on, or as many as there are and any others.
template <class Piece>
static void pack_pieces(Piece piece, const losa::TokenTile& tile, int64_t elements, int32_t* to) {
  constexpr int64_t kPart = 64;  // elements, whose part of the tile stays in the L1 cache while it is written
  for (int64_t part = 0; part < elements; part += kPart) {
    const int64_t end = part + kPart < elements ? part + kPart : elements;
    for (int64_t t = 0; t < tile.width; t += 8) {
      for (int64_t e = part; e < end; e += 8) {
        const auto row = [&](int64_t i) { return t + i < tile.tokens ? piece(t + i, e) : _mm256_setzero_si256(); };
        transpose8(row, end - e < 8 ? end - e : 8, to + e * tile.width + t, tile.width);
      }
    }
  }
}

/// Bit e of rows[r] = bit r of elements[e].
LOSA_INLINE static void transpose_masks(const uint16_t (&elements)[64], uint64_t (&rows)[losa::kBlockRows]) {
  const __m512i first = _mm512_loadu_si512(elements), second = _mm512_loadu_si512(elements + 32);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {  // rows 0..7, whose bits are the lower bytes, then 8..15
    const __m256i of_first = _mm512_cvtepi16_epi8(half == 0 ? first : _mm512_srli_epi16(first, 8));
    const __m256i of_second = _mm512_cvtepi16_epi8(half == 0 ? second : _mm512_srli_epi16(second, 8));
    const __m512i bytes = _mm512_inserti64x4(_mm512_castsi256_si512(of_first), of_second, 1);
#pragma GCC unroll 8
    for (int row = 0; row < 8; ++row)
      rows[8 * half + row] = _mm512_test_epi8_mask(bytes, _mm512_set1_epi8(static_cast<char>(1 << row)));
  }
}
