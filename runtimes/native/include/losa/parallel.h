// Threads that a caller lends.
#pragma once
#include <cstddef>

namespace losa {

/// Runs task(argument, 0 .. count-1), in any order, possibly at once, and returns when all are done.
struct Parallel {
  void (*run)(void* context, size_t count, void (*task)(void* argument, size_t index), void* argument);
  void* context;

  /// The same; a single task is run at once.
  void each(size_t count, void (*task)(void* argument, size_t index), void* argument) const {
    if (count == 1)
      task(argument, 0);
    else
      run(context, count, task, argument);
  }
};

}  // namespace losa
