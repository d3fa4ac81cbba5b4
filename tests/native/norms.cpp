// The addition and norm before a product: against double, and inside `multiply` against the two apart.
#include <algorithm>

#include "harness.h"

namespace test {
namespace {

/// x, skip and gamma at addresses aligned to a float and no further, and room for the results.
struct Tokens {
  Tokens(int64_t tokens, int64_t columns, Random& random)
      : tokens(tokens),
        columns(columns),
        x(numbers(tokens * columns, random)),
        skip(numbers(tokens * columns, random)),
        gamma(numbers(columns, random)),
        sums(static_cast<size_t>(tokens * columns), NAN),
        x_bytes(x.data(), x.size() * sizeof(float), sizeof(float)),
        skip_bytes(skip.data(), skip.size() * sizeof(float), sizeof(float)),
        gamma_bytes(gamma.data(), gamma.size() * sizeof(float), sizeof(float)) {
    sums.shrink_to_fit();
  }

  static std::vector<float> numbers(int64_t count, Random& random) {
    std::vector<float> made(static_cast<size_t>(count));
    for (float& value : made) value = static_cast<float>(2 * random.unit() - 1);
    return made;
  }
  losa::SkipNorm norm() {
    return {reinterpret_cast<const float*>(skip_bytes.data()), reinterpret_cast<const float*>(gamma_bytes.data()),
            1e-5f, sums.data()};
  }
  const float* input() const { return reinterpret_cast<const float*>(x_bytes.data()); }
  std::vector<float> normed() {
    std::vector<float> y(x.size(), NAN);
    y.shrink_to_fit();
    losa::skip_norm(input(), tokens, columns, norm(), y.data());
    return y;
  }

  int64_t tokens, columns;
  std::vector<float> x, skip, gamma, sums;
  Buffer x_bytes, skip_bytes, gamma_bytes;
};

void check_against_double(Random& random) {
  uint64_t digest = 0xcbf29ce484222325u;
  for (int64_t columns : {1, 2, 15, 16, 17, 33, 100, 576, 1000}) {
    Tokens t(3, columns, random);
    const std::vector<float> y = t.normed();
    for (int64_t token = 0; token < t.tokens; ++token) {
      double squares = 0;
      for (int64_t k = 0; k < columns; ++k) {
        const size_t i = static_cast<size_t>(token * columns + k);
        if (t.sums[i] != t.x[i] + t.skip[i]) return fail("norm: a sum is wrong, K=" + std::to_string(columns));
        squares += static_cast<double>(t.sums[i]) * t.sums[i];
      }
      for (int64_t k = 0; k < columns; ++k) {
        const size_t i = static_cast<size_t>(token * columns + k);
        const double expected =
            t.sums[i] / std::sqrt(squares / static_cast<double>(columns) + 1e-5) * t.gamma[static_cast<size_t>(k)];
        // Up to 63 additions to a partial sum and a handful of other roundings of 6e-8.
        if (!(std::fabs(y[i] - expected) <= 5e-6 * std::fabs(expected)))
          return fail("norm: a value is wrong, K=" + std::to_string(columns));
        digest = (digest ^ bits_of_float(y[i])) * 0x100000001b3u;
      }
    }
  }
  // Every processor and compiler gives these bits.
  if (digest != 8888261921236728326u) fail("norm: other bits than elsewhere: " + std::to_string(digest));
}

}  // namespace

void check_norms(const Rows& rows) {
  Random random(11);
  check_against_double(random);
  int cases = 0;
  for (int type = 0; type < losa::kValueTypes; ++type) {
    for (Kind kind : {Kind::kSparse, Kind::kGated, Kind::kDense}) {
      if (kind == Kind::kDense && static_cast<ValueType>(type) == ValueType::kFp32) continue;
      for (int64_t columns : {1, 31, 70, 130}) {
        const Example e = make_example(static_cast<ValueType>(type), kind, 18, columns, 0.4, 32,
                                       random.one_in(2) ? 8 : 16, random);
        const Stored stored(e);
        losa::Weight w{};
        std::string error;
        if (!losa::validate(stored.parts(), &w, &error)) return fail(describe(e) + ": refused: " + error);
        for (int64_t tokens : {0, 1, 2, 9, 33, 64, 130}) {
          Tokens t(tokens, columns, random);
          const std::vector<float> normed = t.normed();
          const std::vector<float> sums = t.sums;
          for (const losa::KernelRow* row : rows) {
            const std::vector<float> expected = product(*row, w, normed, tokens);
            for (const losa::Parallel* parallel : {&kSerial, &kTwoThreads}) {
              std::vector<float> y(static_cast<size_t>(tokens * w.outputs), NAN);
              y.shrink_to_fit();
              std::fill(t.sums.begin(), t.sums.end(), NAN);
              if (!losa::multiply(*row, w, t.input(), tokens, y.data(), *parallel, t.norm())) fail("out of memory");
              if (!same_floats(y, expected) || !same_floats(t.sums, sums))
                return fail(std::string(row->name) + " " + describe(e) + " M=" + std::to_string(tokens) +
                            ": a norm inside gives something else than one before");
            }
          }
          ++cases;
        }
      }
    }
  }
  std::printf("norms: %d cases\n", cases);
}

}  // namespace test
