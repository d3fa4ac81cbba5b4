// The C interface behind losa_export/runtimes/native.py: plain pointers in, an error code and text out.
#include <cstdio>
#include <exception>
#include <string>
#include <thread>
#include <vector>

#include "losa/attention.h"
#include "losa/bandwidth.h"
#include "losa/export.h"
#include "losa/large_pages.h"
#include "losa/matmul.h"
#include "losa/validate.h"

#ifndef LOSA_VERSION
#define LOSA_VERSION "0"
#endif

namespace {

// Read by native.py; keep the two in step.
enum Code : int { kOk = 0, kFormatError = 1, kKernelError = 2, kOutOfMemory = 3 };

int report(Code code, const std::string& message, char* error, size_t capacity) {
  if (capacity != 0) std::snprintf(error, capacity, "%s", message.c_str());
  return code;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    result += static_cast<unsigned char>(c) < 0x20 ? '?' : c;
  }
  return result + '"';
}

std::string description() {
  std::string error;
  const losa::KernelRow* row = losa::select_row_from_environment(&error);
  std::string available, compiled;
  const losa::KernelTable table = losa::kernel_table();
  for (size_t i = 0; i < table.count; ++i) {
    const std::string name = quoted(table.rows[i].name);
    compiled += (compiled.empty() ? "" : ", ") + name;
    if (table.rows[i].supported()) available += (available.empty() ? "" : ", ") + name;
  }
  return "{\"version\": " + quoted(LOSA_VERSION) + ", \"row\": " + (row ? quoted(row->name) : "null") +
         ", \"error\": " + (row ? "null" : quoted(error)) + ", \"compiled_rows\": [" + compiled +
         "], \"available_rows\": [" + available +
         "], \"large_pages\": " + (losa::large_pages_wanted() ? "true" : "false") + "}";
}

/// The row of that name; of null, LOSA_KERNEL's or the best.
const losa::KernelRow* row_called(const char* name, std::string* error) {
  return name != nullptr ? losa::select_row(name, error) : losa::select_row_from_environment(error);
}

/// Hands indices out to `threads` threads made for this call: for tests and small tools; ONNX Runtime
/// brings a pool of its own.
void run_on_threads(void* context, size_t count, void (*task)(void*, size_t), void* argument) {
  const size_t threads = *static_cast<const size_t*>(context);
  std::vector<std::thread> workers;
  const auto work = [=](size_t start) {
    for (size_t i = start; i < count; i += threads) task(argument, i);
  };
  for (size_t i = 1; i < threads && i < count; ++i) workers.emplace_back(work, i);
  work(0);
  for (std::thread& worker : workers) worker.join();
}

}  // namespace

extern "C" {

/// JSON with version, chosen row (or null and error), compiled and available rows. Writes at most
/// `capacity` bytes with a final zero; returns the length of the whole text.
LOSA_EXPORT size_t losa_describe(char* text, size_t capacity) {
  try {
    const std::string json = description();
    if (capacity != 0) std::snprintf(text, capacity, "%s", json.c_str());
    return json.size();
  } catch (const std::exception&) {
    return 0;
  }
}

LOSA_EXPORT int losa_validate(const losa::WeightParts* parts, char* error, size_t error_capacity) {
  try {
    std::string message;
    losa::Weight weight{};
    if (losa::validate(*parts, &weight, &message)) return kOk;
    return report(kFormatError, message, error, error_capacity);
  } catch (const std::exception& caught) {
    return report(kOutOfMemory, caught.what(), error, error_capacity);
  }
}

/// y (tokens, rows) as multiply() says. `row` may be null: LOSA_KERNEL, or the best.
LOSA_EXPORT int losa_matmul(const char* row, const losa::WeightParts* parts, const float* x, int64_t tokens,
                            float* y, size_t threads, char* error, size_t error_capacity) {
  try {
    std::string message;
    const losa::KernelRow* chosen = row_called(row, &message);
    if (chosen == nullptr) return report(kKernelError, message, error, error_capacity);
    losa::Weight weight{};
    if (!losa::validate(*parts, &weight, &message)) return report(kFormatError, message, error, error_capacity);
    if (!losa::multiply(*chosen, weight, x, tokens, y, {run_on_threads, &threads}))
      return report(kOutOfMemory, "out of memory for activations", error, error_capacity);
    return kOk;
  } catch (const std::exception& caught) {
    return report(kOutOfMemory, caught.what(), error, error_capacity);
  }
}

/// normed and sums (tokens, columns) as norm.h says.
LOSA_EXPORT void losa_skip_norm(const float* x, int64_t tokens, int64_t columns, const float* skip,
                                const float* gamma, float epsilon, float* sums, float* normed) {
  losa::skip_norm(x, tokens, columns, {skip, gamma, epsilon, sums}, normed);
}

/// As attend() says; `row` as in losa_matmul. Arrays must have the sizes that `attention` names.
LOSA_EXPORT int losa_attention(const char* row, const losa::Attention* attention, size_t threads, char* error,
                               size_t error_capacity) {
  try {
    std::string message;
    const losa::KernelRow* chosen = row_called(row, &message);
    if (chosen == nullptr) return report(kKernelError, message, error, error_capacity);
    if (!losa::check(*attention, &message)) return report(kFormatError, message, error, error_capacity);
    if (!losa::attend(*chosen, *attention, {run_on_threads, &threads}))
      return report(kOutOfMemory, "out of memory for scores", error, error_capacity);
    return kOk;
  } catch (const std::exception& caught) {
    return report(kOutOfMemory, caught.what(), error, error_capacity);
  }
}

/// y (count, columns) as gather_rows() says; the weight must be dense.
LOSA_EXPORT int losa_embedding(const losa::WeightParts* parts, const int64_t* ids, int64_t count, float* y,
                               char* error, size_t error_capacity) {
  try {
    std::string message;
    losa::Weight weight{};
    if (!parts->dense) return report(kFormatError, "an embedding is a dense weight", error, error_capacity);
    if (!losa::validate(*parts, &weight, &message)) return report(kFormatError, message, error, error_capacity);
    const int64_t wrong = losa::gather_rows(weight, ids, count, y);
    if (wrong < 0) return kOk;
    return report(kFormatError,
                  "id " + std::to_string(ids[wrong]) + " is not in [0, " + std::to_string(weight.rows) + ")", error,
                  error_capacity);
  } catch (const std::exception& caught) {
    return report(kOutOfMemory, caught.what(), error, error_capacity);
  }
}

/// Bytes a second that `threads` threads read from `bytes_each` bytes of memory each, best of `repeats`
/// passes over them; 0 if there is not as much memory.
LOSA_EXPORT double losa_read_bandwidth(size_t threads, size_t bytes_each, size_t repeats) {
  try {
    return losa::read_bandwidth(threads, bytes_each, repeats);
  } catch (const std::exception&) {
    return 0;
  }
}

}  // extern "C"
