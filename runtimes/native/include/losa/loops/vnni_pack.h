// Rounded activations in the order of int8 and int4 kernels: packed for prefill, arranged for decode.

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

template <class Elements>
static void arrange_elements(const losa::RoundedTokens& x, int64_t token) {
  const int16_t* from = x.token(token);
  const ArrangedToken arranged(x, token);
  int32_t* to = arranged.elements;
  for (int64_t group = 0; group < x.groups(); ++group) {
    __m512i start = _mm512_setzero_si512();
    for (int64_t k = 0; k < x.group; k += 32, from += 32, to += 32 / 4 * Elements::kOfStep)
      start = _mm512_add_epi32(start, Elements::arrange(from, to));
    arranged.starts[group] = _mm512_reduce_add_epi32(start);
  }
}

/// In the order of the elements that decode_steps (vnni_kernels.h) takes for so many tokens.
static void arrange_integers(const losa::Weight& w, const losa::RoundedTokens& x, int64_t tokens, int64_t token) {
  if (w.activation_bits == 8)
    arrange_elements<Quads>(x, token);
  else if (tokens == 1)
    arrange_elements<SplitQuads>(x, token);
  else
    arrange_elements<Pairs>(x, token);
}
