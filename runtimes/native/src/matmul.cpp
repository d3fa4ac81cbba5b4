#include "losa/matmul.h"

#include "losa/numbers.h"
#include "losa/scratch.h"
#include "losa/token_tiles.h"

namespace losa {
namespace {

// A task below this many weights costs more to hand out than to run; above kMaxTasks they only crowd.
constexpr int64_t kDecodeTaskWeights = 48 * 1024;
constexpr int64_t kMaxTasks = 64;
// Blocks of a task, if the weight has as many, that make arranging several tokens a small part of its work.
constexpr int64_t kFewBlocks = 8;
constexpr int64_t kPrefillTasks = 16;
constexpr int64_t kPrefillMaxBlocks = 8;

thread_local Scratch normed_scratch, rounded_scratch, packed_scratch;

int64_t padded_tokens(int64_t tokens) { return (tokens + kTokenStep - 1) / kTokenStep * kTokenStep; }

struct Job {
  const KernelRow& row;
  const Weight& w;
  const float* x;
  int64_t tokens;  // at most kPrefillTokens
  float* y;
  bool prefill;
  SkipNorm norm;
  float* normed;          // [tokens, columns]: the norm's result, in place of x
  RoundedTokens rounded;  // of integer weights
  PackedTokens packed;    // of prefill
  int64_t blocks_per_task;

  BlockRange blocks(size_t task) const {
    const int64_t first = static_cast<int64_t>(task) * blocks_per_task;
    const int64_t last = first + blocks_per_task;
    return {first, last < w.blocks() ? last : w.blocks()};
  }
  size_t tasks() const { return static_cast<size_t>((w.blocks() + blocks_per_task - 1) / blocks_per_task); }

  void product(const Weight& weight, BlockRange range, float* to) const {
    if (is_integer(w.type)) {
      const IntegerKernels& kernels = row.integers(w.type);
      if (prefill)
        kernels.prefill(weight, range, packed, tokens, to);
      else
        kernels.decode(weight, range, rounded, tokens, to);
    } else {
      const FloatKernels& kernels = row.floats(w.type);
      if (prefill)
        kernels.prefill(weight, range, static_cast<const float*>(packed.values), tokens, to);
      else
        kernels.decode(weight, range, activations(), tokens, to);
    }
  }

  /// What the product reads.
  const float* activations() const { return norm.present() ? normed : x; }

  /// Adds and norms some tokens and rounds them, as far as the operator asks for either.
  void prepare(int64_t first, int64_t count) const {
    const int64_t place = first * w.columns;
    if (norm.present()) skip_norm(x + place, count, w.columns, norm.from(first, w.columns), normed + place);
    if (is_integer(w.type)) row.round(activations() + place, count, w.activation_bits, rounded.from(first));
  }

  /// A few pairs of blocks at a time, whose products are still in the cache when they are combined.
  void gated_product(BlockRange range) const {
    alignas(64) float products[kPrefillMaxBlocks * kBlockRows * kPrefillTokens];
    for (; range.first < range.last; range.first += kPrefillMaxBlocks) {
      const int64_t end = range.first + kPrefillMaxBlocks;
      const Weight part = w.whole_blocks({range.first, end < range.last ? end : range.last});
      product(part, {0, part.blocks()}, products);
      const int64_t first = range.first / 2 * kBlockRows;
      const int64_t count = part.rows / 2, left = w.outputs - first;
      row.gate(products, tokens, count < left ? count : left, y + first, w.outputs);
    }
  }

  /// Memory for normed, rounded and packed activations; false if there is none.
  bool reserve() {
    if (norm.present()) {
      normed = static_cast<float*>(normed_scratch.reserve(tokens * w.columns * 4));
      if (normed == nullptr) return false;
    }
    const bool integer = is_integer(w.type);
    if (integer) {
      const RoundedTokens shape{nullptr, nullptr, w.columns, w.group};
      const int64_t value_bytes = (tokens * shape.padded_columns() * 2 + 63) / 64 * 64;
      char* memory = static_cast<char*>(rounded_scratch.reserve(value_bytes + tokens * shape.groups() * 4));
      if (memory == nullptr) return false;
      rounded = {reinterpret_cast<int16_t*>(memory), reinterpret_cast<float*>(memory + value_bytes), w.columns,
                 w.group};
    }
    if (!prefill) return true;
    const int64_t value_bytes =
        integer ? padded_tokens(tokens) * rounded.padded_columns() * 2 : packed_floats(tokens, w.columns) * 4;
    const int64_t scale_bytes = integer ? padded_tokens(tokens) * rounded.groups() * 4 : 0;
    char* memory = static_cast<char*>(packed_scratch.reserve(value_bytes + scale_bytes));
    packed = {memory, reinterpret_cast<float*>(memory + value_bytes)};
    return memory != nullptr;
  }
};

void pack_task(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t tile = static_cast<int64_t>(index);
  const TokenTile part = token_tile(job.tokens, tile);
  job.prepare(part.first, part.tokens);
  if (!is_integer(job.w.type))
    return job.row.floats(job.w.type).pack(job.activations(), job.tokens, job.w.columns, tile,
                                           static_cast<float*>(job.packed.values));
  job.row.integers(job.w.type).pack(job.w, job.rounded, job.tokens, tile, job.packed);
}

void product_task(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  if (job.w.gated())
    job.gated_product(job.blocks(index));
  else
    job.product(job.w, job.blocks(index), job.y);
}

int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

int64_t decode_blocks_per_task(const Weight& w, int64_t tokens) {
  const int64_t weights = w.blocks() * kBlockRows * w.columns;
  const int64_t tasks = clamp(weights * tokens / kDecodeTaskWeights, 1, kMaxTasks);
  const int64_t blocks = (w.blocks() + tasks - 1) / tasks;
  // Each task arranges its activations anew, which for several tokens takes as long as a block or more.
  return tokens == 1 || blocks >= kFewBlocks ? blocks : clamp(w.blocks() / 2, 1, kFewBlocks);
}

/// Whether `tokens` are enough for the row's prefill.
bool takes_prefill(const KernelRow& row, ValueType type, int64_t tokens) {
  if (is_integer(type))
    return row.integers(type).prefill != nullptr && tokens >= row.integers(type).prefill_min_tokens;
  return row.floats(type).prefill != nullptr && tokens >= row.floats(type).prefill_min_tokens;
}

}  // namespace

bool multiply(const KernelRow& row, const Weight& w, const float* x, int64_t tokens, float* y,
              const Parallel& parallel, const SkipNorm& norm) noexcept {
  if (tokens <= 0) return true;
  // Passes of nearly equal size: 130 tokens as 72 + 58, not 128 + 2.
  const int64_t passes = (tokens + kPrefillTokens - 1) / kPrefillTokens;
  const int64_t pass = (tokens + passes * kTokenStep - 1) / (passes * kTokenStep) * kTokenStep;
  for (int64_t first = 0; first < tokens; first += pass) {
    const int64_t count = tokens - first < pass ? tokens - first : pass;
    Job job{row, w, x + first * w.columns, count, y + first * w.outputs, takes_prefill(row, w.type, count),
            norm.from(first, w.columns), nullptr, {}, {}, 0};
    if (!job.reserve()) return false;
    if (job.prefill) {
      job.blocks_per_task = clamp(w.blocks() / kPrefillTasks, 1, kPrefillMaxBlocks);
      parallel.each(static_cast<size_t>(token_tile_count(count)), pack_task, &job);
    } else {
      job.blocks_per_task = decode_blocks_per_task(w, count);
      job.prepare(0, count);
    }
    if (w.gated()) job.blocks_per_task += job.blocks_per_task % 2;  // a task has whole pairs
    parallel.each(job.tasks(), product_task, &job);
  }
  return true;
}

namespace {

/// Columns `first` to `last` of a row, where each step of `Width` columns has kBlockRows rows. read(position) gives a
/// stored value. Within a step there are no gaps, so that a compiler may take it in one load.
template <int64_t Width, class Read>
void copy_columns(int64_t row_of_block, int64_t first, int64_t last, const Read& read, float* y) {
  for (int64_t k = first; k < last; k += Width) {
    const int64_t position = k * kBlockRows + row_of_block * Width;
    for (int64_t c = 0; c < Width && k + c < last; ++c) y[k + c] = read(position + c);
  }
}

/// read(position) gives a level, which a group's scale turns into a value.
template <class Read>
void copy_scaled(const Weight& w, int64_t block, int64_t row_of_block, const Read& read, float* y) {
  for (int64_t first = 0; first < w.columns; first += w.group) {
    const int64_t last = first + w.group < w.columns ? first + w.group : w.columns;
    const int64_t place = first / w.group * kBlockRows + row_of_block;
    const float scale = from_fp16(load_at<uint16_t>(w.block_scales(block), place));
    copy_columns<4>(row_of_block, first, last, [&](int64_t at) { return static_cast<float>(read(at)) * scale; }, y);
  }
}

void copy_row(const Weight& w, int64_t block, int64_t row, float* y) {
  const uint8_t* values = w.block_values(block);
  switch (w.type) {
    case ValueType::kFp32:
      return copy_columns<1>(row, 0, w.columns, [&](int64_t at) { return load_at<float>(values, at); }, y);
    case ValueType::kBf16:
      return copy_columns<2>(row, 0, w.columns, [&](int64_t at) { return from_bf16(load_at<uint16_t>(values, at)); }, y);
    case ValueType::kInt8:
      return copy_scaled(w, block, row, [&](int64_t at) { return static_cast<int8_t>(values[at]); }, y);
    case ValueType::kInt4:
      return copy_scaled(w, block, row, [&](int64_t at) { return w.codebook[values[at / 2] >> (at % 2 * 4) & 15]; }, y);
  }
}

}  // namespace

int64_t gather_rows(const Weight& w, const int64_t* ids, int64_t count, float* y) noexcept {
  for (int64_t i = 0; i < count; ++i) {
    const int64_t id = load_at<int64_t>(ids, i);
    if (id < 0 || id >= w.rows) return i;
    copy_row(w, id / kBlockRows, id % kBlockRows, y + i * w.columns);
  }
  return -1;
}

}  // namespace losa
