// Few tokens: a block's sums stay in registers, and x is read where it lies.
//
// One pass over the compressed weight, which for one token is bound by memory. Lanes run along rows, so
// there are no horizontal sums. V also gives kDecodeSums, how many partial sums two or more tokens need to
// keep enough multiply-adds in flight; one token has four.

template <class V, class From = Fp32<V>>
struct Decode {
  using Vector = typename V::Vector;
  using Packed = typename From::Packed;
  static constexpr int kParts = losa::kBlockRows / V::kLanes;  // vectors that cover a block's rows
  static constexpr int64_t kMaxTokens = 6;  // their sums and a column fit in 16 registers of 8 lanes
  // Values are one long stream; the processor's own prefetching stops at each page. Memory takes about
  // 130 ns to answer, in which a core comes 2 KiB of values further; half the distance is 5 % slower.
  static constexpr int64_t kPrefetchBytes = 2048;

  template <class Word>
  LOSA_INLINE static void expand(const Word& word, int i, Packed (&packed)[kParts]) {
    for (int part = 0; part < kParts; ++part) packed[part] = From::packed(word, i, part);
  }

  template <int Tokens, int Sums>
  LOSA_INLINE static void add_column(const Packed (&packed)[kParts], int column, const float* x, int64_t stride,
                                     int sum, Vector (&sums)[Tokens][Sums][kParts]) {
    Vector weights[kParts];
    for (int part = 0; part < kParts; ++part) weights[part] = From::column(packed[part], column % From::kTogether);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const auto activation = V::broadcast(x + t * stride + column);
      for (int part = 0; part < kParts; ++part)
        sums[t][sum][part] = V::multiply_add(weights[part], activation, sums[t][sum][part]);
    }
  }

  /// `Sums` partial sums, each over every Sums-th column.
  template <int Tokens, int Sums>
  static void block(const losa::Weight& w, int64_t index, const float* x, float* y) {
    const int64_t columns = w.columns;
    typename From::Words words;
    words.start(w, index);
    Vector sums[Tokens][Sums][kParts];
    for (int t = 0; t < Tokens; ++t)
      for (int s = 0; s < Sums; ++s)
        for (int part = 0; part < kParts; ++part) sums[t][s][part] = V::zero();

    Packed packed[kParts];
    int64_t k = 0;
    for (; k + kWordColumns <= columns; k += kWordColumns, x += kWordColumns) {
      __builtin_prefetch(static_cast<const char*>(words.values()) + kPrefetchBytes);
      __builtin_prefetch(static_cast<const char*>(words.values()) + kPrefetchBytes + 64);
      const auto word = words.next();
#pragma GCC unroll 4
      for (int column = 0; column < kWordColumns; ++column) {
        if (column % From::kTogether == 0) expand(word, column / From::kTogether, packed);
        add_column(packed, column, x, columns, column % Sums, sums);
      }
    }
    if (k < columns) {
      uint8_t padded[8];
      const auto word = words.last(columns - k, padded);
      for (int column = 0; column < columns - k; ++column) {
        expand(word, column / From::kTogether, packed);
        add_column(packed, column, x, columns, 0, sums);
      }
    }

    float rows[losa::kBlockRows];
    const int64_t first_row = index * losa::kBlockRows;
    for (int t = 0; t < Tokens; ++t) {
      for (int s = 1; s < Sums; ++s)
        for (int part = 0; part < kParts; ++part)
          sums[t][0][part] = V::add(sums[t][0][part], sums[t][s][part]);
      for (int part = 0; part < kParts; ++part) V::store(rows + part * V::kLanes, sums[t][0][part]);
      copy_rows(rows, w.rows - first_row, y + t * w.rows + first_row);
    }
  }

  static void run(const losa::Weight& w, losa::BlockRange blocks, const float* x, int64_t tokens,
                  float* y) {
    const int64_t groups = (tokens + kMaxTokens - 1) / kMaxTokens;
    for (int64_t index = blocks.first; index < blocks.last; ++index) {
      int64_t token = 0;
      for (int64_t group = groups; group > 0; --group) {
        const int64_t count = (tokens - token + group - 1) / group;  // 7 tokens as 4 + 3, not 6 + 1
        const float* from = x + token * w.columns;
        float* to = y + token * w.rows;
        switch (count) {
          case 1: block<1, 4>(w, index, from, to); break;
          case 2: block<2, V::kDecodeSums>(w, index, from, to); break;
          case 3: block<3, V::kDecodeSums>(w, index, from, to); break;
          case 4: block<4, V::kDecodeSums>(w, index, from, to); break;
          case 5: block<5, V::kDecodeSums>(w, index, from, to); break;
          default: block<6, V::kDecodeSums>(w, index, from, to); break;
        }
        token += count;
      }
    }
  }
};
