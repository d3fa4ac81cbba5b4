// Weights and norms among the inputs and attributes of an operator.
#pragma once
#include <memory>
#include <string>
#include <vector>

#include "losa/norm.h"
#include "losa/ort_tools.h"
#include "losa/validate.h"

namespace losa::ort {

/// One input of an operator.
struct Input {
  std::string name;
  int type;  // an ElementType
  bool optional = false;
};

/// A weight that an operator has. Names of its inputs and attributes begin with `prefix`; its inputs follow each other.
struct WeightPlace {
  std::string prefix;
  ValueType type;
  bool gated, dense;
  bool by_row = false;  // only some rows of it are read at a time
  size_t first = 0;     // of its inputs
};

/// Appends a weight's inputs, and says in `place` where they stand.
void add_weight(WeightPlace* place, std::vector<Input>* inputs);
/// Reads and validates a weight; it lives as long as the session and `memory`, in which it may lie.
Status* read_weight(const Calls& calls, const KernelInfo* info, const std::string& where,
                    const std::vector<Input>& inputs, const WeightPlace& place, Weight* weight,
                    std::shared_ptr<char>* memory);

/// The sum and norm with which an operator begins: inputs X, skip and gamma, attribute epsilon, second output sum.
struct Norm {
  static constexpr size_t kSkip = 1, kGamma = 2;  // inputs
  static constexpr size_t kSum = 1;               // output

  std::vector<float> gamma;  // empty: no norm
  float epsilon = 0;

  Status* read(const Calls& calls, const KernelInfo* info, const std::string& where,
               const std::vector<Input>& inputs, int64_t columns);
  /// What a call adds to X and where the sums go; `dims` are those of X.
  Status* open(const Calls& calls, KernelContext* context, const std::string& where, const std::vector<int64_t>& dims,
               SkipNorm* norm) const;
};

/// "Fp32" and so on, with which names of operators end.
const char* type_name(ValueType type);

}  // namespace losa::ort
