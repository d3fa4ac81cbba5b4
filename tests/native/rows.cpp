// Sound weights: every kernel row against scalar, and scalar against double.
#include "harness.h"

namespace test {
namespace {

using losa::KernelRow;

std::vector<float> random_tokens(int64_t tokens, int64_t columns, Random& random) {
  std::vector<float> x(static_cast<size_t>(tokens * columns));
  for (float& value : x) value = static_cast<float>(2 * random.unit() - 1);
  return x;
}

/// The output of each stored row, or of each pair of them.
std::vector<Expected> outputs(const Reference& reference, const Example& e, const float* x) {
  const std::vector<Expected> rows = reference.products(x);
  if (!e.header.gated) return rows;
  std::vector<Expected> pairs;
  for (int64_t n = 0; n < e.header.rows; ++n) {
    const size_t gate = static_cast<size_t>(n / 16 * 32 + n % 16);
    pairs.push_back(gated(rows[gate], rows[gate + 16]));
  }
  return pairs;
}

bool matches(const std::vector<Expected>& expected, const float* y) {
  for (size_t n = 0; n < expected.size(); ++n)
    if (std::isfinite(expected[n].tolerance) && !(std::fabs(y[n] - expected[n].value) <= expected[n].tolerance))
      return false;
  return true;
}

/// The blocks of a gated weight as one that is not: its products before they are combined.
losa::Weight plain(losa::Weight w) {
  w.outputs = w.rows;
  return w;
}

/// Whether dispatch filled all that `row` needs for such a weight from scalar, which is tried in any case.
bool borrowed(const KernelRow& row, const KernelRow& scalar, const losa::Weight& w) {
  if (&row == &scalar || (w.gated() && row.gate != scalar.gate)) return false;
  if (!quantised(w.type)) return row.floats(w.type).decode == scalar.floats(w.type).decode;
  return row.integers(w.type).decode == scalar.integers(w.type).decode && row.round == scalar.round;
}

/// One product, by all rows.
void check(const Rows& rows, const Example& e, const losa::Weight& w, const Reference& reference,
           const std::vector<float>& x, int64_t tokens, const std::string& where) {
  const KernelRow& scalar = *rows.back();
  std::vector<std::vector<Expected>> expected;
  for (int64_t t = 0; t < tokens; ++t) expected.push_back(outputs(reference, e, x.data() + t * e.header.columns));
  const bool exact = quantised(w.type);
  const std::vector<float> products = exact ? product(scalar, plain(w), x, tokens) : std::vector<float>();
  for (const KernelRow* row : rows) {
    if (borrowed(*row, scalar, w)) continue;
    const std::vector<float> y = row == &scalar && exact && !w.gated() ? products : product(*row, w, x, tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      if (matches(expected[static_cast<size_t>(t)], y.data() + t * w.outputs)) continue;
      fail(std::string(row->name) + " " + where + ": token " + std::to_string(t) + " is wrong");
      break;
    }
    if (exact && row != &scalar && !same_floats(products, w.gated() ? product(*row, plain(w), x, tokens) : y))
      fail(std::string(row->name) + " " + where + ": differs from scalar");
    if (tokens > 0 && tokens % 8 == 1 && !same_floats(y, product(*row, w, x, tokens, kTwoThreads)))
      fail(std::string(row->name) + " " + where + ": depends on threads");
  }
}

/// What is not finite: of integers it makes its whole token NaN, of floats the outputs whose weight is kept
/// there; no other token is touched.
void check_not_finite(const Rows& rows, const Example& e, const losa::Weight& w, int64_t tokens,
                      const std::string& where, Random& random) {
  static constexpr float kBad[] = {NAN, INFINITY, -INFINITY};
  std::vector<float> x = random_tokens(tokens, e.header.columns, random);
  const int64_t token = random.below(tokens);
  const int64_t k = random.one_in(2) ? e.header.columns - 1 : random.below(e.header.columns);
  x[static_cast<size_t>(token * e.header.columns + k)] = random.of(kBad);
  for (const KernelRow* row : rows) {
    if (borrowed(*row, *rows.back(), w)) continue;
    const std::vector<float> y = product(*row, plain(w), x, tokens);
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t n = 0; n < w.rows; ++n) {
        const float value = y[static_cast<size_t>(t * w.rows + n)];
        const bool reached = e.matrix.kept[static_cast<size_t>(n * e.header.columns + k)] &&
                             (quantised(w.type) || e.matrix.level(n, k) != 0);
        const bool right = t != token                ? std::isfinite(value)
                           : quantised(w.type) ? std::isnan(value)
                                                     : !reached || !std::isfinite(value);
        if (!right) return fail(std::string(row->name) + " " + where + ": what is not finite is lost or spreads");
      }
    }
    if (w.gated() && quantised(w.type)) {
      const std::vector<float> z = product(*row, w, x, tokens);
      for (int64_t n = 0; n < w.outputs; ++n)
        if (!std::isnan(z[static_cast<size_t>(token * w.outputs + n)]))
          return fail(std::string(row->name) + " " + where + ": NaN is lost on the way through the gate");
    }
  }
}

void check_example(const Rows& rows, const Example& e, const std::vector<int64_t>& token_counts, Random& random) {
  const Stored stored(e);
  losa::Weight w{};
  std::string error;
  if (!losa::validate(stored.parts(), &w, &error)) return fail(describe(e) + ": a sound weight is refused: " + error);
  const Matrix read = read_matrix(w);
  if (!same(read.levels, e.matrix.levels) || !same(read.scales, e.matrix.scales) || read.kept != e.matrix.kept)
    return fail(describe(e) + ": the harness does not read what it has written");
  const Reference reference(e.matrix, w.type, w.activation_bits);
  for (int64_t tokens : token_counts) {
    const std::string where = describe(e) + " M=" + std::to_string(tokens);
    check(rows, e, w, reference, random_tokens(tokens, e.header.columns, random), tokens, where);
  }
  for (int64_t tokens : {1, 5, 16, 40}) {
    check_not_finite(rows, e, w, tokens, describe(e) + " M=" + std::to_string(tokens), random);
    // Tokens of every magnitude, and some with nothing but zeros.
    std::vector<float> x = random_tokens(tokens, e.header.columns, random);
    for (int64_t t = 0; t < tokens; ++t) {
      static constexpr float kMagnitudes[] = {0.0f, -0.0f, 1e-44f, 1e-40f, 1e-36f, 1e-33f, 1e-20f, 1e20f, 1e30f};
      const float magnitude = random.of(kMagnitudes);
      for (int64_t k = 0; k < e.header.columns; ++k) x[static_cast<size_t>(t * e.header.columns + k)] *= magnitude;
    }
    check(rows, e, w, reference, x, tokens, describe(e) + " of odd magnitudes, M=" + std::to_string(tokens));
  }
}

}  // namespace

void check_products(const Rows& rows, bool quick, int64_t part, int64_t parts) {
  // One short step, whole blocks and groups, short last steps, and groups of each width that end short.
  static constexpr int64_t kShapes[][2] = {{1, 1},   {17, 13}, {16, 64},  {33, 65},  {100, 7},
                                           {48, 130}, {20, 31}, {15, 200}, {66, 66}, {18, 260}};
  static constexpr int64_t kGroups[] = {32, 64, 128};
  std::vector<int64_t> all_counts;
  for (int64_t tokens = 0; tokens <= 24; ++tokens) all_counts.push_back(tokens);
  for (int64_t tokens : {33, 64, 128, 130}) all_counts.push_back(tokens);
  const std::vector<int64_t> few_counts = {0, 1, 2, 3, 5, 8, 13, 24, 33, 64, 130};

  int64_t examples = 0, checked = 0;
  for (const auto& shape : kShapes) {
    if (quick && shape[0] > 48) continue;
    for (int type = 0; type < losa::kValueTypes; ++type) {
      for (Kind kind : {Kind::kSparse, Kind::kGated, Kind::kDense}) {
        const ValueType value_type = static_cast<ValueType>(type);
        if (kind == Kind::kDense && value_type == ValueType::kFp32) continue;
        for (double density : {0.0, 0.3, 0.6, 1.0}) {
          if (kind == Kind::kDense && density < 1) continue;
          if (quick && (density == 0.0 || density == 0.6)) continue;
          // Groups and widths of activations take turns; 3 and 2 have no factor in common with what runs inside.
          const int64_t group = kGroups[examples % 3], bits = examples / 3 % 2 == 0 ? 16 : 8;
          if (++examples % parts != part) continue;
          Random random(static_cast<uint64_t>(examples));
          const Example e = make_example(value_type, kind, shape[0], shape[1], density, group, bits, random);
          const bool thorough = !quick && shape[0] * shape[1] < 2200 && (density == 0.3 || kind == Kind::kDense);
          check_example(rows, e, thorough ? all_counts : few_counts, random);
          ++checked;
        }
      }
    }
  }
  for (const KernelRow* row : rows) std::printf("row %s: %d examples\n", row->name, static_cast<int>(checked));
}

void check_wide_products(const Rows& rows) {
  // So many activations that they are prepared token by token, and several panels of them.
  Random random(5);
  for (ValueType type : {ValueType::kFp32, ValueType::kInt8, ValueType::kInt4}) {
    for (int64_t bits : {8, 16}) {
      const Example e = make_example(type, Kind::kSparse, 18, 4300, 0.3, 128, bits, random);
      const Stored stored(e);
      losa::Weight w{};
      std::string error;
      if (!losa::validate(stored.parts(), &w, &error)) return fail(describe(e) + ": a sound weight is refused: " + error);
      const Reference reference(e.matrix, w.type, w.activation_bits);
      for (int64_t tokens : {1, 4, 8, 9})
        check(rows, e, w, reference, random_tokens(tokens, 4300, random), tokens,
              describe(e) + " M=" + std::to_string(tokens));
    }
  }
}

void check_rounding(const Rows& rows) {
  Random random(99);
  static constexpr float kBad[] = {NAN, INFINITY, -INFINITY};
  static constexpr int64_t kColumns[] = {1, 3, 8, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 160, 257};
  static constexpr int64_t kGroups[] = {32, 64, 128};
  int cases = 0;
  for (int round = 0; round < 1500; ++round, ++cases) {
    const int64_t columns = random.of(kColumns), group = random.of(kGroups), tokens = random.between(1, 5);
    const int64_t bits = random.one_in(2) ? 8 : 16;
    std::vector<float> x = random_tokens(tokens, columns, random);
    const int64_t style = random.below(7);
    const float largest = bits == 8 ? 127.0f : 32767.0f;
    for (float& value : x) {
      if (style == 0) value = float_of_bits(static_cast<uint32_t>(random.next()) & 0x807fffffu);  // subnormal
      if (style == 1 && random.one_in(3)) value = random.one_in(2) ? -0.0f : 0.0f;
      if (style == 2)  // ties, once the largest of a group is L
        value = random.one_in(8) ? largest : static_cast<float>(random.between(-126, 125)) + 0.5f;
      if (style == 3) value = std::ldexp(value, static_cast<int>(random.between(-140, 127)));
      if (style == 4 && random.one_in(20)) value = random.of(kBad);
      if (style == 5) value = random.one_in(2) ? 0.0f : std::ldexp(value, -116);  // about where 1/x overflows
    }
    const int64_t groups = (columns + group - 1) / group, padded = groups * group;
    // Exactly as long as RoundedTokens says; as in matmul.cpp, tokens start at multiples of 64 bytes.
    std::vector<std::unique_ptr<int16_t[]>> levels;
    std::vector<std::unique_ptr<float[]>> scales;
    const Buffer exact(x.data(), x.size() * sizeof(float), sizeof(float));
    for (const KernelRow* row : rows) {
      levels.emplace_back(new int16_t[static_cast<size_t>(tokens * padded)]);
      scales.emplace_back(new float[static_cast<size_t>(tokens * groups)]);
      std::memset(levels.back().get(), 0x55, static_cast<size_t>(tokens * padded) * sizeof(int16_t));
      row->round(reinterpret_cast<const float*>(exact.data()), tokens, bits,
                 {levels.back().get(), scales.back().get(), columns, group});
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const RoundedToken token(x.data() + t * columns, columns, group, bits);
      for (size_t r = 0; r < rows.size(); ++r) {
        bool right = true;
        for (int64_t k = 0; k < padded; ++k) {
          const double expected = k < columns ? token.levels[static_cast<size_t>(k)] : 0.0;
          if (!std::isnan(token.scales[static_cast<size_t>(k / group)]))
            right = right && levels[r][static_cast<size_t>(t * padded + k)] == expected;
        }
        for (int64_t g = 0; g < groups; ++g) {
          const float scale = scales[r][static_cast<size_t>(t * groups + g)];
          const double expected = token.scales[static_cast<size_t>(g)];
          right = right && (std::isnan(expected) ? std::isnan(scale) : scale == expected);
        }
        if (!right)
          return fail(std::string(rows[r]->name) + " rounds otherwise than activations.h, K=" + std::to_string(columns) +
                      " group=" + std::to_string(group) + " bits=" + std::to_string(bits) + " style " +
                      std::to_string(style));
      }
    }
  }
  std::printf("rounding: %d cases\n", cases);
}

void check_gathering() {
  Random random(7);
  static constexpr int64_t kNoRows[] = {-1, INT64_MIN, INT64_MAX, int64_t{1} << 32, 1000};
  for (ValueType type : {ValueType::kBf16, ValueType::kInt8, ValueType::kInt4}) {
    for (int64_t columns : {1, 2, 3, 4, 31, 64, 70, 129}) {
      const int64_t rows = random.between(1, 40);
      const Example e = make_example(type, Kind::kDense, rows, columns, 1, 32, 16, random);
      const Stored stored(e);
      losa::Weight w{};
      std::string error;
      if (!losa::validate(stored.parts(), &w, &error)) return fail(describe(e) + ": refused: " + error);
      std::vector<int64_t> ids;
      for (int64_t i = 0; i < 9; ++i) ids.push_back(random.below(rows));
      for (bool bad : {false, true}) {
        if (bad) ids[6] = random.one_in(2) ? rows : random.of(kNoRows);
        const Buffer unaligned(ids.data(), ids.size() * sizeof(int64_t), 3);
        std::vector<float> y(static_cast<size_t>(columns) * ids.size(), NAN);
        y.shrink_to_fit();
        const int64_t wrong =
            losa::gather_rows(w, reinterpret_cast<const int64_t*>(unaligned.data()), static_cast<int64_t>(ids.size()), y.data());
        if (wrong != (bad ? 6 : -1)) return fail(describe(e) + ": gather_rows returns " + std::to_string(wrong));
        for (int64_t i = 0; i < (bad ? 6 : 9); ++i) {
          for (int64_t k = 0; k < columns; ++k) {
            const int64_t id = ids[static_cast<size_t>(i)];
            const double scale =
                quantised(type) ? e.matrix.scales[static_cast<size_t>(id * e.matrix.groups + k / 32)] : 1;
            if (y[static_cast<size_t>(i * columns + k)] != e.matrix.level(id, k) * scale)  // exact in float
              return fail(describe(e) + ": gather_rows gives another row");
          }
        }
      }
    }
  }
}

}  // namespace test
