// Which kernels run: the ordered table, the CPU's answer, and LOSA_KERNEL.
#include <cstdlib>
#include <cstring>

#include "losa/kernel_table.h"

namespace losa {
namespace {

const KernelRow* const kRows[] = {
#ifdef LOSA_X86
    &kAvx512VnniRow,
    &kAvx512Row,
    &kAvx2Row,
#endif
#ifdef LOSA_ARM
    &kNeonI8mmRow,
    &kNeonDotprodRow,
    &kNeonRow,
#endif
    &kScalarRow,
};
constexpr size_t kCount = sizeof kRows / sizeof *kRows;

/// kRows with every missing part taken from the rows behind. Integer kernels of all rows agree bit for bit,
/// and float ones may differ in the last bits only between value types, so parts can be mixed.
struct CompleteRows {
  KernelRow rows[kCount];
  CompleteRows() {
    for (size_t i = 0; i < kCount; ++i) {
      rows[i] = *kRows[i];
      for (size_t j = i + 1; j < kCount; ++j) {
        const KernelRow& behind = *kRows[j];
        if (!behind.supported()) continue;
        if (rows[i].fp32.decode == nullptr) rows[i].fp32 = behind.fp32;
        if (rows[i].bf16.decode == nullptr) rows[i].bf16 = behind.bf16;
        if (rows[i].int8.decode == nullptr) rows[i].int8 = behind.int8;
        if (rows[i].int4.decode == nullptr) rows[i].int4 = behind.int4;
        if (rows[i].round == nullptr) rows[i].round = behind.round;
        if (rows[i].gate == nullptr) rows[i].gate = behind.gate;
        if (rows[i].attend == nullptr) rows[i].attend = behind.attend;
      }
    }
  }
};

const KernelRow* complete_rows() {
  static const CompleteRows complete;
  return complete.rows;
}

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

KernelTable kernel_table() { return {complete_rows(), kCount}; }

const KernelRow* select_row(const char* name, std::string* error) {
  const bool any = name == nullptr || *name == '\0';
  for (size_t i = 0; i < kCount; ++i) {
    const KernelRow& row = *kRows[i];
    if (any ? row.supported() : std::strcmp(row.name, name) == 0) {
      if (row.supported()) return &complete_rows()[i];
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
