// Cuts one product into tasks and runs them on the caller's threads.
#pragma once
#include "losa/kernel_table.h"
#include "losa/norm.h"
#include "losa/parallel.h"

namespace losa {

/// y (tokens, outputs) = x (tokens, columns) W^T with the kernels of `row`; for a gated weight y is
/// silu(x Wgate^T) times x Wup^T, element by element. With a norm (one that has a gamma) its result is
/// multiplied in place of x (norm.h), done once for each token.
/// Returns false if memory for the normed, rounded or packed activations ran out; y and sums are then unspecified.
bool multiply(const KernelRow& row, const Weight& w, const float* x, int64_t tokens, float* y,
              const Parallel& parallel, const SkipNorm& norm = {}) noexcept;

/// y (count, columns) = the rows of the dense weight `w` that `ids` name, as float32. Returns the index of the first
/// id that is no row of `w`, or -1.
int64_t gather_rows(const Weight& w, const int64_t* ids, int64_t count, float* y) noexcept;

}  // namespace losa
