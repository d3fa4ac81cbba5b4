#include "losa/validate.h"

#include <cstring>

namespace losa {
namespace {

// No weight is wider; the bound keeps every product below within int64.
constexpr int64_t kMaxSide = int64_t{1} << 30;

bool fail(std::string* error, const std::string& message) {
  *error = message;
  return false;
}

std::string number(int64_t value) { return std::to_string(value); }

int64_t kept_in(const uint8_t* mask, int64_t bytes) {
  int64_t kept = 0;
  int64_t i = 0;
  for (; i + 8 <= bytes; i += 8) {
    uint64_t word;
    std::memcpy(&word, mask + i, sizeof word);
    kept += __builtin_popcountll(word);
  }
  for (; i < bytes; ++i) kept += __builtin_popcount(mask[i]);
  return kept;
}

}  // namespace

bool validate(const SparseFp32Parts& parts, SparseFp32* weight, std::string* error) {
  if (parts.layout != kLayoutN16)
    return fail(error,
                "layout is " + number(parts.layout) + ", this library reads layout 1; export the model again");
  if (parts.rows <= 0 || parts.columns <= 0 || parts.rows > kMaxSide || parts.columns > kMaxSide)
    return fail(error, "N = " + number(parts.rows) + " and K = " + number(parts.columns) +
                           " are not the sides of a weight");
  const int64_t matrices = parts.gated ? 2 : 1;  // their blocks alternate
  const int64_t blocks_of_each = (parts.rows + kBlockRows - 1) / kBlockRows;
  const int64_t blocks = matrices * blocks_of_each;
  if (parts.mask_bytes != static_cast<uint64_t>(blocks) * parts.columns * 2)
    return fail(error, "mask has " + number(parts.mask_bytes) + " bytes, N = " + number(parts.rows) +
                           " and K = " + number(parts.columns) + " need " + number(blocks * parts.columns * 2));
  if (parts.offset_count != static_cast<uint64_t>(blocks) + 1)
    return fail(error, "block_offsets has " + number(parts.offset_count) + " entries, " + number(blocks) +
                           " blocks need " + number(blocks + 1));
  if (parts.masks == nullptr || parts.values == nullptr || parts.block_offsets == nullptr)
    return fail(error, "mask, values or block_offsets has no data");
  const int64_t stored_rows = parts.gated ? blocks * kBlockRows : parts.rows;
  const SparseFp32 candidate{stored_rows,  parts.columns,       parts.masks,
                             parts.values, parts.block_offsets, parts.rows};
  if (candidate.offset(0) != 0)
    return fail(error, "block_offsets starts at " + number(candidate.offset(0)) + ", not at 0");

  int64_t expected = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    expected += kept_in(candidate.block_masks(block), parts.columns * 2);
    const int64_t stored = candidate.offset(block + 1);
    if (stored != expected)
      return fail(error, "block_offsets[" + number(block + 1) + "] is " + number(stored) +
                             ", the mask of the blocks before it keeps " + number(expected) + " values");
  }
  if (parts.value_count < static_cast<uint64_t>(expected) + kValuePadding)
    return fail(error, "values has " + number(parts.value_count) + " entries, the mask keeps " +
                           number(expected) + " and " + number(kValuePadding) + " of padding must follow");
  const int64_t rows_in_last = parts.rows - (blocks_of_each - 1) * kBlockRows;
  const unsigned absent = 0xffffu << rows_in_last & 0xffffu;
  const uint8_t* last = candidate.block_masks(blocks - matrices);  // of each matrix, one after the other
  for (int64_t k = 0; absent != 0 && k < matrices * parts.columns; ++k) {
    if ((last[2 * k] | last[2 * k + 1] << 8) & absent)
      return fail(error, "mask keeps a weight of column " + number(k % parts.columns) +
                             " in a row beyond N = " + number(parts.rows));
  }
  *weight = candidate;
  return true;
}

}  // namespace losa
