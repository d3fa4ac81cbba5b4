// Cuts products into tasks and runs them on the caller's threads.
#pragma once
#include "losa/kernel_table.h"
#include "losa/norm.h"
#include "losa/parallel.h"
#include "losa/scratch.h"
#include "losa/stages.h"

namespace losa {

/// What a thread that calls a product keeps for the next one.
struct ProductMemory {
  Scratch normed, rounded, packed;
};

/// One product of at most kPrefillTokens tokens, as stages: first `reserve`, then `add_to`; it must live until they have
/// run. All tasks only read it.
class Product {
 public:
  /// As multiply() takes them. Nothing is read before the first stage begins.
  Product(const KernelRow& row, const Weight& w, const float* x, int64_t tokens, float* y, const SkipNorm& norm);
  /// Memory for normed, rounded and packed activations, of one product at a time; false if there is none.
  bool reserve(ProductMemory* memory);
  void add_to(Stages* stages);

 private:
  /// What is multiplied.
  const float* activations() const { return norm_.present() ? normed_ : x_; }
  /// Whether prepare() has anything to do.
  bool prepares() const { return norm_.present() || is_integer(w_.type); }
  bool arranges() const { return !prefill_ && is_integer(w_.type) && row_.integers(w_.type).arrange != nullptr; }
  /// Adds and norms some tokens, and rounds and arranges them, as far as the operator and the kernels ask for it.
  void prepare(int64_t first, int64_t count) const;
  void pack(size_t tile) const;
  void run_task(size_t task) const;
  void product(const Weight& weight, BlockRange range, float* to) const;
  /// A few pairs of blocks at a time, whose products are still in the cache when they are combined.
  void gated_product(BlockRange range) const;

  const KernelRow& row_;
  const Weight& w_;
  const float* x_;
  int64_t tokens_;
  float* y_;
  SkipNorm norm_;
  bool prefill_;
  int64_t blocks_per_task_;
  float* normed_ = nullptr;   // [tokens, columns]: the norm's result, in place of x
  RoundedTokens rounded_{};   // of integer weights
  PackedTokens packed_{};     // of prefill
};

/// y (tokens, outputs) = x (tokens, columns) W^T with the kernels of `row`; for a gated weight y is
/// silu(x Wgate^T) times x Wup^T, element by element. With a norm (one that has a gamma) its result is
/// multiplied in place of x (norm.h), done once for each token.
/// Returns false if memory for the normed, rounded or packed activations ran out; y and sums are then unspecified.
bool multiply(const KernelRow& row, const Weight& w, const float* x, int64_t tokens, float* y,
              const Parallel& parallel, const SkipNorm& norm = {}) noexcept;

/// The same twice: y = multiply(down, multiply(gate_up, x)), where down has as many columns as gate_up has outputs.
bool mlp(const KernelRow& row, const Weight& gate_up, const Weight& down, const float* x, int64_t tokens, float* y,
         const Parallel& parallel, const SkipNorm& norm) noexcept;

/// y (count, columns) = the rows of the dense weight `w` that `ids` name, as float32. Returns the index of the first
/// id that is no row of `w`, or -1.
int64_t gather_rows(const Weight& w, const int64_t* ids, int64_t count, float* y) noexcept;

}  // namespace losa
