// How a tile of weights meets a tile of activations with 32 registers of 16 lanes (avx512_prefill.h). Either product's
// add() takes the tiles of `blocks` blocks, two or the last one, whose sums lie kBlockSums apart.
//
// V gives the type of element, one or several numbers in four bytes:
//   Element, Vector, Sums            one element, 16 of them, and 16 sums of their products
//   load<Lanes>(p), broadcast(p)     16 elements, of which the first `Lanes` are in memory; one in all lanes
//   multiply_add(weight, x, sums)    sums + weight times x
//   starts(tile), start(tile, row)   what the sums of a tile start at, of all rows or of one in all lanes
//   begin<Lanes>(sums, start)        sums to go on with: those so far, or the start where a tile is summed for itself
//   scales<Lanes>(p), scale(p)       scales of what the lanes are, or one in all lanes
//   finish<Lanes>(sums, total, a, b) stores a tile's sums; a and b are the scales of rows and of tokens

/// Lanes run along rows. 12 tokens by two blocks have their sums in registers: 24 multiply-adds for 14 loads.
template <class V>
struct WideProduct {
  using Element = typename V::Element;
  using Tile = WeightTile<Element>;
  static constexpr bool kNeedsRowMasks = false;
  static constexpr int64_t kMaxTokens = 12;
  static constexpr int kRows = losa::kBlockRows;  // as many as lanes

  template <int Tokens, int Blocks>
  static __attribute__((noinline)) void tokens(const Tile* tiles, int64_t columns, const Element* x, int64_t width,
                                               const float* token_scales, float* sums) {
    typename V::Sums total[Tokens][Blocks];
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
        total[t][b] = V::template begin<kRows>(sums + b * kBlockSums + t * kRows, V::starts(tiles[b]));
    for (int64_t k = 0; k < columns; ++k, x += width) {
      typename V::Vector weight[Blocks];
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b) weight[b] = V::template load<kRows>(tiles[b].weights + k * kRows);
#pragma GCC unroll 32
      for (int t = 0; t < Tokens; ++t) {
        const typename V::Vector activation = V::broadcast(x + t);
#pragma GCC unroll 2
        for (int b = 0; b < Blocks; ++b) total[t][b] = V::multiply_add(weight[b], activation, total[t][b]);
      }
    }
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t)
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
        V::template finish<kRows>(sums + b * kBlockSums + t * kRows, total[t][b],
                                  V::template scales<kRows>(tiles[b].scales), V::scale(token_scales + t));
  }

  template <int Blocks>
  static void add_blocks(const Tile* tiles, int64_t columns, const Element* x, const losa::TokenTile& tile,
                         const float* token_scales, float* sums) {
    int64_t left = tile.tokens;
    for (int64_t parts = (left + kMaxTokens - 1) / kMaxTokens; parts > 0; --parts) {
      const int64_t count = (left + parts - 1) / parts;  // 16 tokens as 8 + 8, not 12 + 4
      const auto add = [&](auto run) { run(tiles, columns, x, tile.width, token_scales, sums); };
      switch (count) {
        case 1: add(tokens<1, Blocks>); break;
        case 2: add(tokens<2, Blocks>); break;
        case 3: add(tokens<3, Blocks>); break;
        case 4: add(tokens<4, Blocks>); break;
        case 5: add(tokens<5, Blocks>); break;
        case 6: add(tokens<6, Blocks>); break;
        case 7: add(tokens<7, Blocks>); break;
        case 8: add(tokens<8, Blocks>); break;
        case 9: add(tokens<9, Blocks>); break;
        case 10: add(tokens<10, Blocks>); break;
        case 11: add(tokens<11, Blocks>); break;
        default: add(tokens<12, Blocks>); break;
      }
      left -= count;
      x += count;
      token_scales += count;
      sums += count * kRows;
    }
  }

  /// sums [block][token][row] += x [column][token] * weights [block][column][row]; padding tokens are left out
  static void add(const Tile* tiles, int64_t blocks, int64_t columns, const Element* x, const losa::TokenTile& tile,
                  const float* token_scales, float* sums) {
    if (blocks == 2)
      add_blocks<2>(tiles, columns, x, tile, token_scales, sums);
    else
      add_blocks<1>(tiles, columns, x, tile, token_scales, sums);
  }

  static void store(const float* sums, const losa::TokenTile& tile, int64_t rows, float* y, int64_t stride) {
    for (int64_t t = 0; t < tile.tokens; ++t) copy_rows(sums + t * kRows, rows, y + t * stride);
  }
};

/// Lanes run along tokens, so that an absent element costs nothing: a row's kept ones are the set bits of a 64-bit
/// mask. The last vector of a tile may be a half, whose upper lanes are idle.
template <class V>
struct SparseProduct {
  using Element = typename V::Element;
  using Tile = WeightTile<Element>;
  static constexpr bool kNeedsRowMasks = true;
  static constexpr int kLanes = kVectorLanes;

  template <int Width>
  static void rows(const Tile& tile, const Element* x, const float* token_scales, float* sums) {
    constexpr int kVectors = (Width + kLanes - 1) / kLanes;
    constexpr int kLast = Width - (kVectors - 1) * kLanes;  // lanes of the last vector
    for (int row = 0; row < losa::kBlockRows; ++row, sums += Width) {
      const Element* weights = tile.weights + row;
      const auto start = V::start(tile, row);
      typename V::Sums total[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v)
        total[v] = v + 1 < kVectors ? V::template begin<kLanes>(sums + v * kLanes, start)
                                    : V::template begin<kLast>(sums + v * kLanes, start);
      for (uint64_t kept = tile.kept[row]; kept != 0; kept &= kept - 1) {
        const int64_t k = __builtin_ctzll(kept);
        const auto weight = V::broadcast(weights + k * losa::kBlockRows);
        const Element* column = x + k * Width;
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const auto activations = v + 1 < kVectors ? V::template load<kLanes>(column + v * kLanes)
                                                    : V::template load<kLast>(column + v * kLanes);
          total[v] = V::multiply_add(weight, activations, total[v]);
        }
      }
      const auto scale = V::scale(tile.scales + row);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        if (v + 1 < kVectors)
          V::template finish<kLanes>(sums + v * kLanes, total[v], scale,
                                     V::template scales<kLanes>(token_scales + v * kLanes));
        else
          V::template finish<kLast>(sums + v * kLanes, total[v], scale,
                                    V::template scales<kLast>(token_scales + v * kLanes));
      }
    }
  }

  static void add_block(const Tile& tile, const Element* x, int64_t width, const float* token_scales, float* sums) {
    switch (width / losa::kTokenStep) {
      case 1: return rows<8>(tile, x, token_scales, sums);
      case 2: return rows<16>(tile, x, token_scales, sums);
      case 3: return rows<24>(tile, x, token_scales, sums);
      case 4: return rows<32>(tile, x, token_scales, sums);
      case 5: return rows<40>(tile, x, token_scales, sums);
      case 6: return rows<48>(tile, x, token_scales, sums);
      case 7: return rows<56>(tile, x, token_scales, sums);
      default: return rows<64>(tile, x, token_scales, sums);
    }
  }

  /// sums [block][row][token] += weights [block][column][row] * x [column][token], over each row's kept columns
  static void add(const Tile* tiles, int64_t blocks, int64_t, const Element* x, const losa::TokenTile& tile,
                  const float* token_scales, float* sums) {
    for (int64_t b = 0; b < blocks; ++b) add_block(tiles[b], x, tile.width, token_scales, sums + b * kBlockSums);
  }

  static void store(const float* sums, const losa::TokenTile& tile, int64_t rows, float* y, int64_t stride) {
    int64_t token = 0;
    if (rows >= losa::kBlockRows) {
      rows = losa::kBlockRows;
      for (; token + 8 <= tile.tokens; token += 8)
        for (int half = 0; half < losa::kBlockRows; half += 8)
          transpose_floats8(sums + half * tile.width + token, tile.width, y + token * stride + half, stride);
    }
    for (; token < tile.tokens; ++token)
      for (int64_t r = 0; r < rows; ++r) y[token * stride + r] = sums[r * tile.width + token];
  }
};

/// What SparseProduct takes for each element of a row and 16 tokens, where a multiply-add at the processor's best rate
/// takes 1, if it keeps `kept_share` of the elements. A prototype of it took 1.7 for each kept one, on a Zen 4 with 64
/// tokens. How that grows for narrower tiles is reasoned, not measured: 2 for finding an element, and 1.2 for each
/// vector of tokens.
inline double skip_cost(double kept_share, int64_t tokens) {
  const int64_t width = losa::token_tile(tokens, losa::token_tile_count(tokens) - 1).width;  // of the narrowest
  const int64_t vectors = (width + kVectorLanes - 1) / kVectorLanes;
  return kept_share * (2.0 + 1.2 * static_cast<double>(vectors)) * kVectorLanes / static_cast<double>(width);
}
