// How a tile of weights meets tiles of activations with 32 registers of 16 lanes (avx512_prefill.h). Either product's
// add() takes the tiles of `blocks` blocks, two or the last one, and all tiles of tokens.
//
// V gives the type of element, one or several numbers in four bytes:
//   Element, Vector, Sums            one element, 16 of them, and 16 sums of their products
//   load<Lanes>(p), broadcast(p)     16 elements, of which the first `Lanes` are in memory; one in all lanes
//   multiply_add(weight, x, sums)    sums + weight times x
//   starts(tile), start(tile, row)   what the sums of a tile start at, of all rows or of one in all lanes
//   begin<Lanes>(sums, start)        sums to go on with: those so far, or the start where a tile is summed for itself
//   scales<Lanes>(p), scale(p)       scales of what the lanes are, or one in all lanes
//   finish<Lanes>(sums, total, a, b) stores a tile's sums; a and b are the scales of rows and of tokens
//   kMixes                           whether elements of one row are faster among those of two; of fp32 they are not

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
    decltype(V::template scales<kRows>(tiles[0].scales)) scales[Blocks];  // loaded here, before stores might alias
#pragma GCC unroll 2
    for (int b = 0; b < Blocks; ++b) scales[b] = V::template scales<kRows>(tiles[b].scales);
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t) {
      const auto scale = V::scale(token_scales + t);
#pragma GCC unroll 2
      for (int b = 0; b < Blocks; ++b)
        V::template finish<kRows>(sums + b * kBlockSums + t * kRows, total[t][b], scales[b], scale);
    }
  }

  template <int Blocks>
  static void add_blocks(const Tile* tiles, int64_t columns, TokensOfTile<Element> part) {
    int64_t left = part.tile.tokens;
    for (int64_t parts = (left + kMaxTokens - 1) / kMaxTokens; parts > 0; --parts) {
      const int64_t count = (left + parts - 1) / parts;  // 16 tokens as 8 + 8, not 12 + 4
      const auto add = [&](auto run) { run(tiles, columns, part.x, part.tile.width, part.scales, part.sums); };
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
      part.x += count;
      part.scales += count;
      part.sums += count * kRows;
    }
  }

  /// sums [block][token][row] += x [column][token] * weights [block][column][row]; padding tokens are left out
  static void add(const Tile* tiles, int64_t blocks, int64_t columns, const TokensOfTile<Element>* tokens,
                  int64_t token_tiles) {
    for (int64_t i = 0; i < token_tiles; ++i) {
      if (blocks == 2)
        add_blocks<2>(tiles, columns, tokens[i]);
      else
        add_blocks<1>(tiles, columns, tokens[i]);
    }
  }

  /// y [token][row] of `count` tokens of a tile, at most kTokenStep, from `token` on; `stride` lies between two tokens.
  static void store(const float* sums, const losa::TokenTile&, int64_t token, int64_t count, int64_t rows, float* y,
                    int64_t stride) {
    for (int64_t t = 0; t < count; ++t) copy_rows(sums + (token + t) * kRows, rows, y + t * stride);
  }
};

/// The sums of a row for the tokens of a tile. The last vector may be a half, whose upper lanes are idle.
template <class V, int Width>
class RowSums {
 public:
  template <class Start>
  LOSA_INLINE void begin(const float* sums, Start start) {
    each([&](int v, auto lanes) { total_[v] = V::template begin<lanes()>(sums + v * kVectorLanes, start); });
  }
  LOSA_INLINE void add(typename V::Vector weight, const typename V::Element* x) {
    each([&](int v, auto lanes) {
      total_[v] = V::multiply_add(weight, V::template load<lanes()>(x + v * kVectorLanes), total_[v]);
    });
  }
  /// The same for two rows, which share the loads of x.
  LOSA_INLINE static void add_to_both(RowSums& a, RowSums& b, typename V::Vector of_a, typename V::Vector of_b,
                                      const typename V::Element* x) {
    each([&](int v, auto lanes) {
      const typename V::Vector loaded = V::template load<lanes()>(x + v * kVectorLanes);
      a.total_[v] = V::multiply_add(of_a, loaded, a.total_[v]);
      b.total_[v] = V::multiply_add(of_b, loaded, b.total_[v]);
    });
  }
  template <class Scale>
  LOSA_INLINE void finish(float* sums, Scale scale, const float* token_scales) {
    each([&](int v, auto lanes) {
      V::template finish<lanes()>(sums + v * kVectorLanes, total_[v], scale,
                                  V::template scales<lanes()>(token_scales + v * kVectorLanes));
    });
  }

 private:
  static constexpr int kVectors = (Width + kVectorLanes - 1) / kVectorLanes;

  /// For each vector, does(index, how many of its lanes are tokens).
  template <class Does>
  LOSA_INLINE static void each(Does does) {
#pragma GCC unroll 4
    for (int v = 0; v + 1 < kVectors; ++v) does(v, Lanes<kVectorLanes>());
    if constexpr (kVectors > 0) does(kVectors - 1, Lanes<Width - (kVectors - 1) * kVectorLanes>());
  }

  typename V::Sums total_[kVectors > 0 ? kVectors : 1];
};

/// The sums of a row for one or two tiles of tokens, of which the second may be empty. Both meet an element at once, as
/// finding it and beginning a row take as long for either.
template <class V, int Width, int Next>
class SparseRow {
 public:
  using Element = typename V::Element;

  LOSA_INLINE SparseRow(const WeightTile<Element>& tile, int row, const TokensOfTile<Element>& tokens,
                        const TokensOfTile<Element>& next)
      : weights_(tile.weights + row), scale_(V::scale(tile.scales + row)), tokens_(tokens), next_(next) {
    tokens_.sums += row * Width;
    next_.sums += row * Next;
    sums_.begin(tokens_.sums, V::start(tile, row));
    next_sums_.begin(next_.sums, V::start(tile, row));
  }
  /// Adds the products of element `k`.
  LOSA_INLINE void add(int64_t k) {
    const auto weight = V::broadcast(weights_ + k * losa::kBlockRows);
    sums_.add(weight, tokens_.x + k * Width);
    next_sums_.add(weight, next_.x + k * Next);
  }
  LOSA_INLINE static void add_to_both(SparseRow& a, SparseRow& b, int64_t k) {
    const int64_t at = k * losa::kBlockRows;
    const auto of_a = V::broadcast(a.weights_ + at), of_b = V::broadcast(b.weights_ + at);
    RowSums<V, Width>::add_to_both(a.sums_, b.sums_, of_a, of_b, a.tokens_.x + k * Width);
    RowSums<V, Next>::add_to_both(a.next_sums_, b.next_sums_, of_a, of_b, a.next_.x + k * Next);
  }
  /// Element `k` of both, and `alone` of `one`, which is either of them.
  LOSA_INLINE static void add_mixed(SparseRow& a, SparseRow& b, int64_t k, SparseRow& one, int64_t alone) {
    const int64_t at = k * losa::kBlockRows;
    const auto of_a = V::broadcast(a.weights_ + at), of_b = V::broadcast(b.weights_ + at);
    const auto of_one = V::broadcast(one.weights_ + alone * losa::kBlockRows);
    RowSums<V, Width>::add_to_both(a.sums_, b.sums_, of_a, of_b, a.tokens_.x + k * Width);
    one.sums_.add(of_one, one.tokens_.x + alone * Width);
    RowSums<V, Next>::add_to_both(a.next_sums_, b.next_sums_, of_a, of_b, a.next_.x + k * Next);
    one.next_sums_.add(of_one, one.next_.x + alone * Next);
  }
  LOSA_INLINE void finish() {
    sums_.finish(tokens_.sums, scale_, tokens_.scales);
    next_sums_.finish(next_.sums, scale_, next_.scales);
  }

 private:
  const Element* weights_;
  decltype(V::scale(nullptr)) scale_;
  TokensOfTile<Element> tokens_, next_;
  RowSums<V, Width> sums_;
  RowSums<V, Next> next_sums_;
};

/// The set bits of a mask, from the lowest on: for (SetBits k(mask); k.any(); k.next()) ... *k
class SetBits {
 public:
  LOSA_INLINE explicit SetBits(uint64_t mask) : left_(mask) {}
  LOSA_INLINE bool any() const { return left_ != 0; }
  LOSA_INLINE int64_t operator*() const { return __builtin_ctzll(left_); }
  LOSA_INLINE void next() { left_ &= left_ - 1; }

 private:
  uint64_t left_;
};

/// Lanes run along tokens, so that an absent element costs nothing: a row's kept ones are the set bits of a 64-bit
/// mask. Those that two neighbouring rows keep are taken together, since a load of activations takes as long as a
/// multiply-add. That leaves time for the loads of those that one row keeps, which are taken along if V::kMixes.
template <class V>
struct SparseProduct {
  using Element = typename V::Element;
  using Tile = WeightTile<Element>;
  static constexpr bool kNeedsRowMasks = true;

  /// A tile of `Width` tokens and, unless `Next` is 0, another one of `Next`.
  template <int Width, int Next>
  static void rows(const Tile& tile, TokensOfTile<Element> tokens, TokensOfTile<Element> next) {
    using Row = SparseRow<V, Width, Next>;
    for (int row = 0; row < losa::kBlockRows; row += 2) {
      const uint64_t of_a = tile.kept[row], of_b = tile.kept[row + 1];
      Row a(tile, row, tokens, next), b(tile, row + 1, tokens, next);
      SetBits both(of_a & of_b), alone_a(of_a & ~of_b), alone_b(of_b & ~of_a);
      if constexpr (V::kMixes) {
        for (; both.any() && alone_a.any(); both.next(), alone_a.next()) Row::add_mixed(a, b, *both, a, *alone_a);
        for (; both.any() && alone_b.any(); both.next(), alone_b.next()) Row::add_mixed(a, b, *both, b, *alone_b);
      }
      for (; both.any(); both.next()) Row::add_to_both(a, b, *both);
      for (; alone_a.any(); alone_a.next()) a.add(*alone_a);
      for (; alone_b.any(); alone_b.next()) b.add(*alone_b);
      a.finish();
      b.finish();
    }
  }

  template <int Width>
  static void add_block(const Tile& tile, TokensOfTile<Element> tokens, TokensOfTile<Element> next, int64_t width) {
    if constexpr (2 * Width > losa::kTileTokens) {  // fewer tokens are one tile
      if (width == Width) return rows<Width, Width>(tile, tokens, next);
      if (width != 0) return rows<Width, Width - losa::kTokenStep>(tile, tokens, next);
    }
    rows<Width, 0>(tile, tokens, next);
  }

  /// sums [block][row][token] += weights [block][column][row] * x [column][token], over each row's kept columns
  static void add(const Tile* tiles, int64_t blocks, int64_t, const TokensOfTile<Element>* tokens,
                  int64_t token_tiles) {
    static_assert(losa::kPrefillTokens <= 2 * losa::kTileTokens, "one or two tiles of tokens");
    for (int64_t b = 0; b < blocks; ++b) {
      const TokensOfTile<Element> first = tokens[0].of_block(b);
      const TokensOfTile<Element> next = token_tiles == 2 ? tokens[1].of_block(b) : first;
      const int64_t width = token_tiles == 2 ? next.tile.width : 0;
      switch (first.tile.width / losa::kTokenStep) {
        case 1: add_block<8>(tiles[b], first, next, width); break;
        case 2: add_block<16>(tiles[b], first, next, width); break;
        case 3: add_block<24>(tiles[b], first, next, width); break;
        case 4: add_block<32>(tiles[b], first, next, width); break;
        case 5: add_block<40>(tiles[b], first, next, width); break;
        case 6: add_block<48>(tiles[b], first, next, width); break;
        case 7: add_block<56>(tiles[b], first, next, width); break;
        default: add_block<64>(tiles[b], first, next, width); break;
      }
    }
  }

  static void store(const float* sums, const losa::TokenTile& tile, int64_t token, int64_t count, int64_t rows,
                    float* y, int64_t stride) {
    sums += token;
    if (rows >= losa::kBlockRows && count == 8) {
      for (int half = 0; half < losa::kBlockRows; half += 8)
        transpose_floats8(sums + half * tile.width, tile.width, y + half, stride);
      return;
    }
    for (int64_t t = 0; t < count; ++t)
      for (int64_t r = 0; r < rows && r < losa::kBlockRows; ++r) y[t * stride + r] = sums[r * tile.width + t];
  }
};

/// What products cost, in multiply-adds of 16 tokens at the processor's best rate: for each element of a row and 16
/// tokens WideProduct `wide`, SparseProduct `row` for its part of beginning and finishing a row. What SparseProduct then
/// takes is the multiply-adds of kept elements, and one more for an element that a row keeps alone, all times `element`.
/// Fitted to times on a Zen 4 of 1,024 rows and columns, 32 to 128 tokens, 10 % to 90 % kept.
struct PrefillCosts {
  double wide, row, element;
};

inline bool skipping_pays(const PrefillCosts& costs, double kept_share, int64_t tokens) {
  constexpr double kLatency = 4;  // multiply-adds that a sum takes
  double width = 0, vectors = 0;
  for (int64_t i = 0; i < losa::token_tile_count(tokens); ++i) {
    const int64_t of_tile = losa::token_tile(tokens, i).width;
    width += static_cast<double>(of_tile);
    vectors += static_cast<double>((of_tile + kVectorLanes - 1) / kVectorLanes);
  }
  const double both = kept_share * kept_share, alone = kept_share - both;
  const double adds = both * vectors + alone * (1 + (vectors > kLatency ? vectors : kLatency));
  return costs.row * vectors + costs.element * adds < costs.wide * width / kVectorLanes;
}
