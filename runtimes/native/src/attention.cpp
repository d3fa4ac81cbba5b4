// Cuts attention into tasks. Compiled without fused multiply-adds (CMakeLists.txt), so that rotation gives the same bits
// on every processor.
#include "losa/attention.h"

#include <atomic>
#include <cmath>

#include "losa/head_queries.h"
#include "losa/scratch.h"

namespace losa {
namespace {

// Queries of a task, which share each tile of keys that is turned; their scores stay in the L2 cache.
constexpr int64_t kTaskQueries = 32;
// Keys that are attended to at once: their values wait in the L2 cache for their turn. More are attended to part by part
// and the parts merged in order; in decoding, threads may share them.
constexpr int64_t kPartKeys = 512;
static_assert(kPartKeys % kKeyTile == 0, "a tile of keys lies in one part");
constexpr int64_t kFewTasks = 32;  // with more there is something to do for each thread
// Multiply-adds that are done sooner than another thread would have joined.
constexpr int64_t kFewMultiplyAdds = 64 * 1024;
constexpr int64_t kLine = 16;    // floats of a line of the cache
constexpr int64_t kStreams = 4;  // places at which keys of one head are read at once

thread_local Scratch attention_scratch, parts_scratch;

/// to = `from` rotated by a row of cosines, times `scale`. Dimensions beyond the rotated ones stay.
void rotate(const Attention& a, int64_t rotation, const float* from, float scale, float* to) {
  const int64_t half = a.cosines == nullptr ? 0 : a.rotary_half;
  const float* cosines = a.cosines + rotation * half;
  const float* sines = a.sines + rotation * half;
  for (int64_t d = 0; d < half; ++d) {
    const float first = from[d], second = from[half + d];
    to[d] = (first * cosines[d] - second * sines[d]) * scale;
    to[half + d] = (second * cosines[d] + first * sines[d]) * scale;
  }
  for (int64_t d = 2 * half; d < a.head_dim; ++d) to[d] = from[d] * scale;
}

/// Reads keys and values into the caches: `floats` of them from each of `streams` places, `stride` apart, a line of each
/// in turn. All weights have passed the caches since the last token. A processor sees the addresses rise and reads ahead
/// of each, more than it takes requests to prefetch: on a Zen 4, three heads of 100 keys took 14 µs so, 20 µs with those,
/// 6 µs if the caches had them.
void fetch(const float* keys, const float* values, int64_t streams, int64_t stride, int64_t floats) {
  for (int64_t i = 0; i < floats; i += kLine)
    for (int64_t at = i; at < i + streams * stride; at += stride) {
      static_cast<void>(static_cast<const volatile float*>(keys)[at]);
      static_cast<void>(static_cast<const volatile float*>(values)[at]);
    }
}

/// What a part of the keys comes to for some queries: the results of HeadQueries.
struct Part {
  float* output;  // [queries][head_dim]
  float* largest;
  float* sums;

  static int64_t floats(int64_t queries, int64_t head_dim) { return queries * (head_dim + 2); }
  static Part in(float* memory, int64_t queries, int64_t head_dim) {
    return {memory, memory + queries * head_dim, memory + queries * (head_dim + 1)};
  }

  /// Adds what came of further keys.
  void merge(const Part& more, int64_t queries, int64_t head_dim) const {
    for (int64_t i = 0; i < queries; ++i) {
      if (more.sums[i] == 0.0f) continue;  // it sees none of them
      const float most = largest[i] > more.largest[i] ? largest[i] : more.largest[i];
      const float before = sums[i] == 0.0f ? 0.0f : std::exp(largest[i] - most);
      const float behind = std::exp(more.largest[i] - most);
      float *y = output + i * head_dim, *other = more.output + i * head_dim;
      for (int64_t d = 0; d < head_dim; ++d) y[d] = y[d] * before + other[d] * behind;
      sums[i] = sums[i] * before + more.sums[i] * behind;
      largest[i] = most;
    }
  }
};

/// Some tokens of a row, for the heads that share one of keys.
struct Tile {
  int64_t batch_row, kv_head, first, tokens;
};

struct Job {
  const KernelRow& row;
  const Attention& a;
  int64_t tile_tokens, tiles;
  int64_t most_parts;   // of any row
  float* shared_parts;  // [head][part]: where parts are tasks of their own; null otherwise
  bool fetched = false;  // keys and values of all heads are in the caches
  std::atomic<bool> out_of_memory{false};

  int64_t heads() const { return a.batch * a.kv_heads; }
  int64_t group() const { return a.heads / a.kv_heads; }
  Tile tile(int64_t head, int64_t index) const {
    const int64_t first = index * tile_tokens, left = a.tokens - first;
    return {head / a.kv_heads, head % a.kv_heads, first, left < tile_tokens ? left : tile_tokens};
  }
  int64_t parts(const Tile& tile) const {
    return (a.past(tile.batch_row) + tile.first + tile.tokens + kPartKeys - 1) / kPartKeys;
  }
  Part shared_part(int64_t head, int64_t index) const {
    const int64_t queries = a.tokens * group();
    return Part::in(shared_parts + (head * most_parts + index) * Part::floats(queries, a.head_dim), queries,
                    a.head_dim);
  }

  /// Keys and values of one head of one row: the past if it lies elsewhere, and the new ones.
  void store_keys(int64_t head) const {
    const int64_t batch_row = head / a.kv_heads, kv_head = head % a.kv_heads, past = a.past(batch_row);
    float* keys = a.present_key + head * a.capacity * a.head_dim;
    float* values = a.present_value + head * a.capacity * a.head_dim;
    const size_t past_bytes = static_cast<size_t>(past * a.head_dim) * sizeof(float);
    if (a.present_key != a.past_key && past_bytes != 0) {
      __builtin_memcpy(keys, a.past_key + head * a.past_capacity * a.head_dim, past_bytes);
      __builtin_memcpy(values, a.past_value + head * a.past_capacity * a.head_dim, past_bytes);
    }
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t from = (batch_row * a.tokens + t) * a.key_stride + kv_head * a.head_dim;
      rotate(a, a.rotation(batch_row, t), a.key + from, 1.0f, keys + (past + t) * a.head_dim);
      __builtin_memcpy(values + (past + t) * a.head_dim, a.value + from,
                       static_cast<size_t>(a.head_dim) * sizeof(float));
    }
  }

  /// The queries of a tile, and memory of the calling thread for them and two parts; null if there is none.
  float* open(const Tile& tile, HeadQueries* q) {
    const int64_t queries = tile.tokens * group();
    const int64_t turned = a.head_dim * kKeyTile, scores = queries * kPartKeys, rotated = queries * a.head_dim;
    const int64_t floats = turned + scores + rotated + 2 * Part::floats(queries, a.head_dim);
    float* memory = static_cast<float*>(attention_scratch.reserve(floats * static_cast<int64_t>(sizeof(float))));
    if (memory == nullptr) {
      out_of_memory = true;
      return nullptr;
    }
    float* to = memory + turned + scores;
    *q = HeadQueries{};
    q->queries = to;
    q->tokens = tile.tokens;
    q->heads = group();
    q->head_dim = a.head_dim;
    q->window = a.window;
    q->turned = memory;
    q->scores = memory + turned;
    for (int64_t t = tile.first; t < tile.first + tile.tokens; ++t) {
      const float* from =
          a.query + (tile.batch_row * a.tokens + t) * a.query_stride + tile.kv_head * group() * a.head_dim;
      for (int64_t h = 0; h < group(); ++h, to += a.head_dim)
        rotate(a, a.rotation(tile.batch_row, t), from + h * a.head_dim, a.scale, to);
    }
    return to;
  }

  void attend_part(const Tile& tile, int64_t index, HeadQueries q, const Part& to) const {
    const int64_t first_key = index * kPartKeys, first_place = a.past(tile.batch_row) + tile.first;
    const int64_t from = ((tile.batch_row * a.kv_heads + tile.kv_head) * a.capacity + first_key) * a.head_dim;
    const int64_t left = first_place + tile.tokens - first_key;
    q.past = first_place - first_key;
    q.keys = a.present_key + from;
    q.values = a.present_value + from;
    q.count = left < kPartKeys ? left : kPartKeys;
    q.readable = a.capacity - first_key;
    q.output = to.output;
    q.largest = to.largest;
    q.sums = to.sums;
    if (tiles == 1 && !fetched) {
      const int64_t first = q.start(0) * a.head_dim, floats = q.end(tile.tokens - 1) * a.head_dim - first;
      const int64_t part = floats / (kStreams * kLine) * kLine;
      fetch(q.keys + first, q.values + first, kStreams, part, part);
    }
    row.attend(q);
  }

  /// Divides what a tile has come to by its sums.
  void finish(const Tile& tile, const Part& whole) const {
    for (int64_t i = 0; i < tile.tokens * group(); ++i) {
      const int64_t token = tile.batch_row * a.tokens + tile.first + i / group();
      const float* from = whole.output + i * a.head_dim;
      float* to = a.output + (token * a.heads + tile.kv_head * group() + i % group()) * a.head_dim;
      const float inverse = 1.0f / whole.sums[i];
      for (int64_t d = 0; d < a.head_dim; ++d) to[d] = from[d] * inverse;
    }
  }

  void attend_tile(const Tile& tile) {
    HeadQueries q;
    float* memory = open(tile, &q);
    if (memory == nullptr) return;
    const int64_t queries = tile.tokens * group();
    const Part whole = Part::in(memory, queries, a.head_dim);
    const Part more = Part::in(memory + Part::floats(queries, a.head_dim), queries, a.head_dim);
    attend_part(tile, 0, q, whole);
    for (int64_t index = 1; index < parts(tile); ++index) {
      attend_part(tile, index, q, more);
      whole.merge(more, queries, a.head_dim);
    }
    finish(tile, whole);
  }

  void attend_shared_part(int64_t head, int64_t index) {
    HeadQueries q;
    if (index < parts(tile(head, 0)) && open(tile(head, 0), &q) != nullptr)
      attend_part(tile(head, 0), index, q, shared_part(head, index));
  }

  void merge_shared_parts(int64_t head) const {
    for (int64_t index = 1; index < parts(tile(head, 0)); ++index)
      shared_part(head, 0).merge(shared_part(head, index), a.tokens * group(), a.head_dim);
    finish(tile(head, 0), shared_part(head, 0));
  }
};

void store_task(void* job, size_t head) { static_cast<const Job*>(job)->store_keys(static_cast<int64_t>(head)); }

/// The last tiles see most keys: they come first, so that no thread is left alone with one.
void tile_task(void* argument, size_t index) {
  Job& job = *static_cast<Job*>(argument);
  const int64_t task = static_cast<int64_t>(index), head = task % job.heads();
  if (job.tiles == 1) job.store_keys(head);
  job.attend_tile(job.tile(head, job.tiles - 1 - task / job.heads()));
}

void part_task(void* argument, size_t index) {
  Job& job = *static_cast<Job*>(argument);
  job.attend_shared_part(static_cast<int64_t>(index) % job.heads(), static_cast<int64_t>(index) / job.heads());
}

void merge_task(void* job, size_t head) { static_cast<const Job*>(job)->merge_shared_parts(static_cast<int64_t>(head)); }

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
    for (int64_t t = 0; t < a.tokens; ++t) {
      const int64_t rotation = a.rotation(row, t);
      if (rotation < 0 || rotation >= a.rotary_rows)
        return wrong("position " + std::to_string(rotation) + of_row(row) + " has no row in a cache of " +
                     std::to_string(a.rotary_rows) + " rotations");
    }
  }
  return true;
}

bool attend(const KernelRow& row, const Attention& a, const Parallel& parallel) noexcept {
  if (a.batch <= 0 || a.tokens <= 0) return true;
  const int64_t group = a.heads / a.kv_heads;
  const int64_t tile_tokens = kTaskQueries / group > 1 ? kTaskQueries / group : 1;
  int64_t most = 0;
  for (int64_t b = 0; b < a.batch; ++b) most = a.past(b) + a.tokens > most ? a.past(b) + a.tokens : most;
  Job job{row, a, tile_tokens, (a.tokens + tile_tokens - 1) / tile_tokens, (most + kPartKeys - 1) / kPartKeys, nullptr};
  const Parallel here{run_here, nullptr};
  const bool few = multiply_adds(a) <= kFewMultiplyAdds;
  const Parallel& threads = few ? here : parallel;
  if (few && job.tiles == 1 && a.present_key == a.past_key) {
    fetch(a.present_key, a.present_value, job.heads(), a.capacity * a.head_dim, most * a.head_dim);
    job.fetched = true;
  }
  const size_t heads = static_cast<size_t>(job.heads()), parts = static_cast<size_t>(job.most_parts);
  const bool share_parts = job.tiles == 1 && parts > 1 && job.heads() < kFewTasks;
  if (job.tiles > 1 || share_parts) threads.each(heads, store_task, &job);
  if (!share_parts) {
    threads.each(heads * static_cast<size_t>(job.tiles), tile_task, &job);
  } else {
    const int64_t floats = job.heads() * job.most_parts * Part::floats(a.tokens * group, a.head_dim);
    job.shared_parts = static_cast<float*>(parts_scratch.reserve(floats * static_cast<int64_t>(sizeof(float))));
    if (job.shared_parts == nullptr) return false;
    threads.each(heads * parts, part_task, &job);
    if (!job.out_of_memory) threads.each(heads, merge_task, &job);
  }
  return !job.out_of_memory;
}

}  // namespace losa
