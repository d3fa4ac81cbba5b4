// The loops of the SIMD kernels, written once over a small vector type.
//
// An instruction set gives a struct V with
//   kLanes                       floats in a vector, 8 or 16
//   kWideTokens, kNarrowTokens   tokens of a dense micro-kernel: as many as its sums fit in registers, and
//                                a smaller number that covers what is left of a multiple of 8
//   kSkipDensity                 weights up to this density skip zeros in prefill (needs kLanes = 8)
//   Vector                       its register type
//   zero(), broadcast(p), load(p), store(p, v)      no alignment assumed
//   multiply_add(a, b, c)        a * b + c, rounded once
//   add(a, b)
//   expand(values, bits)         lane i = bits >> i & 1 ? the next of `values` : 0
//   transpose8(from, from_stride, to, to_stride)    to[j, i] = from[i, j] for i, j < 8
//   row_masks(masks, rows)       16 bits a column, 64 columns -> 64 bits a row, 16 rows (if it skips)
// and includes this file inside an anonymous namespace, for the reason given at LOSA_INLINE. That is also
// why nothing here calls the standard library.

constexpr int64_t kTileColumns = 64;  // of K: one 64-bit mask a row; 16 KiB of activations at 64 tokens
constexpr int64_t kMaxBlocks = 8;     // a task's blocks share one tile of activations

template <class V>
struct Loops {
  using Vector = typename V::Vector;
  static constexpr int kParts = losa::kBlockRows / V::kLanes;  // vectors that cover a block's rows
  static constexpr unsigned kPartMask = (1u << V::kLanes) - 1;
  // Values are read in one stream; the hardware's prefetcher stops at page ends, this does not.
  static constexpr int kPrefetchBytes = 1024;

  static constexpr int kStep = 4;  // columns whose mask is read as one 64-bit word

  /// Part `part` of the weights of column `column` of kStep, absent ones as zeros. `values` are those of
  /// the first column: counting the bits before this part anew, rather than moving a pointer along, keeps
  /// the parts independent of each other.
  LOSA_INLINE static Vector expand(const uint8_t* masks, uint64_t kept, const float* values, int column, int part) {
    const int first_bit = column * losa::kBlockRows + part * V::kLanes;
    const int before = first_bit == 0 ? 0 : __builtin_popcountll(kept << (64 - first_bit));
    unsigned bits = masks[first_bit / 8];
    if (V::kLanes == 16) bits |= static_cast<unsigned>(masks[first_bit / 8 + 1]) << 8;
    return V::expand(values + before, bits);
  }

  /// The masks of up to kStep columns, absent columns as zeros, at an address that allows reading all.
  struct Step {
    uint8_t masks[2 * kStep];
    LOSA_INLINE Step(const uint8_t* from, int64_t columns) : masks() {
      for (int64_t i = 0; i < 2 * columns; ++i) masks[i] = from[i];
    }
  };

  LOSA_INLINE static uint64_t word(const uint8_t* masks) {
    uint64_t kept;
    __builtin_memcpy(&kept, masks, sizeof kept);
    return kept;
  }

  // ---- few tokens: a block's sums stay in registers, x is read where it lies

  template <int Tokens, int Sums>
  LOSA_INLINE static void add_column(const uint8_t* masks, uint64_t kept, const float* values, int step,
                                     const float* x, int64_t stride, Vector (&sums)[Tokens][Sums][kParts],
                                     int sum) {
    Vector column[kParts];
    for (int part = 0; part < kParts; ++part) column[part] = expand(masks, kept, values, step, part);
#pragma GCC unroll 8
    for (int t = 0; t < Tokens; ++t) {
      const Vector activation = V::broadcast(x + t * stride + step);
      for (int part = 0; part < kParts; ++part)
        sums[t][sum][part] = V::multiply_add(column[part], activation, sums[t][sum][part]);
    }
  }

  /// `Sums` partial sums per row and token keep enough multiply-adds in flight.
  template <int Tokens, int Sums>
  static void decode_tokens(const losa::SparseFp32& w, int64_t block, const float* x, float* y) {
    const int64_t columns = w.columns;
    const uint8_t* mask = w.block_masks(block);
    const float* values = w.block_values(block);
    Vector sums[Tokens][Sums][kParts];
    for (int t = 0; t < Tokens; ++t)
      for (int s = 0; s < Sums; ++s)
        for (int part = 0; part < kParts; ++part) sums[t][s][part] = V::zero();

    int64_t k = 0;
    for (; k + kStep <= columns; k += kStep) {
      __builtin_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes);
      __builtin_prefetch(reinterpret_cast<const char*>(values) + kPrefetchBytes + 64);
      const uint64_t kept = word(mask + 2 * k);
#pragma GCC unroll 4
      for (int step = 0; step < kStep; ++step)
        add_column(mask + 2 * k, kept, values, step, x + k, columns, sums, step % Sums);
      values += __builtin_popcountll(kept);
    }
    if (k < columns) {
      const Step rest(mask + 2 * k, columns - k);
      const uint64_t kept = word(rest.masks);
      for (int step = 0; step < columns - k; ++step)
        add_column(rest.masks, kept, values, step, x + k, columns, sums, 0);
    }
    float rows[losa::kBlockRows];
    const int64_t first_row = block * losa::kBlockRows;
    for (int t = 0; t < Tokens; ++t) {
      for (int s = 1; s < Sums; ++s)
        for (int part = 0; part < kParts; ++part) sums[t][0][part] = V::add(sums[t][0][part], sums[t][s][part]);
      for (int part = 0; part < kParts; ++part) V::store(rows + part * V::kLanes, sums[t][0][part]);
      copy_rows(rows, w.rows - first_row, y + t * w.rows + first_row);
    }
  }

  /// A block's results for one token; the last block may have fewer rows.
  LOSA_INLINE static void copy_rows(const float* rows, int64_t count, float* y) {
    if (count >= losa::kBlockRows)
      __builtin_memcpy(y, rows, losa::kBlockRows * sizeof *y);
    else
      for (int64_t r = 0; r < count; ++r) y[r] = rows[r];
  }

  static void decode(const losa::SparseFp32& w, losa::BlockRange blocks, const float* x, int64_t tokens, float* y) {
    const int64_t groups = (tokens + 5) / 6;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      int64_t token = 0;
      for (int64_t group = 0; group < groups; ++group) {
        const float* from = x + token * w.columns;
        float* to = y + token * w.rows;
        // Groups of nearly equal size: 7 tokens as 4 + 3, not 6 + 1.
        const int64_t count = (tokens - token + groups - group - 1) / (groups - group);
        switch (count) {
          case 1: decode_tokens<1, 4>(w, block, from, to); break;
          case 2: decode_tokens<2, 1>(w, block, from, to); break;
          case 3: decode_tokens<3, 1>(w, block, from, to); break;
          case 4: decode_tokens<4, 1>(w, block, from, to); break;
          case 5: decode_tokens<5, 1>(w, block, from, to); break;
          default: decode_tokens<6, 1>(w, block, from, to); break;
        }
        token += count;
      }
    }
  }

  // ---- many tokens: a tile of weights is expanded to L1 and meets a packed tile of activations

  /// Token-major activations to column-major, one tile, padded with zero tokens (token_tiles.h).
  static void pack(const float* x, int64_t tokens, int64_t columns, int64_t index, float* packed) {
    const losa::TokenTile tile = losa::token_tile(tokens, index);
    const float* from = x + tile.first * columns;
    float* to = packed + tile.first * columns;
    for (int64_t first = 0; first < columns; first += kTileColumns) {  // what is written stays in L1
      const int64_t last = first + kTileColumns < columns ? first + kTileColumns : columns;
      for (int64_t t = 0; t < tile.width; t += 8) {
        int64_t k = first;
        if (t + 8 <= tile.tokens)
          for (; k + 8 <= last; k += 8) V::transpose8(from + t * columns + k, columns, to + k * tile.width + t, tile.width);
        for (; k < last; ++k)
          for (int64_t i = t; i < t + 8; ++i) to[k * tile.width + i] = i < tile.tokens ? from[i * columns + k] : 0.0f;
      }
    }
  }

  /// A tile of one block's weights, [column][row], and which of them are kept.
  struct WeightTile {
    float weights[kTileColumns * losa::kBlockRows];
    uint64_t kept[losa::kBlockRows];  // bit k: column k of the tile; filled if zeros are skipped
  };

  LOSA_INLINE static void expand_tile(const uint8_t* masks, int64_t columns, const float*& values, bool skip,
                                      WeightTile* tile) {
    float* to = tile->weights;
    const auto expand_step = [&](const uint8_t* step_masks) {
      const uint64_t kept = word(step_masks);
#pragma GCC unroll 4
      for (int step = 0; step < kStep; ++step)
        for (int part = 0; part < kParts; ++part, to += V::kLanes)
          V::store(to, expand(step_masks, kept, values, step, part));
      values += __builtin_popcountll(kept);
    };
    int64_t k = 0;
    for (; k + kStep <= columns; k += kStep) expand_step(masks + 2 * k);
    if (k < columns) expand_step(Step(masks + 2 * k, columns - k).masks);
    if constexpr (V::kSkipDensity > 0) {
      if (!skip) return;
      uint8_t padded[2 * kTileColumns] = {};
      __builtin_memcpy(padded, masks, static_cast<size_t>(2 * columns));
      V::row_masks(padded, tile->kept);
    }
  }

  /// sums[row][token] += weights[row] * x over the kept columns: lanes run along tokens, so a zero weight
  /// costs nothing. x is [column][8 * Steps tokens].
  template <int Steps>
  static void skip_block(const WeightTile& tile, const float* x, float* sums) {
    for (int row = 0; row < losa::kBlockRows; ++row, sums += Steps * V::kLanes) {
      uint64_t kept = tile.kept[row];
      const float* weights = tile.weights + row;
      Vector total[Steps];
#pragma GCC unroll 8
      for (int s = 0; s < Steps; ++s) total[s] = V::load(sums + s * V::kLanes);
      while (kept != 0) {
        const int64_t k = __builtin_ctzll(kept);
        kept &= kept - 1;
        const Vector weight = V::broadcast(weights + k * losa::kBlockRows);
        const float* column = x + k * (Steps * V::kLanes);
#pragma GCC unroll 8
        for (int s = 0; s < Steps; ++s) total[s] = V::multiply_add(weight, V::load(column + s * V::kLanes), total[s]);
      }
#pragma GCC unroll 8
      for (int s = 0; s < Steps; ++s) V::store(sums + s * V::kLanes, total[s]);
    }
  }

  static void skip_tile(const WeightTile& tile, const float* x, int64_t width, float* sums) {
    switch (width / V::kLanes) {
      case 1: return skip_block<1>(tile, x, sums);
      case 2: return skip_block<2>(tile, x, sums);
      case 3: return skip_block<3>(tile, x, sums);
      case 4: return skip_block<4>(tile, x, sums);
      case 5: return skip_block<5>(tile, x, sums);
      case 6: return skip_block<6>(tile, x, sums);
      case 7: return skip_block<7>(tile, x, sums);
      default: return skip_block<8>(tile, x, sums);
    }
  }

  /// sums[token][row] += x * weights over all columns of the tile: lanes run along rows.
  template <int Tokens>
  static __attribute__((noinline)) void dense_block(const WeightTile& tile, int64_t columns, const float* x,
                                                    int64_t width, float* sums) {
    Vector total[Tokens][kParts];
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < kParts; ++part) total[t][part] = V::load(sums + (t * kParts + part) * V::kLanes);
    const float* weights = tile.weights;
    for (int64_t k = 0; k < columns; ++k, weights += losa::kBlockRows, x += width) {
      Vector weight[kParts];
      for (int part = 0; part < kParts; ++part) weight[part] = V::load(weights + part * V::kLanes);
#pragma GCC unroll 32
      for (int t = 0; t < Tokens; ++t) {
        const Vector activation = V::broadcast(x + t);
        for (int part = 0; part < kParts; ++part)
          total[t][part] = V::multiply_add(weight[part], activation, total[t][part]);
      }
    }
#pragma GCC unroll 32
    for (int t = 0; t < Tokens; ++t)
      for (int part = 0; part < kParts; ++part) V::store(sums + (t * kParts + part) * V::kLanes, total[t][part]);
  }

  static void dense_tile(const WeightTile& tile, int64_t columns, const float* x, int64_t width, float* sums) {
    constexpr int kWide = V::kWideTokens, kNarrow = V::kNarrowTokens;
    for (int64_t token = 0; token < width;) {
      const int64_t behind_wide = width - token - kWide;
      const bool wide = behind_wide == 0 || behind_wide >= kNarrow;
      if (wide)
        dense_block<kWide>(tile, columns, x + token, width, sums + token * losa::kBlockRows);
      else
        dense_block<kNarrow>(tile, columns, x + token, width, sums + token * losa::kBlockRows);
      token += wide ? kWide : kNarrow;
    }
  }

  static void store_skip(const float* sums, const losa::TokenTile& tile, int64_t rows, float* y, int64_t stride) {
    int64_t token = 0;
    if (rows >= losa::kBlockRows) {
      for (; token + 8 <= tile.tokens; token += 8)
        for (int half = 0; half < losa::kBlockRows; half += 8)
          V::transpose8(sums + half * tile.width + token, tile.width, y + token * stride + half, stride);
      rows = losa::kBlockRows;
    }
    for (; token < tile.tokens; ++token)
      for (int64_t r = 0; r < rows; ++r) y[token * stride + r] = sums[r * tile.width + token];
  }

  /// Skipping zeros keeps one sum per vector of tokens in flight: below eight of them, latency shows, and
  /// fewer weights must be kept to make up for it.
  static bool skips_zeros(double density, int64_t width) {
    return density <= V::kSkipDensity && density * losa::kTileTokens <= static_cast<double>(width);
  }

  static void prefill(const losa::SparseFp32& w, losa::BlockRange blocks, const float* packed, int64_t tokens,
                      float* y) {
    const int64_t tiles = losa::token_tile_count(tokens);
    const bool skip = skips_zeros(w.density(), losa::token_tile(tokens, tiles - 1).width);
    const int64_t padded_tokens = (tokens + losa::kTokenStep - 1) / losa::kTokenStep * losa::kTokenStep;
    alignas(64) WeightTile weights[kMaxBlocks];
    alignas(64) float sums[kMaxBlocks][losa::kBlockRows * losa::kPrefillTokens];
    const float* values[kMaxBlocks];

    for (int64_t first = blocks.first; first < blocks.last; first += kMaxBlocks) {
      const int64_t left = blocks.last - first;
      const int64_t count = left < kMaxBlocks ? left : kMaxBlocks;
      for (int64_t b = 0; b < count; ++b) {
        values[b] = w.block_values(first + b);
        __builtin_memset(sums[b], 0, static_cast<size_t>(losa::kBlockRows * padded_tokens) * sizeof(float));
      }
      for (int64_t k = 0; k < w.columns; k += kTileColumns) {
        const int64_t columns = w.columns - k < kTileColumns ? w.columns - k : kTileColumns;
        for (int64_t b = 0; b < count; ++b)
          expand_tile(w.block_masks(first + b) + 2 * k, columns, values[b], skip, &weights[b]);
        for (int64_t i = 0; i < tiles; ++i) {
          const losa::TokenTile tile = losa::token_tile(tokens, i);
          const float* x = packed + tile.first * w.columns + k * tile.width;
          for (int64_t b = 0; b < count; ++b) {
            float* to = sums[b] + tile.first * losa::kBlockRows;
            if constexpr (V::kSkipDensity > 0) {
              if (skip) {
                skip_tile(weights[b], x, tile.width, to);
                continue;
              }
            }
            dense_tile(weights[b], columns, x, tile.width, to);
          }
        }
      }
      for (int64_t b = 0; b < count; ++b) {
        const int64_t first_row = (first + b) * losa::kBlockRows;
        for (int64_t i = 0; i < tiles; ++i) {
          const losa::TokenTile tile = losa::token_tile(tokens, i);
          const float* from = sums[b] + tile.first * losa::kBlockRows;
          float* to = y + tile.first * w.rows + first_row;
          if (skip)
            store_skip(from, tile, w.rows - first_row, to, w.rows);
          else
            for (int64_t t = 0; t < tile.tokens; ++t)
              copy_rows(from + t * losa::kBlockRows, w.rows - first_row, to + t * w.rows);
        }
      }
    }
  }
};
