// The loops of prefill.h for products that take two blocks at once.

constexpr int64_t kBlockSums = losa::kBlockRows * losa::kPrefillTokens;
constexpr int64_t kTokenTiles = (losa::kPrefillTokens + losa::kTileTokens - 1) / losa::kTileTokens;  // at most

/// A tile of tokens where it meets a tile of weights.
template <class Element>
struct TokensOfTile {
  losa::TokenTile tile;
  const Element* x;     // [column][width]
  const float* scales;  // of integers only: one for each token
  float* sums;          // of the first block; those of the others follow, kBlockSums apart

  LOSA_INLINE TokensOfTile of_block(int64_t block) const { return {tile, x, scales, sums + block * kBlockSums}; }
};

/// Source is as in prefill.h, Product as in avx512_products.h. `packed_scales`, of integers only: for each tile of
/// tokens and each tile of weights, one float a token.
template <class Source, class Product>
struct PrefillPairs {
  using Element = typename Source::Element;

  static void run(const losa::Weight& w, losa::BlockRange blocks, const Element* packed, const float* packed_scales,
                  int64_t tokens, float* y) {
    for (; blocks.first < blocks.last; blocks.first += kMaxBlocks) {
      const int64_t left = blocks.last - blocks.first;
      group(w, blocks.first, left < kMaxBlocks ? left : kMaxBlocks, packed, packed_scales, tokens, y);
    }
  }

  static void group(const losa::Weight& w, int64_t first, int64_t blocks, const Element* packed,
                    const float* packed_scales, int64_t tokens, float* y) {
    WeightTile<Element> weights[2];  // used up at once: they and the activations stay in the L1 cache
    alignas(64) float sums[kMaxBlocks][kBlockSums];
    Source sources[kMaxBlocks];
    for (int64_t b = 0; b < blocks; ++b) sources[b].start(w, first + b);
    __builtin_memset(sums, 0, static_cast<size_t>(blocks) * sizeof *sums);
    const int64_t elements = Source::elements(w), tile_elements = Source::tile_elements(w);
    const int64_t weight_tiles = (elements + tile_elements - 1) / tile_elements;
    const int64_t tiles = losa::token_tile_count(tokens);
    for (int64_t t = 0, k = 0; t < weight_tiles; ++t, k += tile_elements) {
      const int64_t columns = elements - k < tile_elements ? elements - k : tile_elements;
      TokensOfTile<Element> parts[kTokenTiles];
      for (int64_t i = 0; i < tiles; ++i) {
        const losa::TokenTile tile = losa::token_tile(tokens, i);
        parts[i] = {tile, packed + tile.first * elements + k * tile.width,
                    packed_scales + tile.first * weight_tiles + t * tile.width, sums[0] + tile.first * losa::kBlockRows};
      }
      for (int64_t b = 0; b < blocks; b += 2) {
        const int64_t together = blocks - b > 1 ? 2 : 1;
        for (int64_t i = 0; i < together; ++i)
          sources[b + i].template expand<Product::kNeedsRowMasks>(columns, &weights[i]);
        Product::add(weights, together, columns, parts, tiles);
        for (int64_t i = 0; i < tiles; ++i) parts[i] = parts[i].of_block(2);
      }
    }
    store_blocks<Product>(w, first, blocks, &sums[0], tokens, y);
  }
};
