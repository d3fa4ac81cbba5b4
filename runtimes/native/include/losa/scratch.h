// Memory of the calling thread.
#pragma once
#include <cstdint>
#include <cstdlib>

namespace losa {

/// Memory of the calling thread that grows to the largest use seen, freed with the thread.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  /// Aligned to 64 bytes, of any content; null if there is none.
  void* reserve(int64_t bytes) {
    const size_t wanted = (static_cast<size_t>(bytes) + 63) / 64 * 64;
    if (wanted > capacity_) {
      std::free(data_);
      data_ = std::aligned_alloc(64, wanted);
      capacity_ = data_ == nullptr ? 0 : wanted;
    }
    return data_;
  }

 private:
  void* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace losa
