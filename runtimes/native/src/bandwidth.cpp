#include "losa/bandwidth.h"

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "losa/large_pages.h"

namespace losa {
namespace {

/// Sums a buffer up in independent parts, a cache line a step, with the line's page ahead asked for.
uint64_t read_all(const uint64_t* words, size_t count) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 8 <= count; i += 8) {
    __builtin_prefetch(reinterpret_cast<const char*>(words + i) + 2048);
    for (size_t j = 0; j < 8; ++j) sums[j] += words[i + j];
  }
  uint64_t total = 0;
  for (uint64_t sum : sums) total += sum;
  return total;
}

}  // namespace

double read_bandwidth(size_t threads, size_t bytes_each, size_t repeats) {
  using Clock = std::chrono::steady_clock;
  const size_t count = bytes_each / sizeof(uint64_t);
  std::atomic<size_t> ready{0}, done{0};
  std::atomic<size_t> pass{0};
  std::atomic<uint64_t> sink{0};
  // In large pages, as weights are where there are such.
  std::vector<std::shared_ptr<void>> buffers;
  for (size_t i = 0; i < threads; ++i) {
    buffers.push_back(large_memory(count * sizeof(uint64_t)));
    if (buffers.back() == nullptr) buffers.back().reset(new uint64_t[count], std::default_delete<uint64_t[]>());
  }
  const auto work = [&](uint64_t* words) {
    std::memset(words, 1, count * sizeof(uint64_t));  // by the thread that reads: its memory is near it
    ++ready;
    for (size_t next = 1; next <= repeats; ++next) {
      while (pass.load(std::memory_order_acquire) < next) {}
      sink += read_all(words, count);
      ++done;
    }
  };
  std::vector<std::thread> workers;
  for (size_t i = 0; i < threads; ++i) workers.emplace_back(work, static_cast<uint64_t*>(buffers[i].get()));
  while (ready.load() < threads) std::this_thread::yield();
  double best = 0;
  for (size_t next = 1; next <= repeats; ++next) {
    const Clock::time_point start = Clock::now();
    pass.store(next, std::memory_order_release);
    // Asleep meanwhile, since all processors have a thread that reads.
    while (done.load() < next * threads) std::this_thread::sleep_for(std::chrono::microseconds(50));
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    const double rate = static_cast<double>(threads * count * sizeof(uint64_t)) / seconds;
    best = rate > best ? rate : best;
  }
  for (std::thread& worker : workers) worker.join();
  return best;
}

}  // namespace losa
