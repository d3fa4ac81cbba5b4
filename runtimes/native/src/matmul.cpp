#include "losa/matmul.h"

#include <cstdlib>

#include "losa/token_tiles.h"

namespace losa {
namespace {

// A task below this many weights costs more to hand out than to run; above kMaxTasks they only crowd.
constexpr int64_t kDecodeTaskWeights = 48 * 1024;
constexpr int64_t kMaxTasks = 64;
constexpr int64_t kPrefillTasks = 16;
constexpr int64_t kPrefillMaxBlocks = 8;

/// The calling thread's packed activations: grows to the largest product seen, freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* reserve(int64_t floats) {
    if (floats > capacity_) {
      std::free(data_);
      const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
      data_ = static_cast<float*>(std::aligned_alloc(64, bytes));
      capacity_ = data_ == nullptr ? 0 : floats;
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t capacity_ = 0;
};

thread_local Scratch packed_scratch;

struct Job {
  const KernelRow& row;
  const SparseFp32& w;
  const float* x;
  int64_t tokens;  // at most kPrefillTokens
  float* y;
  float* packed;  // activations for prefill; null: decode reads x
  int64_t blocks_per_task;

  BlockRange blocks(size_t task) const {
    const int64_t first = static_cast<int64_t>(task) * blocks_per_task;
    const int64_t last = first + blocks_per_task;
    return {first, last < w.blocks() ? last : w.blocks()};
  }
  size_t tasks() const { return static_cast<size_t>((w.blocks() + blocks_per_task - 1) / blocks_per_task); }

  void product(const SparseFp32& weight, BlockRange range, float* to) const {
    if (packed != nullptr)
      row.prefill(weight, range, packed, tokens, to);
    else
      row.decode(weight, range, x, tokens, to);
  }

  /// A few pairs of blocks at a time, whose products are still in the cache when they are combined.
  void gated_product(BlockRange range) const {
    alignas(64) float products[kPrefillMaxBlocks * kBlockRows * kPrefillTokens];
    for (; range.first < range.last; range.first += kPrefillMaxBlocks) {
      const int64_t end = range.first + kPrefillMaxBlocks;
      const SparseFp32 part = w.whole_blocks({range.first, end < range.last ? end : range.last});
      product(part, {0, part.blocks()}, products);
      const int64_t first = range.first / 2 * kBlockRows;
      const int64_t count = part.rows / 2, left = w.outputs - first;
      row.gate(products, tokens, count < left ? count : left, y + first, w.outputs);
    }
  }
};

void pack_task(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  job.row.pack(job.x, job.tokens, job.w.columns, static_cast<int64_t>(index), job.packed);
}

void product_task(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  if (job.w.gated())
    job.gated_product(job.blocks(index));
  else
    job.product(job.w, job.blocks(index), job.y);
}

void run(const Parallel& parallel, size_t count, void (*task)(void*, size_t), Job* job) {
  if (count == 1)
    task(job, 0);
  else
    parallel.run(parallel.context, count, task, job);
}

int64_t clamp(int64_t value, int64_t low, int64_t high) {
  return value < low ? low : value > high ? high : value;
}

int64_t decode_blocks_per_task(const SparseFp32& w, int64_t tokens) {
  const int64_t weights = w.blocks() * kBlockRows * w.columns;
  const int64_t tasks = clamp(weights * tokens / kDecodeTaskWeights, 1, kMaxTasks);
  return (w.blocks() + tasks - 1) / tasks;
}

}  // namespace

bool multiply(const KernelRow& row, const SparseFp32& w, const float* x, int64_t tokens, float* y,
              const Parallel& parallel) noexcept {
  if (tokens <= 0) return true;
  // Passes of nearly equal size: 130 tokens as 72 + 58, not 128 + 2.
  const int64_t passes = (tokens + kPrefillTokens - 1) / kPrefillTokens;
  const int64_t pass = (tokens + passes * kTokenStep - 1) / (passes * kTokenStep) * kTokenStep;
  for (int64_t first = 0; first < tokens; first += pass) {
    const int64_t count = tokens - first < pass ? tokens - first : pass;
    Job job{row, w, x + first * w.columns, count, y + first * w.outputs, nullptr, 0};
    if (row.prefill == nullptr || count < row.prefill_min_tokens) {
      job.blocks_per_task = decode_blocks_per_task(w, count);
    } else {
      job.blocks_per_task = clamp(w.blocks() / kPrefillTasks, 1, kPrefillMaxBlocks);
      job.packed = packed_scratch.reserve(packed_floats(count, w.columns));
      if (job.packed == nullptr) return false;
      run(parallel, static_cast<size_t>(token_tile_count(count)), pack_task, &job);
    }
    if (w.gated()) job.blocks_per_task += job.blocks_per_task % 2;  // a task has whole pairs
    run(parallel, job.tasks(), product_task, &job);
  }
  return true;
}

}  // namespace losa
