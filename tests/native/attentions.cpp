// Attention over a cache, in memory of exactly its size: scalar against double, the others against scalar, and a token's
// bits against those it has alone.
#include <algorithm>

#include "harness.h"
#include "losa/attention.h"

namespace test {
namespace {

std::vector<float> numbers(int64_t count, Random& random) {
  std::vector<float> made(static_cast<size_t>(count));
  for (float& value : made) value = static_cast<float>(2 * random.unit() - 1);
  made.shrink_to_fit();
  return made;
}

/// The arrays of one call, with the past in the present's own memory.
struct Call {
  Call(std::vector<int64_t> pasts, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t width, int64_t window,
       int64_t spare, Random& random)
      : past_of(std::move(pasts)) {
    a.batch = static_cast<int64_t>(past_of.size());
    a.tokens = tokens;
    a.heads = heads;
    a.kv_heads = kv_heads;
    a.head_dim = width;
    a.window = window;
    a.capacity = a.past_capacity = *std::max_element(past_of.begin(), past_of.end()) + tokens + spare;
    a.scale = 1.0f / std::sqrt(static_cast<float>(width));
    a.rotary_half = width / 2;
    a.rotary_rows = a.capacity;
    a.query_stride = heads * width;
    a.key_stride = kv_heads * width;
    query = numbers(a.batch * tokens * a.query_stride, random);
    key = numbers(a.batch * tokens * a.key_stride, random);
    value = numbers(a.batch * tokens * a.key_stride, random);
    keys = numbers(a.batch * kv_heads * a.capacity * width, random);
    values = numbers(a.batch * kv_heads * a.capacity * width, random);
    cosines = numbers(a.rotary_rows * a.rotary_half, random);
    sines = numbers(a.rotary_rows * a.rotary_half, random);
    for (int64_t past : past_of) last.push_back(static_cast<int32_t>(past + tokens - 1));
    last.shrink_to_fit();
  }

  /// The output; keys and values of the new tokens are written anew, to the same numbers.
  std::vector<float> run(const losa::KernelRow& row, const losa::Parallel& parallel = kSerial) {
    std::vector<float> output(query.size(), NAN);
    output.shrink_to_fit();
    a.query = query.data();
    a.key = key.data();
    a.value = value.data();
    a.past_key = a.present_key = keys.data();
    a.past_value = a.present_value = values.data();
    a.cosines = cosines.data();
    a.sines = sines.data();
    a.last = last.data();
    a.output = output.data();
    std::string error;
    if (!losa::check(a, &error)) fail("attention: refused: " + error);
    if (!losa::attend(row, a, parallel)) fail("attention: out of memory");
    return output;
  }

  /// After a run: the output of head `head` of token `token` of row `row` in double, from the keys that are stored.
  double expected(int64_t row, int64_t token, int64_t head, int64_t d) const {
    const int64_t half = a.rotary_half, width = a.head_dim, place = past_of[static_cast<size_t>(row)] + token;
    const int64_t start = std::max<int64_t>(0, place + 1 - a.window);
    const float* x = query.data() + (row * a.tokens + token) * a.query_stride + head * width;
    const int64_t first_key = (row * a.kv_heads + head / (a.heads / a.kv_heads)) * a.capacity * width;
    std::vector<double> q(x, x + width);
    for (int64_t i = 0; i < half; ++i) {
      const double c = cosines[static_cast<size_t>(place * half + i)], s = sines[static_cast<size_t>(place * half + i)];
      q[static_cast<size_t>(i)] = x[i] * c - x[half + i] * s;
      q[static_cast<size_t>(half + i)] = x[half + i] * c + x[i] * s;
    }
    double total = 0, weights = 0;
    for (int64_t j = start; j <= place; ++j) {
      double score = 0;
      for (int64_t i = 0; i < width; ++i)
        score += q[static_cast<size_t>(i)] * keys[static_cast<size_t>(first_key + j * width + i)];
      const double weight = std::exp(score * a.scale);
      weights += weight;
      total += weight * values[static_cast<size_t>(first_key + j * width + d)];
    }
    return total / weights;
  }

  losa::Attention a{};
  std::vector<int64_t> past_of;
  std::vector<int32_t> last;
  std::vector<float> query, key, value, keys, values, cosines, sines;
};

std::string describe(const Call& c) {
  return "attention S=" + std::to_string(c.a.tokens) + " heads=" + std::to_string(c.a.heads) + "/" +
         std::to_string(c.a.kv_heads) + " D=" + std::to_string(c.a.head_dim) + " window=" + std::to_string(c.a.window) +
         " room=" + std::to_string(c.a.capacity);
}

void check_call(const Rows& rows, Call& c) {
  for (const losa::KernelRow* row : rows) {
    if (row != rows.back() && row->attend == rows.back()->attend) continue;
    const std::vector<float> y = c.run(*row);
    for (int64_t i = 0; i < static_cast<int64_t>(y.size()); i += 1 + c.a.head_dim / 3) {
      const int64_t d = i % c.a.head_dim, head = i / c.a.head_dim % c.a.heads;
      const int64_t token = i / c.a.query_stride % c.a.tokens, batch_row = i / c.a.query_stride / c.a.tokens;
      if (std::fabs(y[static_cast<size_t>(i)] - c.expected(batch_row, token, head, d)) <= 1e-5) continue;
      fail(std::string(row->name) + " " + describe(c) + ": a value is wrong");
      break;
    }
    if (!same_floats(y, c.run(*row, kTwoThreads)))
      fail(std::string(row->name) + " " + describe(c) + ": depends on threads");
  }
}

}  // namespace

void check_attention(const Rows& rows) {
  Random random(17);
  int cases = 0;
  for (int64_t width : {1, 8, 13, 16, 64, 80}) {
    for (int64_t tokens : {1, 2, 9, 37}) {
      for (int64_t spare : {0, 3, 40}) {
        const int64_t kv_heads = random.one_in(2) ? 1 : 2, heads = kv_heads * (1 + random.below(5));
        const int64_t window = random.one_in(2) ? INT64_MAX : 1 + random.below(40);
        Call call({random.below(70), 0, random.below(20)}, tokens, heads, kv_heads, width, window, spare, random);
        check_call(rows, call);
        ++cases;
      }
    }
  }
  for (int64_t tokens : {1, 2, 40}) {  // more keys than are attended to at once
    Call call({1030, 511, 3}, tokens, 2, 1, 16, random.one_in(2) ? INT64_MAX : 700, random.below(3), random);
    check_call(rows, call);
    ++cases;
  }
  std::printf("attention: %d cases\n", cases);
}

}  // namespace test
