// Runs every kernel row over odd shapes, and every row that survives validation over broken weights.
//
// Built with sanitizers by tests/runtimes/test_native_sanitized.py. Each buffer is exactly as long as its
// contract says, and starts at an odd address where no alignment is promised, so that a read or write
// past an end is seen. The AVX-512 row is compiled over emulated instructions (emulated/immintrin.h).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "losa/matmul.h"
#include "losa/validate.h"

namespace {

using losa::KernelRow;

int failures = 0;

void fail(const std::string& message) {
  if (++failures <= 20) std::printf("FAIL %s\n", message.c_str());
}

/// `bytes` on the heap, starting `shift` bytes behind an aligned address, with nothing behind the end.
class Buffer {
 public:
  Buffer(const void* from, size_t bytes, size_t shift) : memory_(new char[bytes + shift]), shift_(shift) {
    if (bytes != 0) std::memcpy(memory_.get() + shift, from, bytes);
  }
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(memory_.get() + shift_);
  }

 private:
  std::unique_ptr<char[]> memory_;
  size_t shift_;
};

struct Example {
  int64_t rows, columns;  // if gated, those of each of its two matrices
  bool gated;
  std::vector<uint8_t> masks;
  std::vector<float> values;
  std::vector<int64_t> offsets;
  std::vector<float> dense;  // [rows of all blocks, columns]
};

Example make_weight(int64_t rows, int64_t columns, bool gated, double density, std::mt19937& random) {
  const int64_t matrices = gated ? 2 : 1;  // their blocks alternate
  const int64_t blocks = (rows + 15) / 16 * matrices;
  Example w{rows, columns, gated, {}, {}, {0}, std::vector<float>(blocks * 16 * columns)};
  w.masks.resize(blocks * columns * 2);
  std::uniform_real_distribution<double> unit(0, 1);
  for (int64_t block = 0; block < blocks; ++block) {
    // Every third block is all kept, every fourth all absent, and some rows are empty.
    const double keep = block % 3 == 1 ? 1.0 : block % 4 == 2 ? 0.0 : density;
    for (int64_t k = 0; k < columns; ++k) {
      for (int64_t r = 0; r < 16 && block / matrices * 16 + r < rows; ++r) {
        if (unit(random) >= keep || (r == 5 && keep < 1)) continue;
        const float value = static_cast<float>(unit(random) - 0.5);
        w.masks[(block * columns + k) * 2 + r / 8] |= static_cast<uint8_t>(1u << (r % 8));
        w.values.push_back(value);
        w.dense[(block * 16 + r) * columns + k] = value;
      }
    }
    w.offsets.push_back(static_cast<int64_t>(w.values.size()));
  }
  w.values.resize(w.values.size() + losa::kValuePadding / sizeof(float));
  return w;
}

void serial(void*, size_t count, void (*task)(void*, size_t), void* argument) {
  for (size_t i = count; i-- > 0;) task(argument, i);  // the order of tasks must not matter
}

void two_threads(void*, size_t count, void (*task)(void*, size_t), void* argument) {
  const auto work = [=](size_t start) {
    for (size_t i = start; i < count; i += 2) task(argument, i);
  };
  std::thread other(work, 1);
  work(0);
  other.join();
}

std::vector<float> product(const KernelRow& row, const losa::Weight& w, const std::vector<float>& x,
                           int64_t tokens, const losa::Parallel& parallel) {
  std::vector<float> y(tokens * w.outputs, std::numeric_limits<float>::quiet_NaN());
  y.shrink_to_fit();
  if (!losa::multiply(row, w, x.data(), tokens, y.data(), parallel)) fail("out of memory");
  return y;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

struct Expected {
  double value, tolerance;
};

/// A stored row times one token. Rounding of at most K additions, each to half a unit in the last place of
/// float (2^-24).
Expected dot(const float* row, const float* x, int64_t columns) {
  double sum = 0, magnitude = 0;
  for (int64_t k = 0; k < columns; ++k) {
    const double term = static_cast<double>(row[k]) * x[k];
    sum += term;
    magnitude += std::fabs(term);
  }
  return {sum, (static_cast<double>(columns) + 8) * 6e-8 * magnitude};
}

Expected expected(const Example& weight, int64_t n, const float* x) {
  const int64_t columns = weight.columns;
  if (!weight.gated) return dot(weight.dense.data() + n * columns, x, columns);
  const float* gate_row = weight.dense.data() + (n / 16 * 32 + n % 16) * columns;
  const Expected gate = dot(gate_row, x, columns), up = dot(gate_row + 16 * columns, x, columns);
  const double silu = gate.value / (1 + std::exp(-gate.value));
  // The slope of silu is at most 1.1; of itself it rounds four times and has an exponential within 2e-7.
  return {silu * up.value, 1.1 * gate.tolerance * (std::fabs(up.value) + up.tolerance) +
                               std::fabs(silu) * up.tolerance + 6e-7 * std::fabs(silu * up.value)};
}

void check_shape(const KernelRow& row, const Example& weight, int64_t tokens, std::mt19937& random) {
  const Buffer masks(weight.masks.data(), weight.masks.size(), 1);
  const Buffer values(weight.values.data(), weight.values.size() * sizeof(float), 3);
  const Buffer offsets(weight.offsets.data(), weight.offsets.size() * sizeof(int64_t), 5);
  losa::WeightParts parts{};
  parts.rows = weight.rows;
  parts.columns = weight.columns;
  parts.layout = losa::kLayoutN16;
  parts.gated = weight.gated;
  parts.masks = {masks.as<uint8_t>(), weight.masks.size()};
  parts.values = {values.as<float>(), weight.values.size() * sizeof(float)};
  parts.block_offsets = {offsets.as<int64_t>(), weight.offsets.size() * sizeof(int64_t)};
  losa::Weight w{};
  std::string error;
  if (!losa::validate(parts, &w, &error)) return fail("a sound weight is refused: " + error);

  std::uniform_real_distribution<float> unit(-1, 1);
  std::vector<float> x(tokens * weight.columns);
  for (float& value : x) value = unit(random);
  x.shrink_to_fit();
  const std::vector<float> y = product(row, w, x, tokens, {serial, nullptr});
  const std::string where = std::string(row.name) + (weight.gated ? " gated" : "") + " N=" + std::to_string(weight.rows) +
                            " K=" + std::to_string(weight.columns) + " M=" + std::to_string(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t n = 0; n < weight.rows; ++n) {
      const Expected e = expected(weight, n, x.data() + t * weight.columns);
      if (!(std::fabs(y[t * weight.rows + n] - e.value) <= e.tolerance))
        return fail(where + ": y[" + std::to_string(t) + ", " + std::to_string(n) + "]");
    }
  }
  if (!same_bits(y, product(row, w, x, tokens, {two_threads, nullptr}))) fail(where + ": depends on threads");

  // A NaN or infinity reaches the outputs whose weight is kept there; the others may stay finite.
  if (tokens > 0) {
    x[0] = std::numeric_limits<float>::infinity();
    const std::vector<float> tainted = product(row, w, x, tokens, {serial, nullptr});
    for (int64_t n = 0; n < weight.rows; ++n) {
      const int64_t stored = weight.gated ? n / 16 * 32 + n % 16 : n;
      if (weight.dense[stored * weight.columns] != 0 && std::isfinite(tainted[n]))
        fail(where + ": infinity is lost");
    }
    for (int64_t i = weight.rows; i < tokens * weight.rows; ++i)
      if (!std::isfinite(tainted[i])) return fail(where + ": infinity of one token reached another");
  }
}

/// Changes one thing about a sound weight; what validation lets through must run without harm.
void fuzz(const std::vector<const KernelRow*>& rows, int rounds, std::mt19937& random) {
  int accepted = 0;
  for (int round = 0; round < rounds; ++round) {
    Example weight = make_weight(1 + random() % 40, 1 + random() % 20, random() % 2 == 0, 0.4, random);
    int64_t layout = losa::kLayoutN16;
    switch (random() % 9) {
      case 0: weight.rows += static_cast<int64_t>(random() % 40) - 20; break;
      case 1: weight.columns += static_cast<int64_t>(random() % 8) - 4; break;
      case 2: weight.masks[random() % weight.masks.size()] ^= static_cast<uint8_t>(1u << random() % 8); break;
      case 3: weight.offsets[random() % weight.offsets.size()] += static_cast<int64_t>(random() % 5) - 2; break;
      case 4: weight.offsets[random() % weight.offsets.size()] = static_cast<int64_t>(random()) << 31; break;
      case 5: weight.values.resize(random() % (weight.values.size() + 4)); break;
      case 6: weight.masks.resize(random() % (weight.masks.size() + 4)); break;
      case 7: weight.gated = !weight.gated; break;
      default: layout = static_cast<int64_t>(random() % 3); break;
    }
    weight.masks.shrink_to_fit();
    weight.values.shrink_to_fit();
    losa::WeightParts parts{};
    parts.rows = weight.rows;
    parts.columns = weight.columns;
    parts.layout = layout;
    parts.gated = weight.gated;
    parts.masks = {weight.masks.data(), weight.masks.size()};
    parts.values = {weight.values.data(), weight.values.size() * sizeof(float)};
    parts.block_offsets = {weight.offsets.data(), weight.offsets.size() * sizeof(int64_t)};
    losa::Weight w{};
    std::string error;
    if (!losa::validate(parts, &w, &error)) {
      if (error.empty()) fail("a refusal without a reason");
      continue;
    }
    ++accepted;
    for (const KernelRow* row : rows)
      for (int64_t tokens : {1, 3, 40})
        product(*row, w, std::vector<float>(tokens * w.columns, 1.0f), tokens, {serial, nullptr});
  }
  std::printf("fuzz: %d of %d broken weights accepted and run\n", accepted, rounds);
}

}  // namespace

int main() {
  std::mt19937 random(20240607);
  std::vector<const KernelRow*> rows;
  const losa::KernelTable table = losa::kernel_table();
  for (size_t i = 0; i < table.count; ++i) {
    const KernelRow* row = &table.rows[i];
    const bool emulated = std::strcmp(row->name, "avx512") == 0;
    if (emulated || row->supported())
      rows.push_back(row);
    else
      std::printf("row %s: skipped, this CPU lacks it\n", row->name);
  }
  const int64_t shapes[][2] = {{1, 1}, {16, 64}, {17, 13}, {33, 65}, {100, 7}, {130, 66}, {48, 130}, {15, 200}};
  for (const KernelRow* row : rows) {
    int cases = 0;
    for (const auto& shape : shapes) {
      for (double density : {0.0, 0.3, 0.6, 1.0}) {
        for (bool gated : {false, true}) {
          const Example weight = make_weight(shape[0], shape[1], gated, density, random);
          for (int64_t tokens : {0, 1, 2, 3, 4, 5, 6, 7, 8, 11, 12, 20, 24, 33, 64, 128, 130}) {
            if (tokens > 40 && density == 0.0) continue;
            check_shape(*row, weight, tokens, random);
            ++cases;
          }
        }
      }
    }
    std::printf("row %s: %d cases\n", row->name, cases);
  }
  fuzz(rows, 3000, random);
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
