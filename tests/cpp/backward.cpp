// forward() and backward() with all options at once against loops in double, for every ISA; the same bits from any number
// of threads, from several callers at once, and after a call that was cancelled.
#include <algorithm>
#include <attncore/attncore.hpp>
#include <cmath>
#include <thread>
#include <vector>

#include "check.h"
#include "kit.h"

namespace {

using namespace attncore;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

constexpr double kSoftcap = 2.0, kInfinity = std::numeric_limits<double>::infinity();
constexpr Index kLeft = 90, kBuckets = 8, kFarthest = 30;

/// An input, its gradient, and the gradient that the loops give.
struct Leaf {
  Floats x, d;
  Doubles want;
  Tensor tensor, d_tensor;

  Leaf(const std::array<Index, 4>& shape, Random& random) {
    x = noise(shape[0] * shape[1] * shape[2] * shape[3], random);
    d.resize(x.size());
    want.resize(x.size());
    tensor = Tensor::contiguous(x.data(), DType::f32, shape);
    d_tensor = Tensor::contiguous(d.data(), DType::f32, shape);
  }
};

/// A problem with every option, or with none but the band.
struct Case {
  Shape n;
  bool options;
  Random random;
  Leaf q, k, v, full, of_keys, slopes, table, sinks;
  Leaf out, lse;  // their gradients are given
  std::vector<std::uint8_t> mask, keep;
  std::vector<Index> query_lengths, key_lengths;
  Problem problem;
  Gradients gradients;

  Case(const Shape& shape, bool with_options)
      : n(shape),
        options(with_options),
        q({n.batch, n.heads, n.queries, n.dim}, random),
        k({n.batch, n.kv_heads, n.keys, n.dim}, random),
        v({n.batch, n.kv_heads, n.keys, n.value_dim}, random),
        full({1, n.heads, n.queries, n.keys}, random),
        of_keys({n.batch, 1, 1, n.keys}, random),
        slopes({n.batch, n.heads, 1, 1}, random),
        table({1, n.heads, 1, kBuckets}, random),
        sinks({1, n.heads, 1, 1}, random),
        out({n.batch, n.heads, n.queries, n.value_dim}, random),
        lse({n.batch, n.heads, n.queries, 1}, random),
        query_lengths(static_cast<std::size_t>(n.batch), n.queries),
        key_lengths(static_cast<std::size_t>(n.batch), n.keys) {
    problem = {.query = q.tensor, .key = k.tensor, .value = v.tensor, .out = out.tensor, .lse = lse.tensor};
    problem.score.causal = true;
    problem.score.left = kLeft;
    for (float& item : out.d) item = random.number();
    for (float& item : lse.d) item = random.number();
    gradients = {.d_out = out.d_tensor, .d_lse = lse.d_tensor};
    gradients.d_query = q.d_tensor;
    gradients.d_key = k.d_tensor;
    gradients.d_value = v.d_tensor;
    if (options) add_options();
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case() = default;

  void add_options() {
    for (Index i = 0; i < n.queries * n.keys; ++i)
      mask.push_back(i / n.keys == 3 || random.one_of(5) ? 0 : 1);
    query_lengths.back() -= 2;
    key_lengths.back() -= 5;
    Score& score = problem.score;
    score.softcap = kSoftcap;
    score.mask = Tensor::contiguous(mask.data(), DType::boolean, {1, 1, n.queries, n.keys});
    score.biases = {full.tensor, of_keys.tensor};
    score.alibi = slopes.tensor;
    score.relative_bias = {.table = table.tensor, .bidirectional = false, .max_distance = kFarthest};
    score.sinks = sinks.tensor;
    score.query_lengths = Tensor::contiguous(query_lengths.data(), DType::i64, {n.batch, 1, 1, 1});
    score.key_lengths = Tensor::contiguous(key_lengths.data(), DType::i64, {n.batch, 1, 1, 1});
    problem.dropout = {.probability = 0.25, .seed = 123456789012345};
    keep.resize(static_cast<std::size_t>(n.batch * n.heads * n.queries * n.keys));
    dropout_mask(problem.dropout, {}, Tensor::contiguous(keep.data(), DType::boolean, scores()));
    gradients.d_biases = {full.d_tensor, of_keys.d_tensor};
    gradients.d_alibi = slopes.d_tensor;
    gradients.d_relative_bias = table.d_tensor;
    gradients.d_sinks = sinks.d_tensor;
  }

  [[nodiscard]] std::array<Index, 4> scores() const { return {n.batch, n.heads, n.queries, n.keys}; }

  std::vector<Leaf*> leaves() {
    if (!options) return {&q, &k, &v};
    return {&q, &k, &v, &full, &of_keys, &slopes, &table, &sinks};
  }

  /// out, lse and all gradients of a call.
  Floats run(const Options& how) {
    std::fill(out.x.begin(), out.x.end(), 7.0F);
    for (Leaf* leaf : leaves()) std::fill(leaf->d.begin(), leaf->d.end(), 7.0F);
    forward(problem, how);
    backward(problem, gradients, how);
    Floats results = out.x;
    results.insert(results.end(), lse.x.begin(), lse.x.end());
    for (const Leaf* leaf : leaves()) results.insert(results.end(), leaf->d.begin(), leaf->d.end());
    return results;
  }
};

/// The bucket of a distance into the past.
Index bucket(Index away) {
  constexpr Index kSingle = kBuckets / 2;
  if (away < kSingle) return std::max<Index>(away, 0);
  const double ratio = std::log(double(away) / kSingle) / std::log(double(kFarthest) / kSingle);
  return std::min(kSingle + static_cast<Index>(ratio * (kBuckets - kSingle)), kBuckets - 1);
}

/// One row: weights, what dropout multiplies them by, and d score / d (scale · q · k).
struct Row {
  Index batch, head, query, kv_head, position;
  Doubles weight, keep, slope;
  double of_sink = 0;

  Row(const Case& c, Index b, Index h, Index i)
      : batch(b), head(h), query(i), kv_head(b * c.n.kv_heads + h / (c.n.heads / c.n.kv_heads)) {
    const auto entry = static_cast<std::size_t>(b);
    position = i + c.key_lengths[entry] - c.query_lengths[entry];
    double top = c.options ? double(c.sinks.x[h]) : -kInfinity;
    for (Index j = 0; j < c.n.keys; ++j) {
      weight.push_back(score(c, j));
      top = std::max(top, weight.back());
      const bool kept = !c.options || c.keep[((b * c.n.heads + h) * c.n.queries + i) * c.n.keys + j] != 0;
      keep.push_back(kept ? (c.options ? 1 / (1 - c.problem.dropout.probability) : 1) : 0);
    }
    of_sink = c.options ? std::exp(double(c.sinks.x[h]) - top) : 0;
    double sum = of_sink;
    for (double& w : weight) sum += w = top == -kInfinity ? 0 : std::exp(w - top);
    for (double& w : weight) w = sum == 0 ? 0 : w / sum;
    of_sink = sum == 0 ? 0 : of_sink / sum;
  }

  double score(const Case& c, Index j) {
    double s = 0;
    for (Index d = 0; d < c.n.dim; ++d)
      s += double(c.q.x[row(c) * c.n.dim + d]) * double(c.k.x[key(c, j) * c.n.dim + d]);
    s /= std::sqrt(double(c.n.dim));
    slope.push_back(1);
    const auto entry = static_cast<std::size_t>(batch);
    const bool hidden = j > position || j < position - kLeft || j >= c.key_lengths[entry] ||
                        query >= c.query_lengths[entry] || (c.options && c.mask[query * c.n.keys + j] == 0);
    if (hidden) return -kInfinity;
    if (!c.options) return s;
    const double t = std::tanh(s / kSoftcap);
    slope.back() = 1 - t * t;
    return kSoftcap * t - double(c.slopes.x[batch * c.n.heads + head]) * std::fabs(double(position - j)) +
           double(c.table.x[head * kBuckets + bucket(position - j)]) +
           double(c.full.x[(head * c.n.queries + query) * c.n.keys + j]) +
           double(c.of_keys.x[batch * c.n.keys + j]);
  }

  [[nodiscard]] Index row(const Case& c) const { return (batch * c.n.heads + head) * c.n.queries + query; }
  [[nodiscard]] Index key(const Case& c, Index j) const { return kv_head * c.n.keys + j; }
};

/// Adds what one row gives to all gradients.
void differentiate(Case& c, const Row& r) {
  const Shape& n = c.n;
  const Index at = r.row(c);
  Doubles d_weight(r.weight.size());
  double delta = 0;
  for (Index j = 0; j < n.keys; ++j) {
    if (r.weight[j] == 0) continue;
    for (Index d = 0; d < n.value_dim; ++d) {
      const double d_out = c.out.d[at * n.value_dim + d];
      d_weight[j] += d_out * double(c.v.x[r.key(c, j) * n.value_dim + d]) * r.keep[j];
      c.v.want[r.key(c, j) * n.value_dim + d] += r.weight[j] * r.keep[j] * d_out;
    }
    delta += r.weight[j] * d_weight[j];
  }
  const bool exists = r.query < c.query_lengths[static_cast<std::size_t>(r.batch)];
  const double of_row = (exists ? double(c.lse.d[at]) : 0) - delta;
  if (c.options) c.sinks.want[r.head] += r.of_sink * of_row;
  for (Index j = 0; j < n.keys; ++j) {
    const double d_z = r.weight[j] * (d_weight[j] + of_row);
    const double d_s = d_z * r.slope[j] / std::sqrt(double(n.dim));
    for (Index d = 0; d < n.dim; ++d) {
      c.q.want[at * n.dim + d] += d_s * double(c.k.x[r.key(c, j) * n.dim + d]);
      c.k.want[r.key(c, j) * n.dim + d] += d_s * double(c.q.x[at * n.dim + d]);
    }
    if (!c.options || r.weight[j] == 0) continue;
    c.full.want[(r.head * n.queries + r.query) * n.keys + j] += d_z;
    c.of_keys.want[r.batch * n.keys + j] += d_z;
    c.slopes.want[r.batch * n.heads + r.head] -= d_z * std::fabs(double(r.position - j));
    c.table.want[r.head * kBuckets + bucket(r.position - j)] += d_z;
  }
}

/// Gradients against the loops, and the same bits from 1, 2, 3 and 4 threads.
void check(const Shape& shape, bool options) {
  Case c(shape, options);
  const Floats first = c.run({.num_threads = 1});
  for (Index b = 0; b < shape.batch; ++b) {
    for (Index h = 0; h < shape.heads; ++h) {
      for (Index i = 0; i < shape.queries; ++i) differentiate(c, Row(c, b, h, i));
    }
  }
  for (const Leaf* leaf : c.leaves()) {
    double largest = 1;
    for (const double want : leaf->want) largest = std::max(largest, std::fabs(want));
    for (std::size_t i = 0; i < leaf->d.size(); ++i)
      CHECK(std::fabs(double(leaf->d[i]) - leaf->want[i]) < 2e-5 * largest);
  }
  for (int threads = 2; threads <= 4; ++threads) CHECK(same_bits(c.run({.num_threads = threads}), first));
}

constexpr Shape kSmall{2, 4, 2, 23, 41, 12, 9}, kTwoPasses{1, 2, 1, 90, 300, 16, 16};

void many_callers() {
  Case alone(kTwoPasses, true);
  const Floats want = alone.run({.num_threads = 1});
  std::vector<std::thread> callers;
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&want, i] {
      Case c(kTwoPasses, true);
      for (int repeat = 0; repeat < 3; ++repeat) CHECK(same_bits(c.run({.num_threads = 1 + i}), want));
    });
  }
  for (std::thread& caller : callers) caller.join();
}

/// Ends at its poll number 1, 2, 4, …, or was over before; nothing else is harmed.
void cancelled() {
  Case c(kTwoPasses, true);
  const Floats want = c.run({.num_threads = 2});
  for (int at = 1; at < 100; at *= 2) {
    int polls = 0;
    bool ended = false;
    try {
      backward(c.problem, c.gradients,
               {.num_threads = 1 + at % 3, .cancelled = [&] { return ++polls >= at; }});
    } catch (const Cancelled&) {
      ended = true;
    }
    CHECK(ended == (polls >= at));
    CHECK(same_bits(c.run({.num_threads = 2}), want));
  }
}

}  // namespace

int main() {
  for (const std::string& name : available_isas()) {
    use_isa(name);
    std::printf("%s\n", name.c_str());
    for (const bool options : {false, true}) {
      check(kSmall, options);
      check(kTwoPasses, options);
      check({3, 1, 1, 1, 1, 1, 1}, false);
    }
    many_callers();
    cancelled();
  }
  return finish();
}
