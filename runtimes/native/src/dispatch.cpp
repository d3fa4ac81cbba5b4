// Which kernels run: the ordered table, the CPU's answer, and LOSA_KERNEL.
#include <cstdlib>
#include <cstring>

#include "losa/kernel_table.h"

namespace losa {
namespace {

const KernelRow* const kRows[] = {
#ifdef LOSA_X86
    &kAvx512Row,
    &kAvx2Row,
#endif
    &kScalarRow,
};

std::string names(bool only_supported) {
  std::string list;
  for (const KernelRow* row : kRows) {
    if (only_supported && !row->supported()) continue;
    if (!list.empty()) list += ", ";
    list += row->name;
  }
  return list;
}

}  // namespace

KernelTable kernel_table() { return {kRows, sizeof kRows / sizeof *kRows}; }

const KernelRow* select_row(const char* name, std::string* error) {
  const bool any = name == nullptr || *name == '\0';
  for (const KernelRow* row : kRows) {
    if (any ? row->supported() : std::strcmp(row->name, name) == 0) {
      if (row->supported()) return row;
      *error = std::string("kernel row '") + name + "' needs instructions that this CPU lacks; it runs: " +
               names(true);
      return nullptr;
    }
  }
  *error = std::string("no kernel row is called '") + name + "'; this build has: " + names(false);
  return nullptr;
}

const KernelRow* select_row_from_environment(std::string* error) {
  const char* name = std::getenv("LOSA_KERNEL");
  const KernelRow* row = select_row(name, error);
  if (row == nullptr) *error = "LOSA_KERNEL: " + *error + " (unset LOSA_KERNEL to choose the best)";
  return row;
}

}  // namespace losa
