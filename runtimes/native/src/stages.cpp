#include "losa/stages.h"

#include <atomic>
#include <cstdint>
#include <thread>

namespace losa {
namespace {

// Waits of a few nanoseconds before a thread offers its processor to others: more threads than processors may be at it.
constexpr int kPauses = 2000;
// Runs of neighbouring tasks that a stage is handed out in: a bit each.
constexpr size_t kMostRuns = 64;

void pause() {
#if defined(LOSA_X86)
  __builtin_ia32_pause();
#elif defined(LOSA_ARM)
  asm volatile("yield");
#endif
}

uint64_t lowest(size_t bits) { return bits == 64 ? ~uint64_t{0} : (uint64_t{1} << bits) - 1; }

}  // namespace

class Stages::Run {
 public:
  Run(const Stages& all, size_t workers) : all_(all), workers_(workers) {
    for (size_t s = 0; s < all.count_; ++s) {
      const size_t tasks = all.stages_[s].tasks;
      Shares& shares = shares_[s];
      shares.tasks_of_run = (tasks + kMostRuns - 1) / kMostRuns;
      shares.runs = (tasks + shares.tasks_of_run - 1) / shares.tasks_of_run;
      shares.free.store(lowest(shares.runs), std::memory_order_relaxed);
      shares.left.store(shares.runs, std::memory_order_relaxed);
    }
    open(0);
  }

  /// Goes through all stages, taking runs until none is free. A worker begins each stage at its own place in it, as far
  /// along as `index` is among the workers, so that what it reads from memory lies together.
  void work(size_t index) {
    for (size_t s = 0; s < all_.count_; ++s) {
      Shares& shares = shares_[s];
      size_t run = index * shares.runs / workers_;
      while (take(&shares, &run)) {
        wait_for(s);
        const Stage& stage = all_.stages_[s];
        const size_t first = run * shares.tasks_of_run, end = first + shares.tasks_of_run;
        for (size_t task = first; task < end && task < stage.tasks; ++task) stage.task(stage.argument, task);
        // Release what these tasks have made to whoever ends the stage, who hands it on by opening the next.
        if (shares.left.fetch_sub(1, std::memory_order_acq_rel) == 1 && s + 1 < all_.count_) open(s + 1);
      }
    }
  }

 private:
  struct Shares {
    size_t tasks_of_run, runs;
    std::atomic<uint64_t> free;  // bit r: nobody has taken run r
    std::atomic<size_t> left;    // runs that are not done
  };

  /// The free run at `*run` or next behind it, from the first again after the last; false if none is free.
  static bool take(Shares* shares, size_t* run) {
    uint64_t free = shares->free.load(std::memory_order_relaxed);
    while (free != 0) {
      const uint64_t behind = free & ~lowest(*run);
      const int next = __builtin_ctzll(behind != 0 ? behind : free);
      if (!shares->free.compare_exchange_weak(free, free & ~(uint64_t{1} << next), std::memory_order_relaxed)) continue;
      *run = static_cast<size_t>(next);
      return true;
    }
    return false;
  }

  void open(size_t stage) {
    if (all_.stages_[stage].begin != nullptr) all_.stages_[stage].begin(all_.stages_[stage].argument);
    open_.store(stage + 1, std::memory_order_release);
  }

  void wait_for(size_t stage) const {
    for (int i = 0; open_.load(std::memory_order_acquire) <= stage; ++i) {
      if (i < kPauses)
        pause();
      else
        std::this_thread::yield();
    }
  }

  const Stages& all_;
  const size_t workers_;
  std::atomic<size_t> open_{0};  // stages whose tasks may run
  Shares shares_[kMost];
};

void Stages::run(const Parallel& parallel) const {
  size_t most = 0;
  for (size_t s = 0; s < count_; ++s) most = stages_[s].tasks > most ? stages_[s].tasks : most;
  if (count_ == 1) {
    if (stages_[0].begin != nullptr) stages_[0].begin(stages_[0].argument);
    return parallel.each(most, stages_[0].task, stages_[0].argument);
  }
  if (count_ == 0) return;
  Run run(*this, most);
  parallel.each(most, [](void* self, size_t index) { static_cast<Run*>(self)->work(index); }, &run);
}

}  // namespace losa
