// Work in stages, each of which needs what the one before has made, on threads that are called once.
//
// Calling a session's threads costs about as long as a small task. Between two stages the threads therefore wait for
// each other without leaving: each goes through all stages in order, takes tasks that nobody has taken, and whoever ends
// the last task of a stage opens the next. A thread waits only for tasks that others have begun, so
// any number of threads will do, one of them too.
#pragma once
#include <cstddef>

#include "losa/parallel.h"

namespace losa {

class Stages {
 public:
  /// `begin` (may be null) runs by itself when all stages before are done; then task(argument, 0 .. tasks-1), in any
  /// order, possibly at once. A stage has at least one task, and there are at most kMost stages.
  void add(size_t tasks, void (*task)(void* argument, size_t index), void* argument,
           void (*begin)(void* argument) = nullptr) {
    stages_[count_++] = {tasks, task, begin, argument};
  }

  /// Returns when all is done. What `add` was given must live as long.
  void run(const Parallel& parallel) const;

  static constexpr size_t kMost = 8;

 private:
  struct Stage {
    size_t tasks;
    void (*task)(void* argument, size_t index);
    void (*begin)(void* argument);
    void* argument;
  };
  class Run;

  Stage stages_[kMost];
  size_t count_ = 0;
};

}  // namespace losa
