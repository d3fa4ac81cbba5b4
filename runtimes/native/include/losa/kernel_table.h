// One row per instruction set. To add an instruction set: write src/<name>.cpp with its row, add the row
// to the ordered table in src/dispatch.cpp, and its compile flags to CMakeLists.txt.
#pragma once
#include <string>

#include "losa/activations.h"
#include "losa/head_queries.h"
#include "losa/weight.h"

namespace losa {

/// Products with float32 activations: y[m, n] = sum over k of x[m, k] W[n, k], for every token m and the
/// rows n of `blocks`. x (tokens, columns) and y (tokens, rows) are dense and row-major. Sums run in the
/// order of k with a fixed number of partial sums, so a result depends on neither threads nor the cut into
/// tasks.
struct FloatKernels {
  void (*decode)(const Weight& w, BlockRange blocks, const float* x, int64_t tokens, float* y);
  /// The same for many tokens, from packed activations (token_tiles.h). Null: decode serves any count.
  void (*prefill)(const Weight& w, BlockRange blocks, const float* packed, int64_t tokens, float* y);
  /// Writes tile `tile` into `packed`.
  void (*pack)(const float* x, int64_t tokens, int64_t columns, int64_t tile, float* packed);
  /// Fewest tokens for which packing pays.
  int64_t prefill_min_tokens;
};

/// The same with rounded activations (activations.h), for which every row gives the same bits.
struct IntegerKernels {
  void (*decode)(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y);
  /// Null: decode serves any count.
  void (*prefill)(const Weight& w, BlockRange blocks, const PackedTokens& packed, int64_t tokens, float* y);
  void (*pack)(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t tile, const PackedTokens& packed);
  int64_t prefill_min_tokens;
  /// Writes x.arranged of token `token` of the `tokens` that decode will be given. What lies there is the row's own
  /// affair. Null: decode takes the values as they are.
  void (*arrange)(const Weight& w, const RoundedTokens& x, int64_t tokens, int64_t token) = nullptr;
};

/// What an instruction set has. A part left out (null) comes from the next row of the table that runs on
/// the same CPU; scalar has them all.
struct KernelRow {
  const char* name;
  bool (*supported)();

  FloatKernels fp32, bf16;
  IntegerKernels int8, int4;
  /// Rounds tokens of x (tokens, columns) to `bits`.
  void (*round)(const float* x, int64_t tokens, int64_t bits, const RoundedTokens& rounded);

  /// y[m, 16 i + r] = silu(z[m, 32 i + r]) z[m, 32 i + 16 + r] for every token m, r < 16 and
  /// 16 i + r < outputs, where silu(z) = z / (1 + e^-z). z is dense, of whole pairs of blocks; y's tokens lie
  /// `stride` apart.
  void (*gate)(const float* z, int64_t tokens, int64_t outputs, float* y, int64_t stride);
  /// Attention to one head of keys (attention.h).
  void (*attend)(const HeadQueries& queries);

  LOSA_INLINE const FloatKernels& floats(ValueType type) const { return type == ValueType::kBf16 ? bf16 : fp32; }
  LOSA_INLINE const IntegerKernels& integers(ValueType type) const {
    return type == ValueType::kInt4 ? int4 : int8;
  }
};

extern const KernelRow kScalarRow;
#ifdef LOSA_X86
extern const KernelRow kAvx2Row;
extern const KernelRow kAvx512Row;
extern const KernelRow kAvx512VnniRow;
#endif
#ifdef LOSA_ARM
extern const KernelRow kNeonRow;
extern const KernelRow kNeonDotprodRow;
extern const KernelRow kNeonI8mmRow;
#endif

struct KernelTable {
  const KernelRow* rows;  // best first; the last one is scalar, which always runs
  size_t count;
};

/// All rows of this build, whether the CPU runs them or not; nothing in them is null.
KernelTable kernel_table();

/// The row called `name`, or the best one this CPU runs if `name` is null or empty.
/// On failure returns null and says in `error` what is wrong.
const KernelRow* select_row(const char* name, std::string* error);

/// select_row of the environment variable LOSA_KERNEL, read at each call.
const KernelRow* select_row_from_environment(std::string* error);

}  // namespace losa
