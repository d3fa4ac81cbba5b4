#include "losa/matmul.h"

#include "losa/numbers.h"
#include "losa/token_tiles.h"

namespace losa {
namespace {

// A task below this many weights costs more to hand out than to run; above kMaxTasks they only crowd.
constexpr int64_t kDecodeTaskWeights = 48 * 1024;
constexpr int64_t kMaxTasks = 64;
// Fewer activations than this one thread prepares sooner than several do, which then have to meet.
constexpr int64_t kPreparedAlone = 16 * 1024;
// Blocks of a task, if the weight has as many, that make beginning one a small part of its work where tokens are several:
// memory is read from another place on, and floats are copied anew, which takes as long as a block or more.
constexpr int64_t kFewBlocks = 8;
constexpr int64_t kPrefillTasks = 16;
constexpr int64_t kPrefillMaxBlocks = 8;

int64_t padded_tokens(int64_t tokens) { return (tokens + kTokenStep - 1) / kTokenStep * kTokenStep; }

/// Bytes of whole cache lines that hold `bytes`.
int64_t whole_lines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

int64_t decode_blocks_per_task(const Weight& w, int64_t tokens) {
  const int64_t weights = w.blocks() * kBlockRows * w.columns;
  const int64_t tasks = clamp(weights * tokens / kDecodeTaskWeights, 1, kMaxTasks);
  const int64_t blocks = (w.blocks() + tasks - 1) / tasks;
  return tokens == 1 || blocks >= kFewBlocks ? blocks : clamp(w.blocks() / 2, 1, kFewBlocks);
}

/// Whether `tokens` are enough for the row's prefill.
bool takes_prefill(const KernelRow& row, ValueType type, int64_t tokens) {
  if (is_integer(type))
    return row.integers(type).prefill != nullptr && tokens >= row.integers(type).prefill_min_tokens;
  return row.floats(type).prefill != nullptr && tokens >= row.floats(type).prefill_min_tokens;
}

/// How many tokens a call of `tokens` takes at once. Passes are of nearly equal size: 130 tokens as 72 + 58, not 128 + 2.
int64_t pass_tokens(int64_t tokens) {
  const int64_t passes = (tokens + kPrefillTokens - 1) / kPrefillTokens;
  return (tokens + passes * kTokenStep - 1) / (passes * kTokenStep) * kTokenStep;
}

}  // namespace

Product::Product(const KernelRow& row, const Weight& w, const float* x, int64_t tokens, float* y,
                 const SkipNorm& norm)
    : row_(row), w_(w), x_(x), tokens_(tokens), y_(y), norm_(norm), prefill_(takes_prefill(row, w.type, tokens)) {
  blocks_per_task_ = prefill_ ? clamp(w.blocks() / kPrefillTasks, 1, kPrefillMaxBlocks)
                              : decode_blocks_per_task(w, tokens);
  if (w.gated()) blocks_per_task_ += blocks_per_task_ % 2;  // a task has whole pairs
}

bool Product::reserve(ProductMemory* memory) {
  if (norm_.present()) {
    normed_ = static_cast<float*>(memory->normed.reserve(tokens_ * w_.columns * 4));
    if (normed_ == nullptr) return false;
  }
  const bool integer = is_integer(w_.type);
  if (integer) {
    const RoundedTokens shape{nullptr, nullptr, w_.columns, w_.group};
    const int64_t value_bytes = whole_lines(tokens_ * shape.padded_columns() * 2);
    const int64_t scale_bytes = whole_lines(tokens_ * shape.groups() * 4);
    const int64_t arranged_bytes = arranges() ? tokens_ * shape.arranged_bytes() : 0;
    char* to = static_cast<char*>(memory->rounded.reserve(value_bytes + scale_bytes + arranged_bytes));
    if (to == nullptr) return false;
    rounded_ = {reinterpret_cast<int16_t*>(to), reinterpret_cast<float*>(to + value_bytes), w_.columns, w_.group,
                arranges() ? to + value_bytes + scale_bytes : nullptr};
  }
  if (!prefill_) return true;
  const int64_t value_bytes =
      integer ? padded_tokens(tokens_) * rounded_.padded_columns() * 2 : packed_floats(tokens_, w_.columns) * 4;
  const int64_t scale_bytes = integer ? padded_tokens(tokens_) * rounded_.groups() * 4 : 0;
  char* to = static_cast<char*>(memory->packed.reserve(value_bytes + scale_bytes));
  packed_ = {to, reinterpret_cast<float*>(to + value_bytes)};
  return to != nullptr;
}

void Product::add_to(Stages* stages) {
  const size_t tasks = static_cast<size_t>((w_.blocks() + blocks_per_task_ - 1) / blocks_per_task_);
  const auto product = [](void* self, size_t task) { static_cast<const Product*>(self)->run_task(task); };
  if (prefill_) {
    const auto pack = [](void* self, size_t tile) { static_cast<const Product*>(self)->pack(tile); };
    stages->add(static_cast<size_t>(token_tile_count(tokens_)), pack, this);
    return stages->add(tasks, product, this);
  }
  if (tokens_ > 1 && tokens_ * w_.columns >= kPreparedAlone && prepares()) {
    const auto prepare = [](void* self, size_t token) {
      static_cast<const Product*>(self)->prepare(static_cast<int64_t>(token), 1);
    };
    stages->add(static_cast<size_t>(tokens_), prepare, this);
    return stages->add(tasks, product, this);
  }
  const auto prepare = [](void* self) {
    const Product& product = *static_cast<const Product*>(self);
    product.prepare(0, product.tokens_);
  };
  stages->add(tasks, product, this, prepare);
}

void Product::prepare(int64_t first, int64_t count) const {
  const int64_t place = first * w_.columns;
  if (norm_.present()) skip_norm(x_ + place, count, w_.columns, norm_.from(first, w_.columns), normed_ + place);
  if (!is_integer(w_.type)) return;
  row_.round(activations() + place, count, w_.activation_bits, rounded_.from(first));
  if (!arranges()) return;
  for (int64_t token = first; token < first + count; ++token)
    row_.integers(w_.type).arrange(w_, rounded_, tokens_, token);
}

void Product::pack(size_t index) const {
  const int64_t tile = static_cast<int64_t>(index);
  const TokenTile part = token_tile(tokens_, tile);
  prepare(part.first, part.tokens);
  if (!is_integer(w_.type))
    return row_.floats(w_.type).pack(activations(), tokens_, w_.columns, tile, static_cast<float*>(packed_.values));
  row_.integers(w_.type).pack(w_, rounded_, tokens_, tile, packed_);
}

void Product::run_task(size_t task) const {
  const int64_t first = static_cast<int64_t>(task) * blocks_per_task_, last = first + blocks_per_task_;
  const BlockRange blocks{first, last < w_.blocks() ? last : w_.blocks()};
  if (w_.gated())
    gated_product(blocks);
  else
    product(w_, blocks, y_);
}

void Product::product(const Weight& weight, BlockRange range, float* to) const {
  if (is_integer(w_.type)) {
    const IntegerKernels& kernels = row_.integers(w_.type);
    if (prefill_)
      kernels.prefill(weight, range, packed_, tokens_, to);
    else
      kernels.decode(weight, range, rounded_, tokens_, to);
  } else {
    const FloatKernels& kernels = row_.floats(w_.type);
    if (prefill_)
      kernels.prefill(weight, range, static_cast<const float*>(packed_.values), tokens_, to);
    else
      kernels.decode(weight, range, activations(), tokens_, to);
  }
}

void Product::gated_product(BlockRange range) const {
  alignas(64) float products[kPrefillMaxBlocks * kBlockRows * kPrefillTokens];
  for (; range.first < range.last; range.first += kPrefillMaxBlocks) {
    const int64_t end = range.first + kPrefillMaxBlocks;
    const Weight part = w_.whole_blocks({range.first, end < range.last ? end : range.last});
    product(part, {0, part.blocks()}, products);
    const int64_t first = range.first / 2 * kBlockRows;
    const int64_t count = part.rows / 2, left = w_.outputs - first;
    row_.gate(products, tokens_, count < left ? count : left, y_ + first, w_.outputs);
  }
}

bool multiply(const KernelRow& row, const Weight& w, const float* x, int64_t tokens, float* y,
              const Parallel& parallel, const SkipNorm& norm) noexcept {
  if (tokens <= 0) return true;
  static thread_local ProductMemory memory;
  const int64_t pass = pass_tokens(tokens);
  for (int64_t first = 0; first < tokens; first += pass) {
    Product product(row, w, x + first * w.columns, tokens - first < pass ? tokens - first : pass,
                    y + first * w.outputs, norm.from(first, w.columns));
    if (!product.reserve(&memory)) return false;
    Stages stages;
    product.add_to(&stages);
    stages.run(parallel);
  }
  return true;
}

bool mlp(const KernelRow& row, const Weight& gate_up, const Weight& down, const float* x, int64_t tokens, float* y,
         const Parallel& parallel, const SkipNorm& norm) noexcept {
  if (tokens <= 0) return true;
  static thread_local ProductMemory memory[2];
  static thread_local Scratch hidden_memory;
  const int64_t pass = pass_tokens(tokens);
  float* hidden = static_cast<float*>(hidden_memory.reserve(pass * gate_up.outputs * 4));
  if (hidden == nullptr) return false;
  for (int64_t first = 0; first < tokens; first += pass) {
    const int64_t count = tokens - first < pass ? tokens - first : pass;
    Product inner(row, gate_up, x + first * gate_up.columns, count, hidden, norm.from(first, gate_up.columns));
    Product outer(row, down, hidden, count, y + first * down.outputs, {});
    if (!inner.reserve(&memory[0]) || !outer.reserve(&memory[1])) return false;
    Stages stages;
    inner.add_to(&stages);
    outer.add_to(&stages);
    stages.run(parallel);
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
