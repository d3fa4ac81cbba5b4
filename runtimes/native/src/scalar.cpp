// The definition: one multiply-add per kept weight, in the order the values are stored.
#include <cmath>

#include "losa/kernel_table.h"
#include "losa/numbers.h"

namespace losa {
namespace {

bool always() { return true; }

/// Walks a block's positions in stored order and gives the values that are there.
class Reader {
 public:
  Reader(const Weight& w, int64_t block) : w_(w), mask_(w.block_masks(block)), values_(w.block_values(block)) {}

  /// Whether position `position` of the current step is kept.
  bool kept(int64_t position) const {
    return mask_ == nullptr || (mask_[position / 8] >> (position % 8) & 1) != 0;
  }

  /// The next kept value: a number, or a level that its scale is yet to multiply.
  float next() {
    const int64_t index = next_++;
    switch (w_.type) {
      case ValueType::kFp32: return load_at<float>(values_, index);
      case ValueType::kBf16: return from_bf16(load_at<uint16_t>(values_, index));
      case ValueType::kInt8: return static_cast<float>(static_cast<int8_t>(values_[index]));
      default: return static_cast<float>(w_.codebook[values_[index / 2] >> (index % 2 * 4) & 15]);
    }
  }

  void end_step() {
    if (mask_ != nullptr) mask_ += w_.mask_bytes_of_step();
    if (w_.type == ValueType::kInt4) next_ += next_ % 2;
  }

 private:
  const Weight& w_;
  const uint8_t* mask_;
  const uint8_t* values_;
  int64_t next_ = 0;
};

void float_decode(const Weight& w, BlockRange blocks, const float* x, int64_t tokens, float* y) {
  const int64_t width = step_columns(w.type);
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t first_row = block * kBlockRows;
    for (int64_t token = 0; token < tokens; ++token) {
      Reader reader(w, block);
      float sums[kBlockRows] = {};
      for (int64_t step = 0; step < w.steps(); ++step) {
        for (int64_t position = 0; position < kBlockRows * width; ++position) {
          if (!reader.kept(position)) continue;
          const int64_t k = step * width + position % width;
          const float weight = reader.next();  // zero beyond the last column
          sums[position / width] += k < w.columns ? weight * x[token * w.columns + k] : 0.0f;
        }
        reader.end_step();
      }
      for (int64_t r = 0; r < kBlockRows && first_row + r < w.rows; ++r)
        y[token * w.rows + first_row + r] = sums[r];
    }
  }
}

void integer_decode(const Weight& w, BlockRange blocks, const RoundedTokens& x, int64_t tokens, float* y) {
  const int64_t width = step_columns(w.type);
  for (int64_t block = blocks.first; block < blocks.last; ++block) {
    const int64_t first_row = block * kBlockRows;
    const uint16_t* scales = w.block_scales(block);
    for (int64_t token = 0; token < tokens; ++token) {
      Reader reader(w, block);
      float results[kBlockRows] = {};
      for (int64_t group = 0; group < w.groups(); ++group) {
        int32_t sums[kBlockRows] = {};
        for (int64_t k = group * w.group; k < (group + 1) * w.group && k < w.columns; k += width) {
          for (int64_t position = 0; position < kBlockRows * width; ++position) {
            if (!reader.kept(position)) continue;
            const int32_t level = static_cast<int32_t>(reader.next());
            sums[position / width] += level * x.token(token)[k + position % width];
          }
          reader.end_step();
        }
        for (int64_t r = 0; r < kBlockRows; ++r) {
          const float scale = from_fp16(load_at<uint16_t>(scales, group * kBlockRows + r));
          const float both = scale * x.token_scales(token)[group];
          results[r] = std::fma(static_cast<float>(sums[r]), both, results[r]);
        }
      }
      for (int64_t r = 0; r < kBlockRows && first_row + r < w.rows; ++r)
        y[token * w.rows + first_row + r] = results[r];
    }
  }
}

void round_tokens(const float* x, int64_t tokens, int64_t bits, const RoundedTokens& rounded) {
  const float largest = bits == 8 ? 127.0f : 32767.0f;
  for (int64_t token = 0; token < tokens; ++token) {
    int16_t* to = rounded.token(token);
    for (int64_t group = 0; group < rounded.groups(); ++group) {
      const int64_t first = group * rounded.group, end = first + rounded.group;
      float amax = 0;
      bool finite = true;
      for (int64_t k = first; k < end && k < rounded.columns; ++k) {
        const float magnitude = std::fabs(x[token * rounded.columns + k]);
        finite = finite && magnitude <= 3.402823466e38f;
        amax = magnitude > amax ? magnitude : amax;
      }
      // So small an amax that its inverse overflows is no information: treat it as zero.
      const float inverse = largest / amax;
      const bool usable = finite && amax > 0 && inverse <= 3.402823466e38f;
      rounded.token_scales(token)[group] = finite ? (usable ? amax / largest : 0.0f) : NAN;
      for (int64_t k = first; k < end; ++k) {
        const bool inside = usable && k < rounded.columns;
        to[k] = inside ? static_cast<int16_t>(std::nearbyint(x[token * rounded.columns + k] * inverse)) : 0;
      }
    }
  }
}

void gate(const float* z, int64_t tokens, int64_t outputs, float* y, int64_t stride) {
  const int64_t pairs = (outputs + kBlockRows - 1) / kBlockRows;
  for (int64_t token = 0; token < tokens; ++token) {
    for (int64_t n = 0; n < outputs; ++n) {
      const float* pair = z + (token * pairs + n / kBlockRows) * 2 * kBlockRows;
      const float gate = pair[n % kBlockRows], up = pair[kBlockRows + n % kBlockRows];
      y[token * stride + n] = gate / (1.0f + std::exp(-gate)) * up;
    }
  }
}

void attend(const HeadQueries& q) {
  for (int64_t query = 0; query < q.tokens * q.heads; ++query) {
    const int64_t start = q.start(query / q.heads), end = q.end(query / q.heads);
    const float* x = q.queries + query * q.head_dim;
    float* weights = q.scores;
    float largest = -INFINITY, sum = 0;
    for (int64_t j = start; j < end; ++j) {
      float score = 0;
      for (int64_t d = 0; d < q.head_dim; ++d) score += x[d] * q.keys[j * q.head_dim + d];
      weights[j] = score;
      largest = std::fmax(largest, score);
    }
    for (int64_t j = start; j < end; ++j) {
      weights[j] = std::exp(weights[j] - largest);
      sum += weights[j];
    }
    float* y = q.output_of(query);
    for (int64_t d = 0; d < q.head_dim; ++d) {
      float total = 0;
      for (int64_t j = start; j < end; ++j) total += weights[j] * q.values[j * q.head_dim + d];
      y[d] = total;
    }
    q.largest[query] = largest;
    q.sums[query] = sum;
  }
}

constexpr FloatKernels kFloat = {float_decode, nullptr, nullptr, 0};
constexpr IntegerKernels kInteger = {integer_decode, nullptr, nullptr, 0};

}  // namespace

const KernelRow kScalarRow = {"scalar", always, kFloat, kFloat, kInteger, kInteger, round_tokens, gate,
                              attend};

}  // namespace losa
