// Weights in large pages.
//
// A product of one token reads each weight once. From a mapped file it reads them through pages of 4 KiB: every 64 lines
// the processor looks up where the next one lies, and what it reads ahead ends with the page. From pages of 2 MiB a virtual
// machine with a Zen 4 read 28 GB/s on one thread in place of 20, and 40 in place of 33 on two.
#pragma once
#include <cstddef>
#include <memory>

namespace losa {

/// Whether the system hands out large pages to those who ask, and LOSA_LARGE_PAGES is not 0.
bool large_pages_wanted();

/// Memory in large pages, aligned to 64 bytes, that is freed with its last holder; null if the system has none, or would
/// have little left. Small pieces share pages.
std::shared_ptr<char> large_memory(size_t bytes);

/// Tells the system that nobody will soon read some memory whose contents are a file's: it is then no longer counted as
/// this process's. Memory that is not a file's stays as it is.
void leave_to_file(const void* data, size_t bytes);

}  // namespace losa
