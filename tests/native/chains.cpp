// Two products in one call of the threads against one after the other, and weights in large pages.
#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "harness.h"
#include "losa/large_pages.h"

namespace test {
namespace {

losa::Weight weight_of(const Stored& stored) {
  losa::Weight w{};
  std::string error;
  if (!losa::validate(stored.parts(), &w, &error)) fail("chains: refused: " + error);
  return w;
}

void check_mlp(const Rows& rows) {
  constexpr int64_t kWidth = 37, kHidden = 50;
  Random random(13);
  for (int type = 0; type < losa::kValueTypes; ++type) {
    const ValueType value_type = static_cast<ValueType>(type);
    const Example inner = make_example(value_type, Kind::kGated, kHidden, kWidth, 0.4, 32, 8, random);
    const Example outer = make_example(value_type, Kind::kSparse, kWidth, kHidden, 0.4, 64, 16, random);
    const Stored stored_inner(inner), stored_outer(outer);
    const losa::Weight gate_up = weight_of(stored_inner), down = weight_of(stored_outer);
    for (int64_t tokens : {0, 1, 7, 40, 129, 300}) {
      const auto numbers = [&](int64_t count) {
        std::vector<float> made(static_cast<size_t>(count));
        for (float& number : made) number = static_cast<float>(2 * random.unit() - 1);
        return made;
      };
      const std::vector<float> x = numbers(tokens * kWidth), skip = numbers(tokens * kWidth), gamma = numbers(kWidth);
      std::vector<float> sums(x.size()), normed(x.size());
      const losa::SkipNorm norm{skip.data(), gamma.data(), 1e-5f, sums.data()};
      losa::skip_norm(x.data(), tokens, kWidth, norm, normed.data());
      for (const losa::KernelRow* row : rows) {
        const std::vector<float> expected = product(*row, down, product(*row, gate_up, normed, tokens), tokens);
        for (const losa::Parallel* parallel : {&kSerial, &kTwoThreads}) {
          std::vector<float> y(x.size(), NAN);
          if (!losa::mlp(*row, gate_up, down, x.data(), tokens, y.data(), *parallel, norm)) fail("out of memory");
          if (!same_floats(y, expected))
            fail(std::string(row->name) + " " + describe(inner) + " M=" + std::to_string(tokens) +
                 ": an MLP is not its two products");
        }
      }
    }
  }
}

/// Whether `data` still holds `count` numbers from `first` on.
bool holds(const char* data, size_t count, int first) {
  for (size_t i = 0; i < count; ++i)
    if (data[i] != static_cast<char>(first + static_cast<int>(i % 97))) return false;
  return true;
}

void fill(char* data, size_t count, int first) {
  for (size_t i = 0; i < count; ++i) data[i] = static_cast<char>(first + static_cast<int>(i % 97));
}

void check_large_pages() {
  constexpr size_t kBytes = 300'001;
  setenv("LOSA_LARGE_PAGES", "0", 1);
  if (losa::large_memory(kBytes) != nullptr) fail("large pages: given though they are turned off");
  unsetenv("LOSA_LARGE_PAGES");
  if (losa::large_pages_wanted()) {
    // Pieces are apart from each other, aligned, and live as long as a holder of any in their chunk.
    std::shared_ptr<char> first = losa::large_memory(kBytes), second = losa::large_memory(1);
    std::shared_ptr<char> large = losa::large_memory(size_t{70} << 20);
    if (first == nullptr || second == nullptr || large == nullptr) return fail("large pages: none, though offered");
    fill(first.get(), kBytes, 1);
    fill(second.get(), 1, 2);
    fill(large.get() + (size_t{70} << 20) - 10, 10, 3);
    for (const auto& piece : {first, second, large})
      if (reinterpret_cast<uintptr_t>(piece.get()) % 64 != 0) fail("large pages: not aligned");
    first.reset();
    if (!holds(second.get(), 1, 2)) fail("large pages: freed too early");
    if (losa::large_memory(~size_t{0} / 4) != nullptr) fail("large pages: more than there is");
  }
  // What is no file's is left alone; what is a file's reads the same again.
  std::vector<char> own(kBytes);
  fill(own.data(), kBytes, 5);
  losa::leave_to_file(own.data(), kBytes);
  if (!holds(own.data(), kBytes, 5)) fail("large pages: memory of no file was given up");
  char path[] = "/tmp/losa_pages_XXXXXX";
  const int file = mkstemp(path);
  if (file < 0 || write(file, own.data(), kBytes) != static_cast<ssize_t>(kBytes)) return fail("large pages: no file");
  unlink(path);
  void* mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) return fail("large pages: the file cannot be mapped");
  char* data = static_cast<char*>(mapped);
  if (!holds(data, kBytes, 5)) fail("large pages: the file was not written");
  losa::leave_to_file(data + 17, kBytes - 17);
  if (!holds(data, kBytes, 5)) fail("large pages: a file's memory reads differently");
  data[kBytes / 2] ^= 1;  // now it is no longer the file's
  losa::leave_to_file(data, kBytes);
  data[kBytes / 2] ^= 1;
  if (!holds(data, kBytes, 5)) fail("large pages: a changed page was given up");
  munmap(mapped, kBytes);
}

}  // namespace

void check_chains(const Rows& rows) {
  check_mlp(rows);
  check_large_pages();
}

}  // namespace test
