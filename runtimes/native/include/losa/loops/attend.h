// Attention of a few queries to one head of keys and values (attention.h, head_queries.h).
//
// Keys are turned, a tile of 16 at a time, so that a query meets them in the lanes of a vector and no sum runs across
// lanes; all queries share the turned tile. Values lie as they are wanted: lanes run along the head's dimensions. Each
// sum has an order of its own, by dimension or by place of the key, whatever queries are handled together.
//
// V is as in prefill.h; gate.h has to be included before.

template <class V>
class Attend {
 public:
  static void run(const losa::HeadQueries& q) {
    const int64_t end = q.end(q.tokens - 1), queries = q.tokens * q.heads;
    for (int64_t first = q.start(0) / losa::kKeyTile * losa::kKeyTile; first < end; first += losa::kKeyTile)
      score_tile(q, first);
    for (int64_t query = 0; query < queries; query += kValueQueries) {
      const int64_t count = queries - query < kValueQueries ? queries - query : kValueQueries;
      for (int64_t i = query; i < query + count; ++i) exponentials(q, i);
      mix_values(q, query, count);
    }
  }

 private:
  using Vector = typename V::Vector;
  static constexpr int kTile = losa::kKeyTile;
  static constexpr int kParts = kTile / V::kLanes;
  // Their sums stay in registers: of scores queries x parts x 2, of values queries x vectors.
  static constexpr int kScoreQueries = 4 / kParts;
  static constexpr int kValueQueries = 4;
  static constexpr int kValueVectors = 4 / kParts;

  static float* scores_of(const losa::HeadQueries& q, int64_t query) { return q.scores + query * q.score_stride(); }

  /// turned [head_dim][16] = the keys from `first` on.
  static void turn(const losa::HeadQueries& q, int64_t first) {
    for (int64_t half = 0; half < kTile; half += 8) {
      const float* rows = q.keys + (first + half) * q.head_dim;
      const int64_t left = q.readable - first - half;
      int64_t d = 0;
      if (left >= 8)
        for (; d + 8 <= q.head_dim; d += 8)
          V::transpose8(rows + d, q.head_dim, q.turned + d * kTile + half, kTile);
      for (; d < q.head_dim; ++d)
        for (int64_t r = 0; r < 8; ++r) q.turned[d * kTile + half + r] = r < left ? rows[r * q.head_dim + d] : 0.0f;
    }
  }

  /// Scores of the keys [first, first + 16) for all queries that see one of them.
  static void score_tile(const losa::HeadQueries& q, int64_t first) {
    turn(q, first);
    int64_t token = first < q.past ? 0 : first - q.past, last = token;  // places from `first` on see it
    while (last < q.tokens && q.start(last) < first + kTile) ++last;
    int64_t query = token * q.heads;
    const int64_t queries = last * q.heads;
    for (; query + kScoreQueries <= queries; query += kScoreQueries) score<kScoreQueries>(q, query, first);
    for (; query < queries; ++query) score<1>(q, query, first);
  }

  /// Even and odd dimensions have sums of their own, so that fewer multiply-adds wait for one another.
  template <int Queries>
  static void score(const losa::HeadQueries& q, int64_t query, int64_t first) {
    Vector sums[Queries][kParts][2];
    for (int i = 0; i < Queries; ++i)
      for (int part = 0; part < kParts; ++part) sums[i][part][0] = sums[i][part][1] = V::zero();
    const float* x = q.queries + query * q.head_dim;
    int64_t d = 0;
    for (; d + 2 <= q.head_dim; d += 2) {
      add_dimension<0>(q, x, d, sums);
      add_dimension<1>(q, x, d + 1, sums);
    }
    if (d < q.head_dim) add_dimension<0>(q, x, d, sums);
    for (int i = 0; i < Queries; ++i)
      for (int part = 0; part < kParts; ++part)
        V::store(scores_of(q, query + i) + first + part * V::kLanes, V::add(sums[i][part][0], sums[i][part][1]));
  }
  template <int Which, int Queries>
  LOSA_INLINE static void add_dimension(const losa::HeadQueries& q, const float* x, int64_t d,
                                        Vector (&sums)[Queries][kParts][2]) {
    Vector keys[kParts];
    for (int part = 0; part < kParts; ++part) keys[part] = V::load(q.turned + d * kTile + part * V::kLanes);
#pragma GCC unroll 4
    for (int i = 0; i < Queries; ++i) {
      const auto factor = V::broadcast(x + i * q.head_dim + d);
      for (int part = 0; part < kParts; ++part)
        sums[i][part][Which] = V::multiply_add(keys[part], factor, sums[i][part][Which]);
    }
  }

  /// Scores of what a query sees become e^(score - the largest); their sum is formed in an order by place of the key.
  static void exponentials(const losa::HeadQueries& q, int64_t query) {
    float* scores = scores_of(q, query);
    const int64_t start = q.start(query / q.heads), end = q.end(query / q.heads);
    q.largest[query] = -__builtin_inff();
    q.sums[query] = 0.0f;
    if (start >= end) return;
    const int64_t first = start / kTile * kTile, last = (end + kTile - 1) / kTile * kTile;
    for (int64_t j = first; j < start; ++j) scores[j] = -__builtin_inff();
    for (int64_t j = end; j < last; ++j) scores[j] = -__builtin_inff();
    float most[kTile], sums[kTile] = {};
    for (int r = 0; r < kTile; ++r) most[r] = scores[first + r];
    for (int64_t j = first; j < last; j += kTile)
      for (int r = 0; r < kTile; ++r) most[r] = scores[j + r] > most[r] ? scores[j + r] : most[r];
    for (int width = kTile / 2; width > 0; width /= 2)
      for (int r = 0; r < width; ++r) most[r] = most[r + width] > most[r] ? most[r + width] : most[r];
    const float largest = most[0];
    for (int64_t j = first; j < last; j += kTile) {
      for (int r = 0; r < kTile; ++r) {
        const float weight = exponential(scores[j + r] - largest);
        scores[j + r] = weight;
        sums[r] += weight;
      }
    }
    for (int width = kTile / 2; width > 0; width /= 2)
      for (int r = 0; r < width; ++r) sums[r] += sums[r + width];
    q.largest[query] = largest;
    q.sums[query] = sums[0];
  }

  /// Outputs of queries [query, query + count) = sums of their exponentials times values. What all of them see is read
  /// once for all; what some do not see must not reach them, not even multiplied by zero, as it may be NaN.
  static void mix_values(const losa::HeadQueries& q, int64_t query, int64_t count) {
    const int64_t first_token = query / q.heads, last_token = (query + count - 1) / q.heads;
    const int64_t start = q.start(last_token), end = q.end(first_token);
    for (int64_t i = 0; i < count; ++i) {
      float* y = q.output_of(query + i);
      for (int64_t d = 0; d < q.head_dim; ++d) y[d] = 0.0f;
    }
    const bool some = start < end;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = (query + i) / q.heads;
      mix<1>(q, query + i, q.start(token), some ? start : q.end(token));
    }
    if (!some) return;
    switch (count) {
      case 1: mix<1>(q, query, start, end); break;
      case 2: mix<2>(q, query, start, end); break;
      case 3: mix<3>(q, query, start, end); break;
      default: mix<4>(q, query, start, end); break;
    }
    for (int64_t i = 0; i < count; ++i) mix<1>(q, query + i, end, q.end((query + i) / q.heads));
  }

  /// Adds the products of keys [start, end) to the outputs.
  template <int Queries>
  static void mix(const losa::HeadQueries& q, int64_t query, int64_t start, int64_t end) {
    if (start >= end) return;
    int64_t d = 0;
    for (; d + kValueVectors * V::kLanes <= q.head_dim; d += kValueVectors * V::kLanes)
      mix_strip<Queries, kValueVectors>(q, query, start, end, d);
    for (; d + V::kLanes <= q.head_dim; d += V::kLanes) mix_strip<Queries, 1>(q, query, start, end, d);
    for (; d < q.head_dim; ++d)
      for (int i = 0; i < Queries; ++i)
        for (int64_t j = start; j < end; ++j)
          q.output_of(query + i)[d] += scores_of(q, query + i)[j] * q.values[j * q.head_dim + d];
  }

  template <int Queries, int Vectors>
  static void mix_strip(const losa::HeadQueries& q, int64_t query, int64_t start, int64_t end, int64_t d) {
    Vector sums[Queries][Vectors];
    float* y[Queries];
    const float* weights[Queries];
    for (int i = 0; i < Queries; ++i) {
      y[i] = q.output_of(query + i) + d;
      weights[i] = scores_of(q, query + i);
      for (int v = 0; v < Vectors; ++v) sums[i][v] = V::load(y[i] + v * V::kLanes);
    }
    const float* from = q.values + start * q.head_dim + d;
    for (int64_t j = start; j < end; ++j, from += q.head_dim) {
      Vector value[Vectors];
      for (int v = 0; v < Vectors; ++v) value[v] = V::load(from + v * V::kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < Queries; ++i) {
        const auto weight = V::broadcast(weights[i] + j);
        for (int v = 0; v < Vectors; ++v) sums[i][v] = V::multiply_add(value[v], weight, sums[i][v]);
      }
    }
    for (int i = 0; i < Queries; ++i)
      for (int v = 0; v < Vectors; ++v) V::store(y[i] + v * V::kLanes, sums[i][v]);
  }
};
