// What the parts of the harness share.
#pragma once
#include <string>
#include <vector>

#include "example.h"
#include "losa/matmul.h"

namespace test {

using Rows = std::vector<const losa::KernelRow*>;

/// Counts a failure and prints the first ones.
void fail(const std::string& message);

/// Runs tasks one after the other, the last first: their order must not matter.
extern const losa::Parallel kSerial;
extern const losa::Parallel kTwoThreads;

/// y of `multiply`, in memory of exactly its size that starts as NaN. x too is copied to memory of its size.
std::vector<float> product(const losa::KernelRow& row, const losa::Weight& w, const std::vector<float>& x,
                           int64_t tokens, const losa::Parallel& parallel = kSerial);

/// Equal bits, but for NaN, which is as good as any other NaN.
bool same_floats(const std::vector<float>& a, const std::vector<float>& b);

std::string describe(const Example& e);

/// Every row of `rows` over sound weights: scalar against double, the others against scalar. Of `parts` equal
/// parts of the work, does number `part`; quick: a smaller choice.
void check_products(const Rows& rows, bool quick, int64_t part, int64_t parts);
/// The same over rows so long that several tokens are prepared on several threads.
void check_wide_products(const Rows& rows);
void check_rounding(const Rows& rows);
void check_gathering();
void check_norms(const Rows& rows);
void check_attention(const Rows& rows);
void check_chains(const Rows& rows);

/// Each part of each kind of weight, cut to every length.
void check_sizes();

/// Cases [first, first + count) of broken weights: refused with a reason, or run by every row with the result
/// that the weight's own numbers give. A case depends on `seed` and its number alone.
void fuzz(const Rows& rows, uint64_t seed, int64_t first, int64_t count);

}  // namespace test
