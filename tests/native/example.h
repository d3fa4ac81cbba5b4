// Random weights of every type and kind, packed by docs/format.md; what a container stands for; and the exact
// result of a product. Nothing here uses the kernels' own code but for the struct that they read.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "losa/validate.h"

namespace test {

using losa::ValueType;

/// SplitMix64: the same numbers with every compiler, from any seed.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t next() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
  }
  /// 0 .. count - 1.
  int64_t below(int64_t count) { return static_cast<int64_t>(next() % static_cast<uint64_t>(count)); }
  int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
  bool one_in(int64_t count) { return below(count) == 0; }
  /// [0, 1).
  double unit() { return static_cast<double>(next() >> 11) * 0x1p-53; }
  template <class T, size_t N>
  T of(const T (&choices)[N]) {
    return choices[below(static_cast<int64_t>(N))];
  }

 private:
  uint64_t state_;
};

/// `bytes` on the heap, starting `shift` bytes behind an aligned address, with nothing behind the end.
class Buffer {
 public:
  Buffer(const void* from, size_t bytes, size_t shift) : memory_(new char[bytes + shift]), shift_(shift) {
    if (bytes != 0) std::memcpy(memory_.get() + shift, from, bytes);
  }
  char* data() const { return memory_.get() + shift_; }

 private:
  std::unique_ptr<char[]> memory_;
  size_t shift_;
};

float float_of_bits(uint32_t bits);
uint32_t bits_of_float(float value);

/// A matrix as the container's blocks hold it: of a gated weight, `rows` counts the rows of all blocks.
struct Matrix {
  int64_t rows = 0, columns = 0, groups = 1, group = 1;
  std::vector<double> levels;   // [rows, columns]: of integers before the scale, else values; 0 where not kept
  std::vector<uint8_t> kept;    // [rows, columns]
  std::vector<double> scales;   // [rows, groups] of integers

  double level(int64_t row, int64_t k) const { return levels[static_cast<size_t>(row * columns + k)]; }
};

enum class Kind { kSparse, kGated, kDense };

enum PartIndex { kMasks, kValues, kOffsets, kScales, kCodebook, kPartCount };
constexpr const char* kPartNames[kPartCount] = {"mask", "values", "block_offsets", "scales", "codebook"};

/// A weight in pieces, any of which a test may break.
struct Example {
  losa::WeightParts header{};  // its numbers; parts() adds the rest
  std::vector<uint8_t> bytes[kPartCount];
  bool absent[kPartCount] = {};  // a null pointer, whatever the size
  Matrix matrix;                 // what the pieces stand for

  ValueType type() const { return static_cast<ValueType>(header.type); }
};

/// Columns of a step.
int64_t width_of(ValueType type);
bool quantised(ValueType type);

/// A sound weight of `rows` (if gated, in each of its two matrices) and `columns`. Of a sparse one every sixth
/// block is all kept, every fourth is empty, and some rows are empty.
Example make_example(ValueType type, Kind kind, int64_t rows, int64_t columns, double density, int64_t group,
                     int64_t activation_bits, Random& random);

/// The pieces at addresses of their own, none of them aligned, each ending where its memory ends.
class Stored {
 public:
  explicit Stored(const Example& e);
  const losa::WeightParts& parts() const { return parts_; }

 private:
  losa::WeightParts parts_;
  std::vector<Buffer> buffers_;
};

/// What a validated weight stands for, read by docs/format.md.
Matrix read_matrix(const losa::Weight& w);

bool same(const std::vector<double>& a, const std::vector<double>& b);

/// What a product should be, and how far off it may be. Infinite tolerance: it is not finite, or so large that
/// its sums may overflow.
struct Expected {
  double value, tolerance;
};

/// One token, rounded as activations.h says.
struct RoundedToken {
  std::vector<double> levels;  // [columns]
  std::vector<double> scales;  // [groups], NaN where the group holds what is not finite

  RoundedToken(const float* x, int64_t columns, int64_t group, int64_t bits);
};

/// A stored row times one token in double; x of integers is rounded first.
class Reference {
 public:
  Reference(const Matrix& m, ValueType type, int64_t activation_bits) : m_(m), type_(type), bits_(activation_bits) {}

  /// Products of all stored rows.
  std::vector<Expected> products(const float* x) const;

 private:
  const Matrix& m_;
  ValueType type_;
  int64_t bits_;

  Expected float_product(int64_t row, const float* x) const;
  Expected integer_product(int64_t row, const RoundedToken& token) const;
};

/// silu(gate) * up from what the products may be.
Expected gated(const Expected& gate, const Expected& up);

}  // namespace test
