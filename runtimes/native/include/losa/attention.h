// Grouped-query attention of new tokens over a cache of keys and values, which they join: what ONNX Runtime's
// com.microsoft.GroupQueryAttention computes, for float32. Sources: Vaswani et al. 2017, "Attention Is All You Need",
// arXiv:1706.03762; Ainslie et al. 2023, "GQA", arXiv:2305.13245; Su et al. 2021, "RoFormer", arXiv:2104.09864.
//
// Token t of a row, at place p = past + t, sees the keys of places max(0, p + 1 - window) to p. For each of its heads q,
// with the head of keys k and values v that it shares with its neighbours,
//
//   s[j] = scale * (q . k[j])        y = sum of e^s[j] v[j] / sum of e^s[j]
//
// A token's result does not depend on what it shares a call with, to the bit: neither on other rows, nor on how many
// tokens its row gets at once, nor on threads.
#pragma once
#include <atomic>
#include <cstdint>
#include <string>

#include "losa/kernel_table.h"
#include "losa/parallel.h"
#include "losa/stages.h"

namespace losa {

/// Arrays are dense where no stride is named. The heads of a token lie together.
struct Attention {
  int64_t batch, tokens;                  // rows, and new tokens of each
  int64_t heads, kv_heads, head_dim;      // kv_heads divides heads
  int64_t past_capacity, capacity;        // tokens that a row of the past, and of the present, has room for
  int64_t window;                         // tokens that one sees at most, itself included
  float scale;
  int32_t first_prompt;                   // not 0: no row has a past, and places count from 0
  const float* query;                     // [batch, tokens, heads, head_dim]
  const float* key;                       // [batch, tokens, kv_heads, head_dim]
  const float* value;                     // as key
  int64_t query_stride, key_stride;       // floats from a token to the next
  const float* past_key;                  // [batch, kv_heads, past_capacity, head_dim]
  const float* past_value;
  float* present_key;                     // [batch, kv_heads, capacity, head_dim]; may be the past itself
  float* present_value;
  const int32_t* last;                    // [batch]: place of each row's last token
  const float* cosines;                   // [rotary_rows, rotary_half]; null: nothing is rotated
  const float* sines;
  int64_t rotary_rows, rotary_half;
  const int64_t* positions;               // [batch, tokens]: rows of cosines; null: the places
  float* output;                          // [batch, tokens, heads, head_dim]

  /// Tokens that row `row` has before the new ones.
  int64_t past(int64_t row) const { return first_prompt ? 0 : static_cast<int64_t>(last[row]) + 1 - tokens; }
  /// Which row of cosines rotates a token.
  int64_t rotation(int64_t row, int64_t token) const {
    if (cosines == nullptr) return 0;
    return first_prompt || positions == nullptr ? past(row) + token : positions[row * tokens + token];
  }
};

/// What `attend` relies on, but for the sizes of arrays. False: `error` says what is wrong.
bool check(const Attention& attention, std::string* error);

/// Attention as stages: they write keys and values of the new tokens into the present, and their output. Where the present
/// is not the past's own memory, the past is copied first. This and what it was made of must live until they have run;
/// nothing that `attention` points to is read before, but `last` and `positions`.
class AttentionStages {
 public:
  AttentionStages(const KernelRow& row, const Attention& attention);
  /// False: there is no memory.
  bool reserve();
  /// `alone`: they are all that the threads would be called for, which so little work as one token's may not be worth.
  void add_to(Stages* stages, bool alone);
  /// Whether memory sufficed while they ran; results are unspecified otherwise.
  bool had_memory() const { return !out_of_memory_; }

 private:
  struct Tile;
  struct Part;

  int64_t heads() const { return a_.batch * a_.kv_heads; }
  int64_t group() const { return a_.heads / a_.kv_heads; }
  Tile tile(int64_t head, int64_t index) const;
  int64_t parts(const Tile& tile) const;
  Part shared_part(int64_t head, int64_t index) const;

  void store_keys(int64_t head) const;
  float* open(const Tile& tile, HeadQueries* q);
  void attend_part(const Tile& tile, int64_t index, HeadQueries q, const Part& to, bool fetched) const;
  void attend_tile(const Tile& tile, bool fetched);
  void attend_all();
  void attend_shared_part(int64_t head, int64_t index);
  void merge_shared_parts(int64_t head) const;
  void finish(const Tile& tile, const Part& whole) const;

  const KernelRow& row_;
  const Attention& a_;
  int64_t tile_tokens_, tiles_;
  int64_t most_keys_ = 0, most_parts_;  // of any row
  bool shares_parts_;                   // parts of the keys are tasks of their own
  float* shared_parts_ = nullptr;       // [head][part]
  std::atomic<bool> out_of_memory_{false};
};

/// All stages of attention at once. Returns false if memory ran out; results are then unspecified.
bool attend(const KernelRow& row, const Attention& attention, const Parallel& parallel) noexcept;

}  // namespace losa
