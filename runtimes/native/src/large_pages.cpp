#include "losa/large_pages.h"

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>
#include <vector>

namespace losa {
namespace {

constexpr size_t kLargePage = size_t{2} << 20;
constexpr size_t kChunk = 32 * kLargePage;  // of addresses: pages that are never touched cost nothing
constexpr size_t kAlignment = 64;

size_t up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

/// The first line of a file that begins with `start`, behind it; empty if there is none.
std::string line_of(const char* path, const char* start) {
  std::string found;
  if (std::FILE* file = std::fopen(path, "r")) {
    char line[256];
    while (found.empty() && std::fgets(line, sizeof line, file) != nullptr)
      if (std::strncmp(line, start, std::strlen(start)) == 0) found = line + std::strlen(start);
    std::fclose(file);
  }
  return found;
}

/// Bytes that this process may still take without driving others out: of the machine, and of its control group.
size_t available_memory() {
  const auto number = [](const std::string& text) { return std::strtoull(text.c_str(), nullptr, 10); };
  size_t available = number(line_of("/proc/meminfo", "MemAvailable:")) * 1024;
  std::string group = line_of("/proc/self/cgroup", "0::");  // version 2; elsewhere the machine alone counts
  if (!group.empty() && group.back() == '\n') group.pop_back();
  const std::string folder = "/sys/fs/cgroup" + group;
  const std::string most = line_of((folder + "/memory.max").c_str(), "");
  if (most.empty() || most.compare(0, 3, "max") == 0) return available;
  const size_t limit = number(most), used = number(line_of((folder + "/memory.current").c_str(), ""));
  return std::min(available, limit > used ? limit - used : 0);
}

struct Chunk {
  char* memory;
  size_t size, used = 0;

  Chunk(char* memory, size_t size) : memory(memory), size(size) {}
  Chunk(const Chunk&) = delete;
  Chunk& operator=(const Chunk&) = delete;
  ~Chunk() { munmap(memory, size); }
};

std::shared_ptr<Chunk> make_chunk(size_t size) {
  void* mapped = mmap(nullptr, size + kLargePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* from = static_cast<char*>(mapped);
  const size_t before = up(reinterpret_cast<uintptr_t>(from), kLargePage) - reinterpret_cast<uintptr_t>(from);
  if (before != 0) munmap(from, before);
  munmap(from + before + size, kLargePage - before);
  auto chunk = std::make_shared<Chunk>(from + before, size);
  return madvise(chunk->memory, size, MADV_HUGEPAGE) == 0 ? chunk : nullptr;
}

}  // namespace

bool large_pages_wanted() {
  static const bool offered = [] {
    const std::string modes = line_of("/sys/kernel/mm/transparent_hugepage/enabled", "");
    return !modes.empty() && modes.find("[never]") == std::string::npos;
  }();
  const char* asked = std::getenv("LOSA_LARGE_PAGES");
  return offered && (asked == nullptr || std::strcmp(asked, "0") != 0);
}

std::shared_ptr<char> large_memory(size_t bytes) {
  static std::mutex mutex;
  static std::weak_ptr<Chunk> newest;
  // At most half of what there is, so that the file may stay cached and others live.
  if (!large_pages_wanted() || available_memory() / 2 < bytes) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<Chunk> chunk = newest.lock();
  if (chunk == nullptr || chunk->size - chunk->used < bytes) {
    chunk = make_chunk(std::max(up(bytes, kLargePage), kChunk));
    if (chunk == nullptr) return nullptr;
    newest = chunk;
  }
  char* memory = chunk->memory + chunk->used;
  chunk->used = std::min(up(chunk->used + bytes, kAlignment), chunk->size);
  return {chunk, memory};
}

void leave_to_file(const void* data, size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = up(reinterpret_cast<uintptr_t>(data), page);
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / page * page;
  if (end <= first) return;
  // Of each page one number: bit 63 says that it is in memory, bit 61 that its contents are a file's, unchanged.
  std::vector<uint64_t> pages((end - first) / page);
  const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (map < 0) return;
  const ssize_t wanted = static_cast<ssize_t>(pages.size() * sizeof(uint64_t));
  const ssize_t got = pread(map, pages.data(), static_cast<size_t>(wanted),
                            static_cast<off_t>(first / page * sizeof(uint64_t)));
  close(map);
  const auto others = [](uint64_t entry) { return (entry >> 63 & 1) == 0 || (entry >> 61 & 1) == 0; };
  if (got != wanted || std::any_of(pages.begin(), pages.end(), others)) return;
  madvise(reinterpret_cast<void*>(first), end - first, MADV_DONTNEED);
}

}  // namespace losa

#else

namespace losa {

bool large_pages_wanted() { return false; }
std::shared_ptr<char> large_memory(size_t) { return nullptr; }
void leave_to_file(const void*, size_t) {}

}  // namespace losa
#endif
