// How fast this machine reads memory: what every product of one token is measured against.
#pragma once
#include <cstddef>

namespace losa {

/// Bytes a second, all threads together, each reading `bytes_each` of its own; the best of `repeats` passes.
double read_bandwidth(size_t threads, size_t bytes_each, size_t repeats);

}  // namespace losa
