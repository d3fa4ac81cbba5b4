// Broken weights. A sound one is made, then one to three things about it are changed, of which validation may
// know nothing. What it lets through must give, with every kernel row, what its numbers say.
#include <csignal>

#include "harness.h"

namespace {

std::string running;

void say_which() { std::fprintf(stderr, "died in %s\n", running.c_str()); }

}  // namespace

// What AddressSanitizer has called before it ends the process; absent without it.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());
// What UBSan calls.
extern "C" void __ubsan_on_report() { say_which(); }

namespace test {
namespace {

void say_which_and_die(int signal) {
  say_which();
  std::signal(signal, SIG_DFL);
  std::raise(signal);
}

void report_deaths() {
  if (__sanitizer_set_death_callback != nullptr) return __sanitizer_set_death_callback(say_which);
  for (int signal : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT}) std::signal(signal, say_which_and_die);
}

using losa::KernelRow;

constexpr int64_t kNumbers[] = {0,  1,  2,  3,  4,  7,   8,   16,  31,      32,      33,      63,      64,        128,
                                -1, -2, -16, 256, 1 << 20, 1 << 30, (1 << 30) + 1, int64_t{1} << 31,
                                int64_t{1} << 32, (int64_t{1} << 32) + 16, int64_t{1} << 58, int64_t{1} << 62,
                                INT64_MAX, INT64_MIN, INT64_MAX - 15, INT64_MIN + 1};

int64_t change_number(int64_t value, Random& random) {
  switch (random.below(4)) {
    case 0: return random.of(kNumbers);
    case 1: return static_cast<int64_t>(static_cast<uint64_t>(value) + static_cast<uint64_t>(random.between(-20, 20)));
    case 2: return static_cast<int64_t>(static_cast<uint64_t>(value) * static_cast<uint64_t>(random.between(2, 4)));
    default: return static_cast<int64_t>(random.next());
  }
}

/// Changes the bytes of a part, its length, or whether it is there.
void change_part(Example* e, Random& random, std::string* what) {
  const int part = static_cast<int>(random.below(kPartCount));
  std::vector<uint8_t>& bytes = e->bytes[part];
  const int64_t size = static_cast<int64_t>(bytes.size());
  *what += std::string(" ") + kPartNames[part];
  switch (random.below(9)) {
    case 0: *what += " truncated"; bytes.resize(static_cast<size_t>(random.below(size + 1))); break;
    case 1: *what += " shortened"; bytes.resize(static_cast<size_t>(size - random.below(size < 80 ? size + 1 : 80))); break;
    case 2: *what += " extended"; bytes.resize(static_cast<size_t>(size + random.between(1, 80)), 0xff); break;
    case 3: *what += " null"; e->absent[part] = true; break;
    case 4: *what += " emptied"; bytes.clear(); break;
    case 5: *what += " null and empty"; e->absent[part] = true; bytes.clear(); break;
    case 6:
      *what += " overwritten";
      for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random.next());
      break;
    case 7:
      *what += " with a bit changed";
      if (size != 0) bytes[static_cast<size_t>(random.below(size))] ^= static_cast<uint8_t>(1u << random.below(8));
      break;
    default:
      *what += " with a byte changed";
      if (size != 0) bytes[static_cast<size_t>(random.below(size))] = static_cast<uint8_t>(random.next());
  }
}

/// Earlier changes may have made the part shorter than it should be.
template <class T>
void put(std::vector<uint8_t>* bytes, int64_t index, T value) {
  if (static_cast<size_t>(index + 1) * sizeof value > bytes->size()) return;
  std::memcpy(bytes->data() + index * static_cast<int64_t>(sizeof value), &value, sizeof value);
}

void change_offset(Example* e, Random& random) {
  std::vector<uint8_t>& bytes = e->bytes[kOffsets];
  const int64_t count = static_cast<int64_t>(bytes.size() / 8);
  if (count == 0) return;
  const int64_t index = random.below(count);
  int64_t value;
  std::memcpy(&value, bytes.data() + index * 8, 8);
  put(&bytes, index, change_number(value, random));
}

/// Keeps or drops a position and corrects offsets and values, so that only the edges can object.
void change_position(Example* e, Random& random) {
  std::vector<uint8_t>& masks = e->bytes[kMasks];
  std::vector<uint8_t>& offsets = e->bytes[kOffsets];
  if (masks.empty() || offsets.size() < 16) return;
  masks[static_cast<size_t>(random.below(static_cast<int64_t>(masks.size())))] ^= static_cast<uint8_t>(1u << random.below(8));
  const int64_t blocks = static_cast<int64_t>(offsets.size() / 8) - 1;
  const int64_t block_bytes = static_cast<int64_t>(masks.size()) / blocks, step_bytes = 2 * width_of(e->type());
  if (block_bytes == 0) return;
  int64_t elements = 0;
  for (int64_t i = 0; i < blocks * block_bytes; i += step_bytes) {
    int64_t kept = 0;
    for (int64_t j = i; j < i + step_bytes && j < blocks * block_bytes; ++j)
      kept += __builtin_popcount(masks[static_cast<size_t>(j)]);
    elements += e->type() == ValueType::kInt4 ? (kept + 1) / 2 : kept;
    if ((i + step_bytes) % block_bytes == 0) put(&offsets, (i + step_bytes) / block_bytes, elements);
  }
  const int64_t size = e->type() == ValueType::kFp32 ? 4 : e->type() == ValueType::kBf16 ? 2 : 1;
  e->bytes[kValues].resize(static_cast<size_t>(elements * size + 64), static_cast<uint8_t>(random.next()));
}

/// Numbers at the ends of their types, which a sound weight seldom or never has.
void change_contents(Example* e, Random& random) {
  static constexpr uint32_t kFloats[] = {0x7f800000, 0xff800000, 0x7fc00000, 0x7f7fffff, 1, 0x80000000, 0x00800000};
  static constexpr uint8_t kBytes[] = {0x80, 0x81, 0x7f, 0x00, 0xff, 0x88, 0x08};
  static constexpr uint16_t kHalves[] = {0, 1, 0x3ff, 0x400, 0x7bff, 0x7c00, 0x7e00, 0x8000, 0xbc00, 0xfc00};
  std::vector<uint8_t>& values = e->bytes[kValues];
  std::vector<uint8_t>& scales = e->bytes[kScales];
  for (int64_t times = random.between(1, 12); times > 0; --times) {
    const int64_t size = static_cast<int64_t>(values.size());
    if (e->type() == ValueType::kFp32 && size >= 4) put(&values, random.below(size / 4), random.of(kFloats));
    if (e->type() == ValueType::kBf16 && size >= 2)
      put(&values, random.below(size / 2), static_cast<uint16_t>(random.of(kFloats) >> 16));
    if (quantised(e->type()) && size >= 1) put(&values, random.below(size), random.of(kBytes));
    if (scales.size() >= 2 && random.one_in(3))
      put(&scales, random.below(static_cast<int64_t>(scales.size() / 2)), random.of(kHalves));
    if (!e->bytes[kCodebook].empty())
      put(&e->bytes[kCodebook], random.below(static_cast<int64_t>(e->bytes[kCodebook].size())), random.of(kBytes));
  }
}

std::string change(Example* e, Random& random) {
  std::string what;
  losa::WeightParts& header = e->header;
  for (int64_t times = random.one_in(4) ? random.between(2, 3) : 1; times > 0; --times) {
    switch (random.below(16)) {
      case 0: what += " type"; header.type = static_cast<int32_t>(random.one_in(2) ? random.below(4) : change_number(header.type, random)); break;
      case 1: what += " gated"; header.gated = static_cast<int32_t>(random.one_in(2) ? !header.gated : change_number(header.gated, random)); break;
      case 2: what += " dense"; header.dense = static_cast<int32_t>(random.one_in(2) ? !header.dense : change_number(header.dense, random)); break;
      case 3: what += " rows"; header.rows = change_number(header.rows, random); break;
      case 4: what += " columns"; header.columns = change_number(header.columns, random); break;
      case 5: what += " layout"; header.layout = change_number(header.layout, random); break;
      case 6: what += " group"; header.group = change_number(header.group, random); break;
      case 7: what += " bits"; header.activation_bits = change_number(header.activation_bits, random); break;
      case 8: what += " offsets"; change_offset(e, random); break;
      case 9: what += " position"; change_position(e, random); break;
      case 10: what += " contents"; change_contents(e, random); break;
      case 11: {
        const int a = static_cast<int>(random.below(kPartCount)), b = static_cast<int>(random.below(kPartCount));
        what += std::string(" ") + kPartNames[a] + " and " + kPartNames[b] + " exchanged";
        std::swap(e->bytes[a], e->bytes[b]);
        break;
      }
      default: change_part(e, random, &what);
    }
  }
  return what;
}

/// Whether `y` is what the stored numbers give. Where these are not finite, or too large, only that is asked.
bool right(const Reference& reference, const losa::Weight& w, const std::vector<float>& x, int64_t tokens,
           const std::vector<float>& y) {
  for (int64_t t = 0; t < tokens; ++t) {
    const std::vector<Expected> products = reference.products(x.data() + t * w.columns);
    for (int64_t n = 0; n < w.outputs; ++n) {
      const size_t gate = static_cast<size_t>(n / 16 * 32 + n % 16);
      const Expected e = w.gated() ? gated(products[gate], products[gate + 16]) : products[static_cast<size_t>(n)];
      const float value = y[static_cast<size_t>(t * w.outputs + n)];
      if (!std::isfinite(e.value) ? std::isfinite(value) && !w.gated()
                                  : std::isfinite(e.tolerance) && !(std::fabs(value - e.value) <= e.tolerance))
        return false;
    }
  }
  return true;
}

/// Returns whether the weight was accepted.
bool run_case(const Rows& rows, const std::string& name, Random& random) {
  static constexpr int64_t kGroups[] = {32, 64, 128};
  const ValueType type = static_cast<ValueType>(random.below(losa::kValueTypes));
  Kind kind = static_cast<Kind>(random.below(3));
  if (type == ValueType::kFp32 && kind == Kind::kDense) kind = Kind::kSparse;
  const int64_t columns = random.one_in(4) ? random.between(1, 140) : random.between(1, 24);
  Example e = make_example(type, kind, random.between(1, 40), columns, random.unit(), random.of(kGroups),
                           random.one_in(2) ? 8 : 16, random);
  std::string what = name + " (" + describe(e) + ":";
  what += change(&e, random) + ")";
  running = what;

  const Stored stored(e);
  losa::Weight w{};
  std::string error;
  if (!losa::validate(stored.parts(), &w, &error)) {
    if (error.empty()) fail(what + ": refused without a reason");
    return false;
  }
  const Matrix matrix = read_matrix(w);
  const Reference reference(matrix, w.type, w.activation_bits);
  for (int64_t tokens : {1, 3, 9, 40}) {
    std::vector<float> x(static_cast<size_t>(tokens * w.columns));
    for (float& value : x) value = static_cast<float>(2 * random.unit() - 1);
    const std::vector<float> scalar = product(*rows.back(), w, x, tokens);
    if (!right(reference, w, x, tokens, scalar)) fail(what + ": scalar is wrong, M=" + std::to_string(tokens));
    for (const KernelRow* row : rows) {
      if (row == rows.back()) continue;
      const std::vector<float> y = product(*row, w, x, tokens);
      const bool same = quantised(w.type) && !w.gated() ? same_floats(y, scalar) : right(reference, w, x, tokens, y);
      if (!same) fail(what + ": " + row->name + " differs from scalar, M=" + std::to_string(tokens));
    }
  }
  if (w.dense()) {
    const int64_t ids[] = {random.below(w.rows), change_number(w.rows, random)};
    std::vector<float> y(static_cast<size_t>(2 * w.columns));
    const int64_t wrong = losa::gather_rows(w, ids, 2, y.data());
    if (wrong != (ids[1] >= 0 && ids[1] < w.rows ? -1 : 1)) fail(what + ": gather_rows takes a wrong id");
  }
  return true;
}

}  // namespace

void check_sizes() {
  Random random(3);
  int refused = 0;
  for (int type = 0; type < losa::kValueTypes; ++type) {
    for (Kind kind : {Kind::kSparse, Kind::kGated, Kind::kDense}) {
      if (kind == Kind::kDense && static_cast<ValueType>(type) == ValueType::kFp32) continue;
      const Example sound = make_example(static_cast<ValueType>(type), kind, 18, 35, 0.4, 32, 16, random);
      for (int part = 0; part < kPartCount; ++part) {
        const size_t size = sound.bytes[part].size();
        Example e = sound;
        const auto accepted = [&] {
          const Stored stored(e);
          losa::Weight w{};
          std::string error;
          return losa::validate(stored.parts(), &w, &error);
        };
        for (size_t left = 0; left < size; ++left, ++refused) {
          e.bytes[part].resize(left);
          if (accepted()) return fail(describe(e) + ": accepted with " + std::to_string(left) + " bytes of " + kPartNames[part]);
        }
        if (size == 0) continue;
        e.bytes[part] = sound.bytes[part];
        e.absent[part] = true;
        if (accepted()) return fail(describe(e) + ": accepted with null for " + kPartNames[part]);
        e.absent[part] = false;
        if (!accepted()) return fail(describe(e) + ": refused with all its bytes");
        e.bytes[part].resize(size + 1);
        // Values may be followed by anything.
        if (accepted() != (part == kValues)) return fail(describe(e) + ": one byte more of " + kPartNames[part]);
      }
    }
  }
  std::printf("sizes: %d truncations refused\n", refused);
}

void fuzz(const Rows& rows, uint64_t seed, int64_t first, int64_t count) {
  report_deaths();
  int64_t accepted = 0;
  for (int64_t number = first; number < first + count; ++number) {
    Random random(seed * 0x100000001b3u + static_cast<uint64_t>(number));
    accepted += run_case(rows, "fuzz " + std::to_string(seed) + " " + std::to_string(number), random) ? 1 : 0;
  }
  std::printf("fuzz: %d of %d broken weights accepted and run\n", static_cast<int>(accepted), static_cast<int>(count));
}

}  // namespace test
