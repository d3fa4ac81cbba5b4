// Many tokens: a tile of weights is expanded to L1, where it meets tiles of packed activations.
//
// Each weight is expanded once for up to kPrefillTokens tokens. A Source walks a block and expands it tile by
// tile; a Product says how a tile of weights meets a tile of activations, and how its sums lie: DenseProduct
// multiplies zeros too, SkipProduct does not.
//
// A tile's elements are what one lane takes of W and of x in one multiply-add: a float of one column, or a
// pair of 16-bit integers of two. V gives, besides what expand.h lists,
//   Element                       float, or int32_t for a pair
//   begin(sums)                   sums to go on with: those so far, or zero where a tile is summed for itself
//   finish(sums, total, a, b)     stores a tile's sums; a and b are the vectors of the two scales
//   scale(p), scales(p)           such a vector from one float for all lanes, or one for each
// begin and finish take and leave floats.

constexpr int64_t kTileColumns = 64;  // elements of a row in a tile: one 64-bit mask, 16 KiB of activations
constexpr int64_t kMaxBlocks = 8;     // a task's blocks share one tile of activations

/// A tile of one block's weights.
template <class Element>
struct WeightTile {
  alignas(64) Element weights[kTileColumns * losa::kBlockRows];  // [column][row]
  alignas(64) float scales[losa::kBlockRows];                    // of each row; integers only
  uint64_t kept[losa::kBlockRows];  // bit k: is any of column k's element kept? For SkipProduct
};

/// Lanes run along rows. V also gives kWideTokens, as many tokens as have their sums in registers, and
/// kNarrowTokens, for what is left of a multiple of 8.
template <class V>
struct DenseProduct {
  using Element = typename V::Element;
  using Vector = typename V::Vector;
  static constexpr int kParts = losa::kBlockRows / V::kLanes;
  static constexpr bool kNeedsRowMasks = false;

  template <int Tokens>
  static __attribute__((noinline)) void tokens(const WeightTile<Element>& tile, int64_t columns, const Element* x,
                                               int64_t width, const float* token_scales, float* sums) {
    Vector total[Tokens][kParts];
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < kParts; ++part)
        total[t][part] = V::begin(sums + (t * kParts + part) * V::kLanes);
    const Element* weights = tile.weights;
    for (int64_t k = 0; k < columns; ++k, weights += losa::kBlockRows, x += width) {
      Vector weight[kParts];
      for (int part = 0; part < kParts; ++part) weight[part] = V::load(weights + part * V::kLanes);
#pragma GCC unroll 32
      for (int t = 0; t < Tokens; ++t) {
        const auto activation = V::broadcast(x + t);
        for (int part = 0; part < kParts; ++part)
          total[t][part] = V::multiply_add(weight[part], activation, total[t][part]);
      }
    }
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < kParts; ++part)
        V::finish(sums + (t * kParts + part) * V::kLanes, total[t][part], V::scales(tile.scales + part * V::kLanes),
                  V::scale(token_scales + t));
  }

  /// sums [token][row] += x [column][token] * weights [column][row], for `count` of `width` tokens: the rest is
  /// padding, of which no more takes part than fills the last narrow step.
  static void add(const WeightTile<Element>& tile, int64_t columns, const Element* x, int64_t width, int64_t count,
                  const float* token_scales, float* sums) {
    constexpr int kWide = V::kWideTokens, kNarrow = V::kNarrowTokens;
    constexpr int kGrain = kWide - kNarrow;  // its multiples from kNarrow on are what the two add up to
    static_assert(kNarrow % kGrain == 0 && losa::kTokenStep % kGrain == 0 && losa::kTokenStep >= kNarrow);
    const int64_t grains = (count + kGrain - 1) / kGrain * kGrain;
    const int64_t end = grains < kNarrow ? kNarrow : grains;
    for (int64_t token = 0; token < end;) {
      const int64_t behind_wide = end - token - kWide;
      const bool wide = behind_wide == 0 || behind_wide >= kNarrow;
      float* to = sums + token * losa::kBlockRows;
      if (wide)
        tokens<kWide>(tile, columns, x + token, width, token_scales + token, to);
      else
        tokens<kNarrow>(tile, columns, x + token, width, token_scales + token, to);
      token += wide ? kWide : kNarrow;
    }
  }

  /// y [token][row] of `count` tokens of a tile, at most kTokenStep, from `token` on; `stride` lies between two tokens.
  static void store(const float* sums, const losa::TokenTile&, int64_t token, int64_t count, int64_t rows, float* y,
                    int64_t stride) {
    for (int64_t t = 0; t < count; ++t) copy_rows(sums + (token + t) * losa::kBlockRows, rows, y + t * stride);
  }
};

/// Lanes run along tokens, so that an absent weight costs nothing: a row's kept elements are the set bits of
/// a 64-bit mask. V also gives transpose8 as below; kLanes must be kTokenStep.
template <class V>
struct SkipProduct {
  using Element = typename V::Element;
  using Vector = typename V::Vector;
  static constexpr bool kNeedsRowMasks = true;
  static_assert(V::kLanes == losa::kTokenStep && losa::kTileTokens == 8 * losa::kTokenStep, "switch in add()");

  template <int Vectors>
  static void rows(const WeightTile<Element>& tile, const Element* x, const float* token_scales, float* sums) {
    for (int row = 0; row < losa::kBlockRows; ++row, sums += Vectors * V::kLanes) {
      const Element* weights = tile.weights + row;
      Vector total[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) total[v] = V::begin(sums + v * V::kLanes);
      for (uint64_t kept = tile.kept[row]; kept != 0; kept &= kept - 1) {
        const int64_t k = __builtin_ctzll(kept);
        const auto weight = V::broadcast(weights + k * losa::kBlockRows);
        const Element* column = x + k * (Vectors * V::kLanes);
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v)
          total[v] = V::multiply_add(weight, V::load(column + v * V::kLanes), total[v]);
      }
      const typename V::Scale scale = V::scale(tile.scales + row);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v)
        V::finish(sums + v * V::kLanes, total[v], scale, V::scales(token_scales + v * V::kLanes));
    }
  }

  /// sums [row][token] += weights [column][row] * x [column][token], over each row's kept columns
  static void add(const WeightTile<Element>& tile, int64_t, const Element* x, int64_t width, int64_t,
                  const float* token_scales, float* sums) {
    switch (width / V::kLanes) {
      case 1: return rows<1>(tile, x, token_scales, sums);
      case 2: return rows<2>(tile, x, token_scales, sums);
      case 3: return rows<3>(tile, x, token_scales, sums);
      case 4: return rows<4>(tile, x, token_scales, sums);
      case 5: return rows<5>(tile, x, token_scales, sums);
      case 6: return rows<6>(tile, x, token_scales, sums);
      case 7: return rows<7>(tile, x, token_scales, sums);
      default: return rows<8>(tile, x, token_scales, sums);
    }
  }

  static void store(const float* sums, const losa::TokenTile& tile, int64_t token, int64_t count, int64_t rows,
                    float* y, int64_t stride) {
    sums += token;
    if (rows >= losa::kBlockRows && count == losa::kTokenStep) {
      for (int half = 0; half < losa::kBlockRows; half += 8)
        V::transpose8(sums + half * tile.width, tile.width, y + half, stride);
      return;
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < rows && r < losa::kBlockRows; ++r) y[t * stride + r] = sums[r * tile.width + t];
  }
};

/// Walks a block whose values are of a type of expand.h. For RowMasks that also gives row_masks(masks, rows), which
/// turns the masks of 64 columns into 64 bits a row for 16 rows.
template <class V, class From>
class FloatSource {
 public:
  using Element = float;
  static int64_t elements(const losa::Weight& w) { return w.columns; }
  static int64_t tile_elements(const losa::Weight&) { return kTileColumns; }
  static constexpr int64_t kPrefetchBytes = 2048;  // a tile of bf16 or half a tile of fp32, if dense

  void start(const losa::Weight& w, int64_t block) { words_.start(w, block); }

  /// The next `columns` columns; only the last tile has fewer than kTileColumns.
  template <bool RowMasks>
  void expand(int64_t columns, WeightTile<float>* tile) {
    if constexpr (RowMasks) {
      uint8_t padded[2 * kTileColumns] = {};
      __builtin_memcpy(padded, words_.masks(), static_cast<size_t>(From::Words::mask_bytes(columns)));
      From::row_masks(padded, tile->kept);
    }
    float* to = tile->weights;
    for (; columns >= kWordColumns; columns -= kWordColumns, to += kWordColumns * losa::kBlockRows) {
      __builtin_prefetch(static_cast<const char*>(words_.values()) + kPrefetchBytes);
      __builtin_prefetch(static_cast<const char*>(words_.values()) + kPrefetchBytes + 64);
      store(words_.next(), to);
    }
    if (columns > 0) {
      uint8_t padded[8];
      store(words_.last(columns, padded), to);
    }
  }

 private:
  template <class Word>
  LOSA_INLINE static void store(const Word& word, float* to) {
#pragma GCC unroll 4
    for (int i = 0; i < kWordColumns / From::kTogether; ++i) {
#pragma GCC unroll 4
      for (int part = 0; part < losa::kBlockRows / V::kLanes; ++part) {
        const typename From::Packed packed = From::packed(word, i, part);
        for (int column = 0; column < From::kTogether; ++column)
          V::store(to + (i * From::kTogether + column) * losa::kBlockRows + part * V::kLanes,
                   From::column(packed, column));
      }
    }
  }

  typename From::Words words_;
};

template <class V>
using Fp32Source = FloatSource<V, Fp32<V>>;

/// Sums to y: a few tokens at a time, whose rows of all blocks lie together, since tokens may lie pages apart.
template <class Product, size_t BlockSums>
static void store_blocks(const losa::Weight& w, int64_t first, int64_t blocks, const float (*sums)[BlockSums],
                         int64_t tokens, float* y) {
  for (int64_t i = 0; i < losa::token_tile_count(tokens); ++i) {
    const losa::TokenTile tile = losa::token_tile(tokens, i);
    for (int64_t token = 0; token < tile.tokens; token += losa::kTokenStep) {
      const int64_t left = tile.tokens - token;
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t first_row = (first + b) * losa::kBlockRows;
        Product::store(sums[b] + tile.first * losa::kBlockRows, tile, token,
                       left < losa::kTokenStep ? left : losa::kTokenStep, w.rows - first_row,
                       y + (tile.first + token) * w.rows + first_row, w.rows);
      }
    }
  }
}

/// `packed_scales`, of integers only: for each tile of tokens and each tile of weights, one float a token.
template <class Source, class Product>
struct Prefill {
  using Element = typename Source::Element;

  static void run(const losa::Weight& w, losa::BlockRange blocks, const Element* packed,
                  const float* packed_scales, int64_t tokens, float* y) {
    for (; blocks.first < blocks.last; blocks.first += kMaxBlocks) {
      const int64_t left = blocks.last - blocks.first;
      group(w, blocks.first, left < kMaxBlocks ? left : kMaxBlocks, packed, packed_scales, tokens, y);
    }
  }

  static void run_floats(const losa::Weight& w, losa::BlockRange blocks, const float* packed, int64_t tokens,
                         float* y) {
    // Float products have no scales, but compute where they would lie: never past the packed values.
    run(w, blocks, packed, packed, tokens, y);
  }

  static void group(const losa::Weight& w, int64_t first, int64_t blocks, const Element* packed,
                    const float* packed_scales, int64_t tokens, float* y) {
    const int64_t tiles = losa::token_tile_count(tokens);
    WeightTile<Element> weights[kMaxBlocks];
    alignas(64) float sums[kMaxBlocks][losa::kBlockRows * losa::kPrefillTokens];
    Source sources[kMaxBlocks];
    const size_t sum_bytes =
        static_cast<size_t>(losa::packed_floats(tokens, losa::kBlockRows)) * sizeof(float);
    for (int64_t b = 0; b < blocks; ++b) {
      sources[b].start(w, first + b);
      __builtin_memset(sums[b], 0, sum_bytes);
    }
    const int64_t elements = Source::elements(w), tile_elements = Source::tile_elements(w);
    const int64_t weight_tiles = (elements + tile_elements - 1) / tile_elements;
    for (int64_t t = 0, k = 0; t < weight_tiles; ++t, k += tile_elements) {
      const int64_t columns = elements - k < tile_elements ? elements - k : tile_elements;
      for (int64_t i = 0; i < tiles; ++i) {
        const losa::TokenTile tile = losa::token_tile(tokens, i);
        const Element* x = packed + tile.first * elements + k * tile.width;
        const float* token_scales = packed_scales + tile.first * weight_tiles + t * tile.width;
        for (int64_t b = 0; b < blocks; ++b) {
          // Only a second tile of tokens meets them all once more; otherwise one place, which stays in L1, will do.
          WeightTile<Element>& weight = weights[tiles == 1 ? 0 : b];
          if (i == 0) sources[b].template expand<Product::kNeedsRowMasks>(columns, &weight);
          Product::add(weight, columns, x, tile.width, tile.tokens, token_scales,
                       sums[b] + tile.first * losa::kBlockRows);
        }
      }
    }
    store_blocks<Product>(w, first, blocks, &sums[0], tokens, y);
  }
};

/// Columns of tile `index` for all its tokens, padded with zero tokens (token_tiles.h). V also gives
/// transpose8(from, from_stride, to, to_stride): to[j, i] = from[i, j] for i, j < 8.
template <class V>
static void pack(const float* x, int64_t tokens, int64_t columns, int64_t index, float* packed) {
  const losa::TokenTile tile = losa::token_tile(tokens, index);
  const float* from = x + tile.first * columns;
  float* to = packed + tile.first * columns;
  for (int64_t first = 0; first < columns; first += kTileColumns) {  // what is written stays in L1
    const int64_t last = first + kTileColumns < columns ? first + kTileColumns : columns;
    for (int64_t t = 0; t < tile.width; t += 8) {
      int64_t k = first;
      if (t + 8 <= tile.tokens) {
        for (; k + 8 <= last; k += 8)
          V::transpose8(from + t * columns + k, columns, to + k * tile.width + t, tile.width);
      }
      for (; k < last; ++k)
        for (int64_t i = t; i < t + 8; ++i)
          to[k * tile.width + i] = i < tile.tokens ? from[i * columns + k] : 0.0f;
    }
  }
}
