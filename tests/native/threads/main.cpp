// Stages on several threads, built with ThreadSanitizer by tests/runtimes/test_native_sanitized.py: every task runs once,
// when all of the stage before are done, and sees what they and the stage's beginning have written.
#include <cstdio>
#include <thread>
#include <vector>

#include "losa/stages.h"

namespace {

int failures = 0;

/// Stage s fills its numbers from those of stage s - 1. They are plain: only Stages keeps threads out of each other's way.
struct Chain {
  struct Link {
    Chain* chain;
    size_t stage;
  };
  std::vector<std::vector<long>> numbers;  // [stage][task]
  std::vector<long> sums;                  // of the stage before, added up when a stage begins
  std::vector<Link> links;

  explicit Chain(const std::vector<size_t>& tasks) : sums(tasks.size()) {
    for (size_t s = 0; s < tasks.size(); ++s) {
      numbers.emplace_back(tasks[s]);
      links.push_back({this, s});
    }
  }
  static void begin(void* argument) {
    const Link& link = *static_cast<Link*>(argument);
    long& sum = link.chain->sums[link.stage];
    sum = 1;
    if (link.stage > 0)
      for (long number : link.chain->numbers[link.stage - 1]) sum += number;
  }
  static void task(void* argument, size_t index) {
    const Link& link = *static_cast<Link*>(argument);
    link.chain->numbers[link.stage][index] += link.chain->sums[link.stage] % 1000 + static_cast<long>(index);
  }
};

void on_threads(void* context, size_t count, void (*task)(void*, size_t), void* argument) {
  const size_t threads = *static_cast<size_t*>(context);
  std::vector<std::thread> workers;
  for (size_t t = 0; t < threads; ++t)
    workers.emplace_back([=] {
      for (size_t i = t * count / threads; i < (t + 1) * count / threads; ++i) task(argument, i);
    });
  for (std::thread& worker : workers) worker.join();
}

std::vector<std::vector<long>> run(const std::vector<size_t>& tasks, size_t threads) {
  Chain chain(tasks);
  losa::Stages stages;
  for (size_t s = 0; s < tasks.size(); ++s) stages.add(tasks[s], Chain::task, &chain.links[s], Chain::begin);
  stages.run({on_threads, &threads});
  return chain.numbers;
}

}  // namespace

int main() {
  const std::vector<std::vector<size_t>> cases = {{1},      {7},          {200},     {1, 1},       {1, 9, 1},
                                                  {36, 18}, {63, 64, 65}, {2, 1000}, {1000, 3, 5}, {4, 4, 4, 4, 4, 4, 4, 4}};
  for (const auto& tasks : cases) {
    const auto expected = run(tasks, 1);
    for (size_t threads : {2, 3, 8})
      for (int repeat = 0; repeat < 20; ++repeat)
        if (run(tasks, threads) != expected) ++failures;
  }
  std::printf(failures == 0 ? "ok\n" : "%d failures\n", failures);
  return failures == 0 ? 0 : 1;
}
