// Cuts attention into tasks. Compiled without fused multiply-adds (CMakeLists.txt), so that rotation gives the same bits
// on every processor.
#include "losa/attention.h"

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

/// Some tokens of a row, for the heads that share one of keys.
struct AttentionStages::Tile {
  int64_t batch_row, kv_head, first, tokens;
};

/// What a part of the keys comes to for some queries: the results of HeadQueries.
struct AttentionStages::Part {
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

AttentionStages::AttentionStages(const KernelRow& row, const Attention& a) : row_(row), a_(a) {
  tile_tokens_ = kTaskQueries / group() > 1 ? kTaskQueries / group() : 1;
  tiles_ = (a.tokens + tile_tokens_ - 1) / tile_tokens_;
  for (int64_t b = 0; b < a.batch; ++b)
    most_keys_ = a.past(b) + a.tokens > most_keys_ ? a.past(b) + a.tokens : most_keys_;
  most_parts_ = (most_keys_ + kPartKeys - 1) / kPartKeys;
  shares_parts_ = tiles_ == 1 && most_parts_ > 1 && heads() < kFewTasks;
}

bool AttentionStages::reserve() {
  if (!shares_parts_) return true;
  const int64_t floats = heads() * most_parts_ * Part::floats(a_.tokens * group(), a_.head_dim);
  shared_parts_ = static_cast<float*>(parts_scratch.reserve(floats * static_cast<int64_t>(sizeof(float))));
  return shared_parts_ != nullptr;
}

void AttentionStages::add_to(Stages* stages, bool alone) {
  const size_t all = static_cast<size_t>(heads());
  if (alone && !shares_parts_ && multiply_adds(a_) <= kFewMultiplyAdds) {
    return stages->add(1, [](void* self, size_t) { static_cast<AttentionStages*>(self)->attend_all(); }, this);
  }
  const auto store = [](void* self, size_t head) {
    static_cast<const AttentionStages*>(self)->store_keys(static_cast<int64_t>(head));
  };
  if (tiles_ > 1 || shares_parts_) stages->add(all, store, this);
  if (!shares_parts_) {
    const auto attend = [](void* argument, size_t index) {
      AttentionStages& self = *static_cast<AttentionStages*>(argument);
      const int64_t task = static_cast<int64_t>(index), head = task % self.heads();
      if (self.tiles_ == 1) self.store_keys(head);
      // The last tiles see most keys: they come first.
      self.attend_tile(self.tile(head, self.tiles_ - 1 - task / self.heads()), false);
    };
    return stages->add(all * static_cast<size_t>(tiles_), attend, this);
  }
  const auto attend_part = [](void* argument, size_t index) {
    AttentionStages& self = *static_cast<AttentionStages*>(argument);
    self.attend_shared_part(static_cast<int64_t>(index) % self.heads(), static_cast<int64_t>(index) / self.heads());
  };
  const auto merge = [](void* self, size_t head) {
    static_cast<const AttentionStages*>(self)->merge_shared_parts(static_cast<int64_t>(head));
  };
  stages->add(all * static_cast<size_t>(most_parts_), attend_part, this);
  stages->add(all, merge, this);
}

AttentionStages::Tile AttentionStages::tile(int64_t head, int64_t index) const {
  const int64_t first = index * tile_tokens_, left = a_.tokens - first;
  return {head / a_.kv_heads, head % a_.kv_heads, first, left < tile_tokens_ ? left : tile_tokens_};
}

int64_t AttentionStages::parts(const Tile& tile) const {
  return (a_.past(tile.batch_row) + tile.first + tile.tokens + kPartKeys - 1) / kPartKeys;
}

AttentionStages::Part AttentionStages::shared_part(int64_t head, int64_t index) const {
  const int64_t queries = a_.tokens * group();
  return Part::in(shared_parts_ + (head * most_parts_ + index) * Part::floats(queries, a_.head_dim), queries,
                  a_.head_dim);
}

/// Keys and values of one head of one row: the past if it lies elsewhere, and the new ones.
void AttentionStages::store_keys(int64_t head) const {
  const int64_t batch_row = head / a_.kv_heads, kv_head = head % a_.kv_heads, past = a_.past(batch_row);
  float* keys = a_.present_key + head * a_.capacity * a_.head_dim;
  float* values = a_.present_value + head * a_.capacity * a_.head_dim;
  const size_t past_bytes = static_cast<size_t>(past * a_.head_dim) * sizeof(float);
  if (a_.present_key != a_.past_key && past_bytes != 0) {
    __builtin_memcpy(keys, a_.past_key + head * a_.past_capacity * a_.head_dim, past_bytes);
    __builtin_memcpy(values, a_.past_value + head * a_.past_capacity * a_.head_dim, past_bytes);
  }
  for (int64_t t = 0; t < a_.tokens; ++t) {
    const int64_t from = (batch_row * a_.tokens + t) * a_.key_stride + kv_head * a_.head_dim;
    rotate(a_, a_.rotation(batch_row, t), a_.key + from, 1.0f, keys + (past + t) * a_.head_dim);
    __builtin_memcpy(values + (past + t) * a_.head_dim, a_.value + from,
                     static_cast<size_t>(a_.head_dim) * sizeof(float));
  }
}

/// The queries of a tile, and memory of the calling thread for them and two parts; null if there is none.
float* AttentionStages::open(const Tile& tile, HeadQueries* q) {
  const int64_t queries = tile.tokens * group();
  const int64_t turned = a_.head_dim * kKeyTile, scores = queries * kPartKeys, rotated = queries * a_.head_dim;
  const int64_t floats = turned + scores + rotated + 2 * Part::floats(queries, a_.head_dim);
  float* memory = static_cast<float*>(attention_scratch.reserve(floats * static_cast<int64_t>(sizeof(float))));
  if (memory == nullptr) {
    out_of_memory_ = true;
    return nullptr;
  }
  float* to = memory + turned + scores;
  *q = HeadQueries{};
  q->queries = to;
  q->tokens = tile.tokens;
  q->heads = group();
  q->head_dim = a_.head_dim;
  q->window = a_.window;
  q->turned = memory;
  q->scores = memory + turned;
  for (int64_t t = tile.first; t < tile.first + tile.tokens; ++t) {
    const float* from =
        a_.query + (tile.batch_row * a_.tokens + t) * a_.query_stride + tile.kv_head * group() * a_.head_dim;
    for (int64_t h = 0; h < group(); ++h, to += a_.head_dim)
      rotate(a_, a_.rotation(tile.batch_row, t), from + h * a_.head_dim, a_.scale, to);
  }
  return to;
}

void AttentionStages::attend_part(const Tile& tile, int64_t index, HeadQueries q, const Part& to,
                                  bool fetched) const {
  const int64_t first_key = index * kPartKeys, first_place = a_.past(tile.batch_row) + tile.first;
  const int64_t from = ((tile.batch_row * a_.kv_heads + tile.kv_head) * a_.capacity + first_key) * a_.head_dim;
  const int64_t left = first_place + tile.tokens - first_key;
  q.past = first_place - first_key;
  q.keys = a_.present_key + from;
  q.values = a_.present_value + from;
  q.count = left < kPartKeys ? left : kPartKeys;
  q.readable = a_.capacity - first_key;
  q.output = to.output;
  q.largest = to.largest;
  q.sums = to.sums;
  if (tiles_ == 1 && !fetched) {
    const int64_t first = q.start(0) * a_.head_dim, floats = q.end(tile.tokens - 1) * a_.head_dim - first;
    const int64_t part = floats / (kStreams * kLine) * kLine;
    fetch(q.keys + first, q.values + first, kStreams, part, part);
  }
  row_.attend(q);
}

/// Divides what a tile has come to by its sums.
void AttentionStages::finish(const Tile& tile, const Part& whole) const {
  for (int64_t i = 0; i < tile.tokens * group(); ++i) {
    const int64_t token = tile.batch_row * a_.tokens + tile.first + i / group();
    const float* from = whole.output + i * a_.head_dim;
    float* to = a_.output + (token * a_.heads + tile.kv_head * group() + i % group()) * a_.head_dim;
    const float inverse = 1.0f / whole.sums[i];
    for (int64_t d = 0; d < a_.head_dim; ++d) to[d] = from[d] * inverse;
  }
}

void AttentionStages::attend_tile(const Tile& tile, bool fetched) {
  HeadQueries q;
  float* memory = open(tile, &q);
  if (memory == nullptr) return;
  const int64_t queries = tile.tokens * group();
  const Part whole = Part::in(memory, queries, a_.head_dim);
  const Part more = Part::in(memory + Part::floats(queries, a_.head_dim), queries, a_.head_dim);
  attend_part(tile, 0, q, whole, fetched);
  for (int64_t index = 1; index < parts(tile); ++index) {
    attend_part(tile, index, q, more, fetched);
    whole.merge(more, queries, a_.head_dim);
  }
  finish(tile, whole);
}

void AttentionStages::attend_shared_part(int64_t head, int64_t index) {
  HeadQueries q;
  if (index < parts(tile(head, 0)) && open(tile(head, 0), &q) != nullptr)
    attend_part(tile(head, 0), index, q, shared_part(head, index), false);
}

void AttentionStages::merge_shared_parts(int64_t head) const {
  if (out_of_memory_) return;
  for (int64_t index = 1; index < parts(tile(head, 0)); ++index)
    shared_part(head, 0).merge(shared_part(head, index), a_.tokens * group(), a_.head_dim);
  finish(tile(head, 0), shared_part(head, 0));
}

/// All heads of few tokens, by one thread.
void AttentionStages::attend_all() {
  const bool fetched = tiles_ == 1 && a_.present_key == a_.past_key;
  if (fetched) fetch(a_.present_key, a_.present_value, heads(), a_.capacity * a_.head_dim, most_keys_ * a_.head_dim);
  if (tiles_ > 1)
    for (int64_t head = 0; head < heads(); ++head) store_keys(head);
  for (int64_t index = 0; index < tiles_; ++index)
    for (int64_t head = 0; head < heads(); ++head) {
      if (tiles_ == 1) store_keys(head);
      attend_tile(tile(head, index), fetched);
    }
}

bool attend(const KernelRow& row, const Attention& a, const Parallel& parallel) noexcept {
  if (a.batch <= 0 || a.tokens <= 0) return true;
  AttentionStages attention(row, a);
  if (!attention.reserve()) return false;
  Stages stages;
  attention.add_to(&stages, true);
  stages.run(parallel);
  return attention.had_memory();
}

}  // namespace losa
