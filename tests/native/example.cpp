#include "example.h"

namespace test {
namespace {

double half_to_double(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const double magnitude = exponent == 31  ? (fraction != 0 ? NAN : INFINITY)
                           : exponent == 0 ? std::ldexp(fraction, -24)
                                           : std::ldexp(1024 + fraction, exponent - 25);
  return bits >> 15 != 0 ? -magnitude : magnitude;
}

/// The largest binary16 that is not above `value`, which is 0 or more.
uint16_t half_from_double(double value) {
  uint16_t best = 0;
  for (int bit = 14; bit >= 0; --bit) {  // magnitudes are ordered as their bits are
    const uint16_t larger = static_cast<uint16_t>(best | 1u << bit);
    if (larger < 0x7c00 && half_to_double(larger) <= value) best = larger;
  }
  return best;
}

template <class T>
void append(std::vector<uint8_t>* bytes, T value) {
  const size_t size = bytes->size();
  bytes->resize(size + sizeof value);
  std::memcpy(bytes->data() + size, &value, sizeof value);
}

/// The number that a random value of `type` is stored as, and what it stands for.
struct Value {
  uint32_t bits;
  double level;
};

Value random_value(ValueType type, const std::vector<uint8_t>& codebook, Random& random) {
  switch (type) {
    case ValueType::kFp32: {
      const float value = static_cast<float>(random.unit() - 0.5);
      return {bits_of_float(value), value};
    }
    case ValueType::kBf16: {
      const uint32_t bits = bits_of_float(static_cast<float>(random.unit() - 0.5)) >> 16;
      return {bits, float_of_bits(bits << 16)};
    }
    case ValueType::kInt8: {
      const int64_t level = random.between(-127, 127);
      return {static_cast<uint8_t>(level), static_cast<double>(level)};
    }
    default: {
      const int64_t code = random.below(16);
      return {static_cast<uint32_t>(code), static_cast<double>(static_cast<int8_t>(codebook[static_cast<size_t>(code)]))};
    }
  }
}

Expected bounded(double sum, double magnitude, double relative, double absolute) {
  if (!(magnitude < 1e37)) return {sum, INFINITY};
  return {sum, relative * magnitude + absolute};
}

}  // namespace

float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

int64_t width_of(ValueType type) {
  return type == ValueType::kFp32 ? 1 : type == ValueType::kBf16 ? 2 : 4;
}
bool quantised(ValueType type) { return type == ValueType::kInt8 || type == ValueType::kInt4; }

Example make_example(ValueType type, Kind kind, int64_t rows, int64_t columns, double density, int64_t group,
                            int64_t activation_bits, Random& random) {
  Example e;
  e.header.type = static_cast<int32_t>(type);
  e.header.gated = kind == Kind::kGated;
  e.header.dense = kind == Kind::kDense;
  e.header.rows = rows;
  e.header.columns = columns;
  e.header.layout = 1;
  e.header.group = group;
  e.header.activation_bits = activation_bits;

  const int64_t matrices = e.header.gated ? 2 : 1, width = width_of(type);
  const int64_t blocks = (rows + 15) / 16 * matrices, steps = (columns + width - 1) / width;
  Matrix& m = e.matrix;
  m.rows = matrices == 2 ? blocks * 16 : rows;
  m.columns = columns;
  m.group = quantised(type) ? group : columns;
  m.groups = (columns + m.group - 1) / m.group;
  m.levels.resize(static_cast<size_t>(m.rows * columns));
  m.kept.resize(m.levels.size());

  if (type == ValueType::kInt4) {
    int64_t level = -120;
    for (int i = 0; i < 16; ++i) {
      e.bytes[kCodebook].push_back(static_cast<uint8_t>(level));
      level += random.between(1, 15);
    }
  }
  append(&e.bytes[kOffsets], int64_t{0});
  int64_t elements = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const double keep = block % 6 == 1 ? 1.0 : block % 4 == 2 ? 0.0 : density;
    for (int64_t step = 0; step < steps; ++step) {
      uint64_t mask = 0;
      int64_t in_step = 0;
      for (int64_t position = 0; position < 16 * width; ++position) {
        const int64_t row = position / width, k = step * width + position % width;
        const bool inside = block / matrices * 16 + row < rows && k < columns;
        const bool sparse_keep = inside && random.unit() < keep && !(row == 5 && keep < 1);
        if (kind != Kind::kDense && !sparse_keep) continue;
        const Value value = inside ? random_value(type, e.bytes[kCodebook], random) : Value{0, 0};
        mask |= uint64_t{1} << position;
        if (inside) {
          const size_t at = static_cast<size_t>((block * 16 + row) * columns + k);
          m.levels[at] = value.level;
          m.kept[at] = 1;
        }
        std::vector<uint8_t>& to = e.bytes[kValues];
        if (type == ValueType::kFp32)
          append(&to, value.bits);
        else if (type == ValueType::kBf16)
          append(&to, static_cast<uint16_t>(value.bits));
        else if (type == ValueType::kInt8 || in_step % 2 == 0)
          append(&to, static_cast<uint8_t>(value.bits));
        else
          to.back() = static_cast<uint8_t>(to.back() | value.bits << 4);
        ++in_step;
      }
      for (int64_t i = 0; i < 2 * width; ++i) e.bytes[kMasks].push_back(static_cast<uint8_t>(mask >> 8 * i));
      elements += type == ValueType::kInt4 ? (in_step + 1) / 2 : in_step;
    }
    append(&e.bytes[kOffsets], elements);
  }
  e.bytes[kValues].resize(e.bytes[kValues].size() + 64);
  if (kind == Kind::kDense) {
    e.bytes[kMasks].clear();
    e.bytes[kOffsets].clear();
  }
  if (!quantised(type)) return e;

  m.scales.resize(static_cast<size_t>(m.rows * m.groups));
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t g = 0; g < m.groups; ++g) {
      for (int64_t row = 0; row < 16; ++row) {
        const bool inside = block / matrices * 16 + row < rows;
        // Ordinary ones, none, and the smallest and largest that there are.
        const double wanted = !inside || random.one_in(16) ? 0 : random.one_in(16) ? 6e-8 : random.unit() * 0.02;
        const uint16_t bits = inside && random.one_in(64) ? 0x7bff : half_from_double(wanted);
        append(&e.bytes[kScales], bits);
        if (block * 16 + row < m.rows)
          m.scales[static_cast<size_t>((block * 16 + row) * m.groups + g)] = half_to_double(bits);
      }
    }
  }
  return e;
}

Stored::Stored(const Example& e) : parts_(e.header) {
  losa::Bytes* parts[kPartCount] = {&parts_.masks, &parts_.values, &parts_.block_offsets, &parts_.scales,
                                    &parts_.codebook};
  for (int i = 0; i < kPartCount; ++i) {
    buffers_.emplace_back(e.bytes[i].data(), e.bytes[i].size(), static_cast<size_t>(2 * i + 1));
    *parts[i] = {e.absent[i] ? nullptr : buffers_.back().data(), e.bytes[i].size()};
  }
}

Matrix read_matrix(const losa::Weight& w) {
  Matrix m;
  const int64_t width = width_of(w.type);
  m.rows = w.rows;
  m.columns = w.columns;
  m.group = quantised(w.type) ? w.group : w.columns;
  m.groups = (w.columns + m.group - 1) / m.group;
  m.levels.resize(static_cast<size_t>(m.rows * m.columns));
  m.kept.resize(m.levels.size());
  if (quantised(w.type)) m.scales.resize(static_cast<size_t>(m.rows * m.groups));
  const int64_t blocks = (w.rows + 15) / 16, steps = (w.columns + width - 1) / width;
  int64_t next = 0;  // the value's number; of int4, the half byte's
  for (int64_t block = 0; block < blocks; ++block) {
    for (int64_t step = 0; step < steps; ++step) {
      for (int64_t position = 0; position < 16 * width; ++position) {
        const uint8_t* mask = w.masks == nullptr ? nullptr : w.masks + (block * steps + step) * 2 * width;
        if (mask != nullptr && (mask[position / 8] >> position % 8 & 1) == 0) continue;
        double level = 0;
        uint32_t word = 0;
        uint16_t half = 0;
        if (w.type == ValueType::kFp32) {
          std::memcpy(&word, w.values + next * 4, 4);
          level = float_of_bits(word);
        } else if (w.type == ValueType::kBf16) {
          std::memcpy(&half, w.values + next * 2, 2);
          level = float_of_bits(static_cast<uint32_t>(half) << 16);
        } else if (w.type == ValueType::kInt8) {
          level = static_cast<int8_t>(w.values[next]);
        } else {
          level = w.codebook[w.values[next / 2] >> next % 2 * 4 & 15];
        }
        ++next;
        const int64_t row = block * 16 + position / width, k = step * width + position % width;
        if (row >= w.rows || k >= w.columns) continue;
        m.levels[static_cast<size_t>(row * w.columns + k)] = level;
        m.kept[static_cast<size_t>(row * w.columns + k)] = 1;
      }
      if (w.type == ValueType::kInt4) next += next % 2;
    }
    for (int64_t g = 0; quantised(w.type) && g < m.groups; ++g) {
      for (int64_t r = 0; r < 16 && block * 16 + r < w.rows; ++r) {
        uint16_t bits;
        std::memcpy(&bits, reinterpret_cast<const char*>(w.scales) + ((block * m.groups + g) * 16 + r) * 2, 2);
        m.scales[static_cast<size_t>((block * 16 + r) * m.groups + g)] = half_to_double(bits);
      }
    }
  }
  return m;
}

bool same(const std::vector<double>& a, const std::vector<double>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (!(a[i] == b[i])) return false;
  return true;
}

RoundedToken::RoundedToken(const float* x, int64_t columns, int64_t group, int64_t bits) {
  const float largest = bits == 8 ? 127.0f : 32767.0f;
  levels.resize(static_cast<size_t>(columns));
  for (int64_t first = 0; first < columns; first += group) {
    float amax = 0;
    bool finite = true;
    for (int64_t k = first; k < first + group && k < columns; ++k) {
      finite = finite && std::isfinite(x[k]);
      amax = std::fmax(amax, std::fabs(x[k]));
    }
    const float inverse = largest / amax;
    const bool usable = finite && amax > 0 && std::isfinite(inverse);
    scales.push_back(!finite ? NAN : usable ? static_cast<double>(amax / largest) : 0.0);
    for (int64_t k = first; usable && k < first + group && k < columns; ++k) {
      const float product = x[k] * inverse;
      double level = std::floor(static_cast<double>(product));
      const double rest = static_cast<double>(product) - level;
      if (rest > 0.5 || (rest == 0.5 && std::fmod(level, 2) != 0)) level += 1;
      levels[static_cast<size_t>(k)] = level;
    }
  }
}

std::vector<Expected> Reference::products(const float* x) const {
  std::vector<Expected> result;
  result.reserve(static_cast<size_t>(m_.rows));
  if (quantised(type_)) {
    const RoundedToken token(x, m_.columns, m_.group, bits_);
    for (int64_t row = 0; row < m_.rows; ++row) result.push_back(integer_product(row, token));
  } else {
    for (int64_t row = 0; row < m_.rows; ++row) result.push_back(float_product(row, x));
  }
  return result;
}

/// At most K additions, each rounded to half a unit in the last place of float (2^-24), or of the smallest
/// numbers (2^-150).
Expected Reference::float_product(int64_t row, const float* x) const {
  double sum = 0, magnitude = 0;
  for (int64_t k = 0; k < m_.columns; ++k) {
    if (!m_.kept[static_cast<size_t>(row * m_.columns + k)]) continue;
    const double term = m_.level(row, k) * static_cast<double>(x[k]);
    sum += term;
    magnitude += std::fabs(term);
  }
  const double additions = static_cast<double>(m_.columns) + 8;
  return bounded(sum, magnitude, additions * 0x1p-24, additions * 0x1p-149);
}

/// A group rounds its sum, the product of scales and the addition.
Expected Reference::integer_product(int64_t row, const RoundedToken& token) const {
  double sum = 0, magnitude = 0, small = 0;
  for (int64_t g = 0; g < m_.groups; ++g) {
    double levels = 0;
    for (int64_t k = g * m_.group; k < (g + 1) * m_.group && k < m_.columns; ++k)
      levels += m_.level(row, k) * token.levels[static_cast<size_t>(k)];
    const double term = levels * m_.scales[static_cast<size_t>(row * m_.groups + g)] * token.scales[static_cast<size_t>(g)];
    sum += term;
    magnitude += std::fabs(term);
    small += (std::fabs(levels) + 1) * 0x1p-149;  // the product of scales may lose its last bits
  }
  return bounded(sum, magnitude, (static_cast<double>(m_.groups) + 2) * 0x1p-23, small);
}

Expected gated(const Expected& gate, const Expected& up) {
  const double silu = gate.value / (1 + std::exp(-gate.value));
  if (!(std::fabs(gate.value) + std::fabs(up.value) < 1e18)) return {silu * up.value, INFINITY};
  // The slope of silu is at most 1.1; of itself it rounds four times and has an exponential within 2e-7.
  return {silu * up.value, 1.1 * gate.tolerance * (std::fabs(up.value) + up.tolerance) +
                               std::fabs(silu) * up.tolerance + 6e-7 * std::fabs(silu * up.value) + 1e-38};
}

}  // namespace test
