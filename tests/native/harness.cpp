// Runs the kernels over everything that a weight may be and must not be. Built with sanitizers by
// tests/runtimes/test_native_sanitized.py, from all .cpp files of this folder.
//
//   harness                             both parts, none of them in full
//   harness rows [quick] [PART PARTS]   every kernel row over odd shapes
//   harness fuzz [SEED [FIRST [COUNT]]] broken weights; SEED and FIRST with a COUNT of 1 repeat one case
//
// Each buffer is exactly as long as its contract says, and starts at an odd address where no alignment is
// promised, so that a read or write past an end is seen. Rows of AVX-512 are compiled over emulated
// instructions (emulated/immintrin.h), so they run whatever the processor.
#include "harness.h"

#include <cstdlib>
#include <thread>

namespace test {
namespace {

int failures = 0;

void serial(void*, size_t count, void (*task)(void*, size_t), void* argument) {
  for (size_t i = count; i-- > 0;) task(argument, i);
}

void two_threads(void*, size_t count, void (*task)(void*, size_t), void* argument) {
  const auto work = [=](size_t start) {
    for (size_t i = start; i < count; i += 2) task(argument, i);
  };
  std::thread other(work, 1);
  work(0);
  other.join();
}

}  // namespace

const losa::Parallel kSerial = {serial, nullptr};
const losa::Parallel kTwoThreads = {two_threads, nullptr};

void fail(const std::string& message) {
  if (++failures <= 20) std::printf("FAIL %s\n", message.c_str());
  std::fflush(stdout);
}

std::vector<float> product(const losa::KernelRow& row, const losa::Weight& w, const std::vector<float>& x,
                           int64_t tokens, const losa::Parallel& parallel) {
  const Buffer exact(x.data(), x.size() * sizeof(float), sizeof(float));
  std::vector<float> y(static_cast<size_t>(tokens * w.outputs), NAN);
  y.shrink_to_fit();
  if (!losa::multiply(row, w, reinterpret_cast<const float*>(exact.data()), tokens, y.data(), parallel))
    fail("out of memory");
  return y;
}

bool same_floats(const std::vector<float>& a, const std::vector<float>& b) {
  if (a.size() != b.size()) return false;
  for (size_t i = 0; i < a.size(); ++i)
    if (bits_of_float(a[i]) != bits_of_float(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

std::string describe(const Example& e) {
  static constexpr const char* kTypes[] = {"fp32", "bf16", "int8", "int4"};
  std::string text = e.type() >= ValueType::kFp32 && e.type() <= ValueType::kInt4 ? kTypes[e.header.type] : "?";
  text += e.header.dense ? " dense" : e.header.gated ? " gated" : " sparse";
  text += " N=" + std::to_string(e.header.rows) + " K=" + std::to_string(e.header.columns);
  if (quantised(e.type()))
    text += " group=" + std::to_string(e.header.group) + " bits=" + std::to_string(e.header.activation_bits);
  return text;
}

}  // namespace test

int main(int count, char** arguments) {
  std::vector<std::string> words(arguments + 1, arguments + count);
  const auto take = [&](const char* word) {
    if (words.empty() || words[0] != word) return false;
    words.erase(words.begin());
    return true;
  };
  const auto number = [&](size_t index, int64_t otherwise) {
    return words.size() > index ? std::strtoll(words[index].c_str(), nullptr, 0) : otherwise;
  };
  test::Rows rows;
  const losa::KernelTable table = losa::kernel_table();
  for (size_t i = 0; i < table.count; ++i) {
    const losa::KernelRow* row = &table.rows[i];
    const bool emulated = std::string(row->name).rfind("avx512", 0) == 0;
    if (emulated || row->supported())
      rows.push_back(row);
    else
      std::printf("row %s: skipped, this CPU lacks it\n", row->name);
  }
  const bool all = words.empty();
  if (all || take("rows")) {
    const bool quick = all || take("quick");
    test::check_rounding(rows);
    test::check_gathering();
    test::check_norms(rows);
    test::check_attention(rows);
    test::check_chains(rows);
    test::check_sizes();
    test::check_wide_products(rows);
    test::check_products(rows, quick, number(0, 0), number(1, 1));
  }
  if (all || take("fuzz")) test::fuzz(rows, static_cast<uint64_t>(number(0, 1)), number(1, 0), number(2, 1000));
  std::printf(test::failures == 0 ? "ok\n" : "%d failures\n", test::failures);
  return test::failures == 0 ? 0 : 1;
}
