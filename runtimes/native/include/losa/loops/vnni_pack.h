// Packs rounded activations for the prefill of int8 and int4 weights.

/// Tile `index` of tokens, [element][token], and its scales.
template <class Elements>
static void pack_rounded(const losa::Weight& w, const losa::RoundedTokens& x, int64_t tokens, int64_t index,
                         const losa::PackedTokens& packed) {
  const losa::TokenTile tile = losa::token_tile(tokens, index);
  const int64_t elements = w.steps() * Elements::kOfStep;
  const auto piece = [&](int64_t token, int64_t first) { return Elements::piece(x.token(tile.first + token), first); };
  pack_pieces(piece, tile, elements, static_cast<int32_t*>(packed.values) + tile.first * elements);
  float* scales = packed.scales + tile.first * x.groups();
  for (int64_t group = 0; group < x.groups(); ++group, scales += tile.width)
    for (int64_t t = 0; t < tile.width; ++t)
      scales[t] = t < tile.tokens ? x.token_scales(tile.first + t)[group] : 0.0f;
}

static void pack_integers(const losa::Weight& w, const losa::RoundedTokens& x, int64_t tokens, int64_t tile,
                          const losa::PackedTokens& packed) {
  if (w.activation_bits == 8)
    pack_rounded<Quads>(w, x, tokens, tile, packed);
  else
    pack_rounded<Pairs>(w, x, tokens, tile, packed);
}
