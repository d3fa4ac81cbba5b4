// Few tokens: a block's sums stay in registers, and activations come from a panel, as many columns as the L1 cache
// holds. There they lie as the multiply-adds want them. Rows of x would lie at multiples of a page all too often, where
// few of them fit that cache at once; in a panel no two tokens do.
//
// Kernel<Tokens> gives
//   kPanelColumns                  columns that its panel has room for, a multiple of kMaxGroup
//   Walk                           walks the weights of a block: start(w, index)
//   begin(x, first, count)         makes or finds the panel of columns [first, first + count) of x
//   kBlocks                        blocks it likes to take at once, 1 or 2
//   blocks(w, index, first, count, walks, y)
//                                  adds the products of those columns, with which `walks` go on, to y; if they are the
//                                  first ones, it finds y unset. An array of one walk or of kBlocks of them
// X gives from(token): the tokens from that one on.

constexpr int64_t kMaxDecodeTokens = 8;   // whose sums and results stay in registers
constexpr int64_t kPanelElements = 8192;  // of four bytes. As much as an L1 cache, but read one line after the other
constexpr int64_t kPanelBlocks = 64;      // that share a panel

/// Columns of a panel. As long as all columns fit, the values of all blocks are one long stream.
constexpr int64_t panel_columns(int64_t tokens, int64_t columns_of_element) {
  return kPanelElements / tokens * columns_of_element / losa::kMaxGroup * losa::kMaxGroup;
}

/// Blocks from `index` on; returns how many.
template <int Blocks, class Kernel>
LOSA_INLINE static int walk_blocks(const Kernel& kernel, const losa::Weight& w, int64_t index, int64_t first,
                                   int64_t count, typename Kernel::Walk* walks, float* y) {
  typename Kernel::Walk walking[Blocks];  // in registers
  for (int b = 0; b < Blocks; ++b) {
    if (first == 0) walks[b].start(w, index + b);
    walking[b] = walks[b];
  }
  kernel.blocks(w, index, first, count, walking, y);
  for (int b = 0; b < Blocks; ++b) walks[b] = walking[b];
  return Blocks;
}

template <class Kernel, class X>
static void decode_panels(const losa::Weight& w, losa::BlockRange blocks, const X& x, float* y) {
  Kernel kernel;
  typename Kernel::Walk walks[kPanelBlocks];
  for (int64_t first = 0; first < w.columns; first += Kernel::kPanelColumns) {
    const int64_t left = w.columns - first;
    const int64_t count = left < Kernel::kPanelColumns ? left : Kernel::kPanelColumns;
    kernel.begin(x, first, count);
    for (int64_t b = blocks.first; b < blocks.last;) {
      if (blocks.last - b >= Kernel::kBlocks)
        b += walk_blocks<Kernel::kBlocks>(kernel, w, b, first, count, walks + (b - blocks.first), y);
      else
        b += walk_blocks<1>(kernel, w, b, first, count, walks + (b - blocks.first), y);
    }
  }
}

/// As many tokens as one kernel takes.
template <class Kernel, class X>
static void decode_tokens_as(const losa::Weight& w, losa::BlockRange blocks, const X& x, float* y) {
  for (; blocks.first < blocks.last; blocks.first += kPanelBlocks) {
    const int64_t end = blocks.first + kPanelBlocks;
    decode_panels<Kernel>(w, {blocks.first, end < blocks.last ? end : blocks.last}, x, y);
  }
}

template <template <int> class Kernel, class X>
static void decode_tokens(const losa::Weight& w, losa::BlockRange blocks, const X& x, int64_t tokens, float* y) {
  int64_t token = 0;
  for (int64_t groups = (tokens + kMaxDecodeTokens - 1) / kMaxDecodeTokens; groups > 0; --groups) {
    const int64_t count = (tokens - token + groups - 1) / groups;  // 10 tokens as 5 + 5, not 8 + 2
    const X from = x.from(token);
    float* to = y + token * w.rows;
    switch (count) {
      case 1: decode_tokens_as<Kernel<1>>(w, blocks, from, to); break;
      case 2: decode_tokens_as<Kernel<2>>(w, blocks, from, to); break;
      case 3: decode_tokens_as<Kernel<3>>(w, blocks, from, to); break;
      case 4: decode_tokens_as<Kernel<4>>(w, blocks, from, to); break;
      case 5: decode_tokens_as<Kernel<5>>(w, blocks, from, to); break;
      case 6: decode_tokens_as<Kernel<6>>(w, blocks, from, to); break;
      case 7: decode_tokens_as<Kernel<7>>(w, blocks, from, to); break;
      default: decode_tokens_as<Kernel<8>>(w, blocks, from, to); break;
    }
    token += count;
  }
}

/// The results of a block for one token: 16 rows, or those that there are.
LOSA_INLINE static __m512 load_results(const losa::Weight& w, int64_t block, int64_t token, const float* y) {
  const int64_t first_row = block * losa::kBlockRows;
  return _mm512_maskz_loadu_ps(row_mask(w.rows - first_row), y + token * w.rows + first_row);
}
LOSA_INLINE static void store_results(const losa::Weight& w, int64_t block, int64_t token, __m512 results, float* y) {
  const int64_t first_row = block * losa::kBlockRows;
  _mm512_mask_storeu_ps(y + token * w.rows + first_row, row_mask(w.rows - first_row), results);
}
