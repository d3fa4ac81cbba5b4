// int8 and int4 weights on ARM: from what is stored to bytes with zeros in place, and decode's loop around them.
//
// A step of four columns has 64 positions; four vectors hold it, each with the four columns of four rows. Needs
// neon.h and expand.h.

/// For each 8-bit mask, which of eight packed bytes each position takes; 255 means none.
struct ByteTable {
  alignas(64) uint8_t lanes[256][8];
  constexpr ByteTable() : lanes() {
    for (int bits = 0; bits < 256; ++bits) {
      uint8_t next = 0;
      for (int lane = 0; lane < 8; ++lane) lanes[bits][lane] = bits >> lane & 1 ? next++ : uint8_t{255};
    }
  }
};
constexpr ByteTable kExpandBytes;

// Values are one long stream; the processor's own prefetching stops at each page.
constexpr int64_t kBytesAhead = 1024;
constexpr int64_t kMaxGroupSteps = losa::kMaxGroup / 4;

/// 64 positions from their mask and packed bytes, of which 16 past the last may be read. Returns how many are kept.
LOSA_INLINE static int64_t expand_bytes(const uint8_t* masks, const uint8_t* packed, int8x16_t (&weights)[4]) {
  const NeonMask kept(masks);
#pragma GCC unroll 4
  for (int part = 0; part < 4; ++part) {
    const uint8x16_t lower = vld1q_u8(packed + kept.before(16 * part));
    const uint8x16_t upper = vld1q_u8(packed + kept.before(16 * part + 8));
    weights[part] = vreinterpretq_s8_u8(
        vcombine_u8(vqtbl1_u8(lower, vld1_u8(kExpandBytes.lanes[masks[2 * part]])),
                    vqtbl1_u8(upper, vld1_u8(kExpandBytes.lanes[masks[2 * part + 1]]))));
  }
  return kept.count();
}

/// The levels of the 32 codes in 16 bytes, the low half of a byte first.
LOSA_INLINE static void levels_of(const uint8_t* codes, int8x16_t codebook, int8x16_t* levels) {
  const uint8x16_t bytes = vld1q_u8(codes);
  const int8x16_t low = vqtbl1q_s8(codebook, vandq_u8(bytes, vdupq_n_u8(15)));
  const int8x16_t high = vqtbl1q_s8(codebook, vshrq_n_u8(bytes, 4));
  levels[0] = vzip1q_s8(low, high);
  levels[1] = vzip2q_s8(low, high);
}

// Steps of a block, one after the other: one class for each way they are stored. `start_group` is called before each
// group of columns.

struct SparseInt8 {
  const uint8_t *masks, *values;

  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    masks = w.block_masks(block);
    values = w.block_values(block);
  }
  LOSA_INLINE void start_group(int64_t) {}
  LOSA_INLINE void next(int8x16_t (&weights)[4]) {
    __builtin_prefetch(masks + kBytesAhead);
    __builtin_prefetch(values + kBytesAhead);
    values += expand_bytes(masks, values, weights);
    masks += 8;
  }
};

/// A group's codes become levels all at once, long before they are read: a load that overlaps several stores would
/// have to wait until these have left the store buffer.
struct SparseInt4 {
  const uint8_t *masks, *values, *level;
  int8x16_t codebook;
  alignas(16) int8_t levels[64 * kMaxGroupSteps + 16];

  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    masks = w.block_masks(block);
    values = w.block_values(block);
    codebook = vld1q_s8(w.codebook);
  }
  LOSA_INLINE void start_group(int64_t steps) {
    const int64_t bytes = bytes_of(steps);
    int8x16_t both[2];
    for (int64_t i = 0; i < bytes; i += 16) {
      __builtin_prefetch(values + i + kBytesAhead);
      levels_of(values + i, codebook, both);
      vst1q_s8(levels + 2 * i, both[0]);
      vst1q_s8(levels + 2 * i + 16, both[1]);
    }
    values += bytes;
    level = reinterpret_cast<const uint8_t*>(levels);
  }
  LOSA_INLINE void next(int8x16_t (&weights)[4]) {
    __builtin_prefetch(masks + kBytesAhead);
    const int64_t kept = expand_bytes(masks, level, weights);
    level += kept + kept % 2;  // a step starts a byte
    masks += 8;
  }

 private:
  LOSA_INLINE int64_t bytes_of(int64_t steps) const {
    uint64x2_t bytes = vdupq_n_u64(0);
    int64_t step = 0;
    for (; step + 2 <= steps; step += 2) {
      const uint64x2_t kept = vpaddlq_u32(vpaddlq_u16(vpaddlq_u8(vcntq_u8(vld1q_u8(masks + 8 * step)))));
      bytes = vaddq_u64(bytes, vshrq_n_u64(vaddq_u64(kept, vdupq_n_u64(1)), 1));
    }
    const int64_t last = step < steps ? (NeonMask(masks + 8 * step).count() + 1) / 2 : 0;
    return static_cast<int64_t>(vaddvq_u64(bytes)) + last;
  }
};

struct DenseInt8 {
  const uint8_t* values;

  LOSA_INLINE void start(const losa::Weight& w, int64_t block) { values = w.block_values(block); }
  LOSA_INLINE void start_group(int64_t) {}
  LOSA_INLINE void next(int8x16_t (&weights)[4]) {
    __builtin_prefetch(values + kBytesAhead);
    for (int part = 0; part < 4; ++part) weights[part] = vreinterpretq_s8_u8(vld1q_u8(values + 16 * part));
    values += 64;
  }
};

struct DenseInt4 {
  const uint8_t* values;
  int8x16_t codebook;

  LOSA_INLINE void start(const losa::Weight& w, int64_t block) {
    values = w.block_values(block);
    codebook = vld1q_s8(w.codebook);
  }
  LOSA_INLINE void start_group(int64_t) {}
  LOSA_INLINE void next(int8x16_t (&weights)[4]) {
    __builtin_prefetch(values + kBytesAhead);
    levels_of(values, codebook, weights);
    levels_of(values + 16, codebook, weights + 2);
    values += 32;
  }
};

/// The scales of four rows.
LOSA_INLINE static float32x4_t half_floats(const uint16_t* from) {
  return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(reinterpret_cast<const uint8_t*>(from))));
}

// ---- decode ----

/// One block times `Sums::kTokens` tokens. `Sums` multiplies, and holds a group's sums in registers:
///   clear()             before each group
///   start(x, stride)    takes the next 16 columns of its tokens, `stride` apart
///   add<Step>(weights)  of these, step 0, 1, 2 or 3
///   total(t, part)      what token t has of rows 4 part to 4 part + 3
template <class Sums, class Steps>
static void decode_block(const losa::Weight& w, int64_t block, const losa::RoundedTokens& x, float* y) {
  constexpr int kTokens = Sums::kTokens;
  Steps steps;
  steps.start(w, block);
  const uint16_t* scales = w.block_scales(block);
  const int64_t stride = x.padded_columns();
  float32x4_t results[kTokens][4];
  for (int t = 0; t < kTokens; ++t)
    for (int part = 0; part < 4; ++part) results[t][part] = vdupq_n_f32(0);
  for (int64_t group = 0, first = 0; first < w.columns; ++group, first += w.group, scales += losa::kBlockRows) {
    const int64_t columns = w.columns - first < w.group ? w.columns - first : w.group;
    steps.start_group((columns + 3) / 4);
    Sums sums;
    sums.clear();
    int8x16_t weights[4];
    for (int64_t k = 0; k < columns; k += 16) {  // activations are there to the end of the group, zero or not
      sums.start(x.values + first + k, stride);
      steps.next(weights);
      sums.template add<0>(weights);
      if (k + 4 >= columns) break;
      steps.next(weights);
      sums.template add<1>(weights);
      if (k + 8 >= columns) break;
      steps.next(weights);
      sums.template add<2>(weights);
      if (k + 12 >= columns) break;
      steps.next(weights);
      sums.template add<3>(weights);
    }
    for (int t = 0; t < kTokens; ++t) {
      const float scale = x.token_scales(t)[group];
      for (int part = 0; part < 4; ++part) {
        const float32x4_t both = vmulq_n_f32(half_floats(scales + 4 * part), scale);
        results[t][part] = vfmaq_f32(results[t][part], vcvtq_f32_s32(sums.total(t, part)), both);
      }
    }
  }
  const int64_t first_row = block * losa::kBlockRows;
  for (int t = 0; t < kTokens; ++t) {
    float rows[losa::kBlockRows];
    for (int part = 0; part < 4; ++part) vst1q_f32(rows + 4 * part, results[t][part]);
    copy_rows(rows, w.rows - first_row, y + t * w.rows + first_row);
  }
}

/// `Sums<Tokens>` as above, for at most `MaxTokens` (2 or 4) at once.
template <template <int> class Sums, int MaxTokens, class Steps>
static void decode_tokens(const losa::Weight& w, losa::BlockRange blocks, const losa::RoundedTokens& x,
                          int64_t tokens, float* y) {
  const int64_t groups = (tokens + MaxTokens - 1) / MaxTokens;
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    int64_t token = 0;
    for (int64_t group = groups; group > 0; --group) {
      const int64_t count = (tokens - token + group - 1) / group;  // 5 tokens as 3 + 2, not 4 + 1
      const losa::RoundedTokens from = x.from(token);
      float* to = y + token * w.rows;
      if (count == 1) {
        decode_block<Sums<1>, Steps>(w, block, from, to);
      } else if (count == 2) {
        decode_block<Sums<2>, Steps>(w, block, from, to);
      } else if constexpr (MaxTokens == 4) {
        if (count == 3)
          decode_block<Sums<3>, Steps>(w, block, from, to);
        else
          decode_block<Sums<4>, Steps>(w, block, from, to);
      }
      token += count;
    }
  }
}

// ---- prefill ----

/// Which elements of a tile are kept at all, for SkipProduct: bit e of rows[r]. A step has `PerStep` elements, one of
/// four columns or two of two.
template <int PerStep>
static void element_masks(const uint8_t* masks, int64_t steps, uint64_t (&rows)[losa::kBlockRows]) {
  constexpr uint8x16_t kLowHighHalf = {15, 240, 15, 240, 15, 240, 15, 240, 15, 240, 15, 240, 15, 240, 15, 240};
  constexpr uint8_t kFirstPairs = 0x33;  // columns 0 and 1 of both rows in a byte
  alignas(16) uint8_t padded[8 * kMaxGroupSteps] = {};
  __builtin_memcpy(padded, masks, static_cast<size_t>(8 * steps));
  uint8x16_t parts[8];  // of eight elements each
  for (int part = 0; part < 8; ++part) {
    uint8x16_t bits = vdupq_n_u8(0);
    for (int i = 0; i < 8 / PerStep && part < PerStep * kMaxGroupSteps / 8; ++i) {
      uint64_t step;
      __builtin_memcpy(&step, padded + 8 * (part * 8 / PerStep + i), sizeof step);
      const uint8x16_t twice = vreinterpretq_u8_u64(vdupq_n_u64(step));
      const uint8x16_t of_rows = vandq_u8(vzip1q_u8(twice, twice), kLowHighHalf);
      if constexpr (PerStep == 1) {
        bits = append_bit(bits, of_rows, kLowHighHalf);
      } else {
        bits = append_bit(bits, of_rows, vdupq_n_u8(kFirstPairs));
        bits = append_bit(bits, of_rows, vdupq_n_u8(static_cast<uint8_t>(~kFirstPairs)));
      }
    }
    parts[part] = bits;
  }
  bytes_of_rows(parts, rows);
}

LOSA_INLINE static void store_scales(const uint16_t* from, float* to) {
  for (int part = 0; part < 4; ++part) vst1q_f32(to + 4 * part, half_floats(from + 4 * part));
}

LOSA_INLINE static void add_scaled(float* sums, int32x4_t total, float32x4_t scale) {
  vst1q_f32(sums, vfmaq_f32(vld1q_f32(sums), vcvtq_f32_s32(total), scale));
}

/// A product as prefill.h wants it, with lanes along rows: eight tokens meet eight rows at a time, whose sums fill half
/// the registers. `Eight` gives
///   kApart                 elements from one row, or token, of the same step to the next
///   run(weights, elements, x, width, scales, token_scales, sums)
template <class Eight>
struct EightByEight {
  static constexpr bool kNeedsRowMasks = false;

  static void add(const WeightTile<int32_t>& tile, int64_t elements, const int32_t* x, int64_t width, int64_t,
                  const float* token_scales, float* sums) {
    for (int64_t t = 0; t < width; t += 8)
      for (int half = 0; half < losa::kBlockRows; half += 8)
        Eight::run(tile.weights + Eight::kApart * half, elements, x + Eight::kApart * t, width, tile.scales + half,
                   token_scales + t, sums + t * losa::kBlockRows + half);
  }

  static void store(const float* sums, const losa::TokenTile&, int64_t token, int64_t count, int64_t rows, float* y,
                    int64_t stride) {
    for (int64_t t = 0; t < count; ++t) copy_rows(sums + (token + t) * losa::kBlockRows, rows, y + t * stride);
  }
};

/// Scales the sums of eight tokens and eight rows and adds them.
LOSA_INLINE static void add_eight(const int32x4_t (&total)[8][2], const float* scales, const float* token_scales,
                                  float* sums) {
  const float32x4_t low = vld1q_f32(scales), high = vld1q_f32(scales + 4);
  for (int t = 0; t < 8; ++t, sums += losa::kBlockRows) {
    add_scaled(sums, total[t][0], vmulq_n_f32(low, token_scales[t]));
    add_scaled(sums + 4, total[t][1], vmulq_n_f32(high, token_scales[t]));
  }
}

/// Packs a tile of tokens, group by group. `Layout` gives elements(w) of a token, group_elements(steps) of a group, and
/// group(from, steps, width, t, to), which writes `kTokens` tokens from token t on; absent ones are given as zeros.
template <class Layout>
static void pack_tokens(const losa::Weight& w, const losa::RoundedTokens& x, int64_t tokens, int64_t index,
                        const losa::PackedTokens& packed) {
  static constexpr int16_t kZeros[losa::kMaxGroup] = {};
  const losa::TokenTile tile = losa::token_tile(tokens, index);
  int32_t* to = static_cast<int32_t*>(packed.values) + tile.first * Layout::elements(w);
  float* scales = packed.scales + tile.first * x.groups();
  for (int64_t group = 0; group < x.groups(); ++group, scales += tile.width) {
    const int64_t first = group * x.group, left = w.columns - first;
    const int64_t steps = ((left < x.group ? left : x.group) + 3) / 4;
    for (int64_t t = 0; t < tile.width; t += Layout::kTokens) {
      const int16_t* from[Layout::kTokens];
      for (int i = 0; i < Layout::kTokens; ++i) {
        const bool real = t + i < tile.tokens;
        from[i] = real ? x.token(tile.first + t + i) + first : kZeros;
        scales[t + i] = real ? x.token_scales(tile.first + t + i)[group] : 0.0f;
      }
      Layout::group(from, steps, tile.width, t, to);
    }
    to += Layout::group_elements(steps) * tile.width;
  }
}
