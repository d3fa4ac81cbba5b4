// Is a weight what its header says? Everything the kernels rely on is checked here, once.
#pragma once
#include <cstddef>
#include <string>

#include "losa/weight.h"

namespace losa {

/// One part of a weight as it came from a file, not trusted.
struct Bytes {
  const void* data;
  size_t size;  // in bytes
};

/// The parts of a weight, none of them trusted. Also the C interface's view of one (c_api.cpp, native.py).
struct WeightParts {
  int32_t type;   // a ValueType
  int32_t gated;  // 0 or 1
  int32_t dense;  // 0 or 1: without masks and block_offsets
  int32_t reserved;
  int64_t rows, columns, layout;  // `rows` is N: of a gated weight, those of one of its two matrices
  int64_t group, activation_bits;  // of int8 and int4
  Bytes masks, values, block_offsets, scales, codebook;
};

/// Fills `weight` and returns true, or returns false with the first contradiction in `error`.
bool validate(const WeightParts& parts, Weight* weight, std::string* error);

}  // namespace losa
