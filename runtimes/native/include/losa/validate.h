// Is a compressed weight what its header says? Everything the kernels rely on is checked here, once.
#pragma once
#include <cstddef>
#include <string>

#include "losa/sparse_fp32.h"

namespace losa {

/// The parts as they came from a file, none of them trusted.
struct SparseFp32Parts {
  int64_t rows, columns, layout;  // `rows` is N: of a gated weight, those of one of its two matrices
  bool gated;
  const uint8_t* masks;
  size_t mask_bytes;
  const float* values;
  size_t value_count;
  const int64_t* block_offsets;
  size_t offset_count;
};

/// Fills `weight` and returns true, or returns false with the first contradiction in `error`.
bool validate(const SparseFp32Parts& parts, SparseFp32* weight, std::string* error);

}  // namespace losa
