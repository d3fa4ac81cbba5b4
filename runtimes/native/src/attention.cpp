// Cuts attention into tasks. Compiled without fused multiply-adds (CMakeLists.txt), so that rotation gives the same bits
// on every processor.
#include "losa/attention.h"

#include <atomic>

#include "losa/head_queries.h"
#include "losa/scratch.h"

namespace losa {
namespace {

// Queries of a task, which share each tile of keys that is turned; their scores stay in the L2 cache.
constexpr int64_t kTaskQueries = 32;
// Multiply-adds that are done sooner than another thread would have joined.
constexpr int64_t kFewMultiplyAdds = 128 * 1024;

thread_local Scratch attention_scratch;

/// to = `from` rotated to a place, times `scale`. Dimensions beyond the rotated ones stay.
void rotate(const Attention& a, int64_t place, const float* from, float scale, float* to) {
  const int64_t half = a.cosines == nullptr ? 0 : a.rotary_half;
  const float* cosines = a.cosines + place * half;
  const float* sines = a.sines + place * half;
  for (int64_t d = 0; d < half; ++d) {
    const float first = from[d], second = from[half + d];
    to[d] = (first * cosines[d] - second * sines[d]) * scale;
    to[half + d] = (second * cosines[d] + first * sines[d]) * scale;
  }
  for (int64_t d = 2 * half; d < a.head_dim; ++d) to[d] = from[d] * scale;
}

struct Job {
  const KernelRow& row;
  const Attention& a;
  int64_t tile_tokens, tiles;
  std::atomic<bool> out_of_memory{false};

  int64_t place(int64_t batch_row, int64_t token) const {
    if (a.cosines == nullptr) return 0;
    if (a.first_prompt || a.positions == nullptr) return a.past(batch_row) + token;
    return a.positions[batch_row * a.tokens + token];
  }

  /// Keys and values of one head of one row: the past if it lies elsewhere, and the new ones.
  void store_keys(int64_t batch_row, int64_t kv_head) const {
    const int64_t past = a.past(batch_row), head = batch_row * a.kv_heads + kv_head;
    float* keys = a.present_key + head * a.capacity * a.head_dim;
    float* values = a.present_value + head * a.capacity * a.head_dim;
    const size_t past_bytes = static_cast<size_t>(past * a.head_dim) * sizeof(float);
    if (a.present_key != a.past_key && past_bytes != 0) {
      __builtin_memcpy(keys, a.past_key + head * a.past_capacity * a.head_dim, past_bytes);
      __builtin_memcpy(values, a.past_value + head * a.past_capacity * a.head_dim, past_bytes);
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t from = (batch_row * a.tokens + t) * a.key_stride + kv_head * a.head_dim;
      rotate(a, place(batch_row, t), a.key + from, 1.0f, keys + (past + t) * a.head_dim);
      __builtin_memcpy(values + (past + t) * a.head_dim, a.value + from,
                       static_cast<size_t>(a.head_dim) * sizeof(float));
    }
  }

  /// Tile `tile` of the tokens, for the heads that share one of keys.
  void attend_tile(int64_t batch_row, int64_t kv_head, int64_t tile) {
    const int64_t first = tile * tile_tokens, left = a.tokens - first;
    const int64_t group = a.heads / a.kv_heads, head = batch_row * a.kv_heads + kv_head;
    HeadQueries q{};
    q.tokens = left < tile_tokens ? left : tile_tokens;
    q.heads = group;
    q.head_dim = a.head_dim;
    q.past = a.past(batch_row) + first;
    q.window = a.window;
    q.keys = a.present_key + head * a.capacity * a.head_dim;
    q.values = a.present_value + head * a.capacity * a.head_dim;
    q.capacity = a.capacity;
    q.output_stride = a.heads * a.head_dim;
    q.output = a.output + (batch_row * a.tokens + first) * q.output_stride + kv_head * group * a.head_dim;
    const int64_t queries = q.tokens * group, turned = a.head_dim * kKeyTile, scores = queries * q.score_stride();
    float* memory = static_cast<float*>(
        attention_scratch.reserve((turned + scores + queries * a.head_dim) * static_cast<int64_t>(sizeof(float))));
    if (memory == nullptr) {
      out_of_memory = true;
      return;
    }
    q.turned = memory;
    q.scores = memory + turned;
    float* rotated = q.scores + scores;
    q.queries = rotated;
    for (int64_t t = 0; t < q.tokens; ++t) {
      const float* from = a.query + (batch_row * a.tokens + first + t) * a.query_stride + kv_head * group * a.head_dim;
      for (int64_t h = 0; h < group; ++h, rotated += a.head_dim)
        rotate(a, place(batch_row, first + t), from + h * a.head_dim, a.scale, rotated);
    }
    row.attend(q);
  }
};

void store_task(void* argument, size_t index) {
  const Job& job = *static_cast<const Job*>(argument);
  const int64_t head = static_cast<int64_t>(index);
  job.store_keys(head / job.a.kv_heads, head % job.a.kv_heads);
}

void attend_task(void* argument, size_t index) {
  Job& job = *static_cast<Job*>(argument);
  const int64_t heads = job.a.batch * job.a.kv_heads;
  // The last tiles see most keys: they come first, so that no thread is left alone with one.
  const int64_t tile = job.tiles - 1 - static_cast<int64_t>(index) / heads, head = static_cast<int64_t>(index) % heads;
  if (job.tiles == 1) store_task(argument, static_cast<size_t>(head));
  job.attend_tile(head / job.a.kv_heads, head % job.a.kv_heads, tile);
}

void run_here(void*, size_t count, void (*task)(void*, size_t), void* argument) {
  for (size_t i = 0; i < count; ++i) task(argument, i);
}

int64_t multiply_adds(const Attention& a) {
  int64_t keys = 0;
  for (int64_t b = 0; b < a.batch; ++b) keys += a.past(b) + a.tokens;
  return 2 * a.tokens * a.heads * a.head_dim * keys;
}

std::string of_row(int64_t row) { return " in row " + std::to_string(row); }

}  // namespace

bool check(const Attention& a, std::string* error) {
  const auto wrong = [&](const std::string& what) {
    *error = what;
    return false;
  };
  if (a.heads < 1 || a.kv_heads < 1 || a.heads % a.kv_heads != 0)
    return wrong(std::to_string(a.heads) + " heads cannot share " + std::to_string(a.kv_heads) + " of keys");
  if (a.head_dim < 1 || 2 * a.rotary_half > a.head_dim)
    return wrong("heads of " + std::to_string(a.head_dim) + " cannot be rotated by caches of width " +
                 std::to_string(a.rotary_half));
  for (int64_t row = 0; row < a.batch; ++row) {
    const int64_t past = a.past(row), end = past + a.tokens;
    if (past < 0 || end > a.capacity || (past > 0 && past > a.past_capacity))
      return wrong("seqlens_k is " + std::to_string(a.last[row]) + of_row(row) + " with " + std::to_string(a.tokens) +
                   " new tokens, a past of at most " + std::to_string(a.past_capacity) + " and room for " +
                   std::to_string(a.capacity));
    if (a.cosines == nullptr) continue;
    const bool given = a.positions != nullptr && !a.first_prompt;
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t place = given ? a.positions[row * a.tokens + t] : past + t;
      if (place < 0 || place >= a.rotary_rows)
        return wrong("position " + std::to_string(place) + of_row(row) + " has no row in a cache of " +
                     std::to_string(a.rotary_rows) + " rotations");
    }
  }
  return true;
}

bool attend(const KernelRow& row, const Attention& a, const Parallel& parallel) noexcept {
  if (a.batch <= 0 || a.tokens <= 0) return true;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tile_tokens = kTaskQueries / group > 1 ? kTaskQueries / group : 1;
  Job job{row, a, tile_tokens, (a.tokens + tile_tokens - 1) / tile_tokens};
  const Parallel here{run_here, nullptr};
  const Parallel& threads = multiply_adds(a) <= kFewMultiplyAdds ? here : parallel;
  const size_t heads = static_cast<size_t>(a.batch * a.kv_heads);
  if (job.tiles > 1) threads.each(heads, store_task, &job);
  threads.each(heads * static_cast<size_t>(job.tiles), attend_task, &job);
  return !job.out_of_memory;
}

}  // namespace losa
