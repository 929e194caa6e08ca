// linear and linear_backward of bfloat16: rounded once, and heads may lie anywhere.
#include <array>
#include <cmath>
#include <cstring>

#include "check.h"
#include "layer_case.h"

namespace {

using namespace attncore;

using Halves = std::vector<std::uint16_t>;

/// bfloat16 is the upper half of a float32; what is cut off the numbers is lost.
Halves halved(std::vector<float>& numbers) {
  Halves items;
  for (float& number : numbers) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &number, sizeof bits);
    items.push_back(static_cast<std::uint16_t>(bits >> 16U));
    bits &= 0xffff0000U;
    std::memcpy(&number, &bits, sizeof bits);
  }
  return items;
}

double number(std::uint16_t half) {
  const std::uint32_t bits = std::uint32_t{half} << 16U;
  float x = 0;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

/// (batch, head, token, dim) in memory where the heads of a token lie beside each other, or the tokens of a head.
struct Heads {
  Index batch, tokens, heads, dim;
  bool apart;
  Halves items;

  Heads(const Halves& rows, Index b, Index t, Index h, Index d, bool tokens_together)
      : batch(b), tokens(t), heads(h), dim(d), apart(tokens_together), items(rows.size()) {
    for (std::size_t i = 0; i < rows.size(); ++i) items[place(static_cast<Index>(i))] = rows[i];
  }
  [[nodiscard]] std::array<Index, 4> strides() const {
    if (apart) return {heads * tokens * dim, tokens * dim, dim, 1};
    return {tokens * heads * dim, dim, heads * dim, 1};
  }
  /// Of item i in the order (batch, token, head, dim).
  [[nodiscard]] std::size_t place(Index i) const {
    const auto stride = strides();
    const Index head = i / dim % heads, token = i / (dim * heads) % tokens;
    return static_cast<std::size_t>(i / (dim * heads * tokens) * stride[0] + head * stride[1] +
                                    token * stride[2] + i % dim);
  }
  [[nodiscard]] Halves rows() const {
    Halves in_order(items.size());
    for (std::size_t i = 0; i < items.size(); ++i) in_order[i] = items[place(static_cast<Index>(i))];
    return in_order;
  }
  Tensor tensor() {
    Tensor t{items.data(), DType::bf16, {batch, heads, tokens, dim}, strides()};
    for (Index& stride : t.stride) stride *= Index{sizeof(std::uint16_t)};
    return t;
  }
};

/// x, weight, bias and d_y of a case.
struct Given {
  Halves x, weight, bias, d_y;
};

/// y, d_x and d_weight.
std::array<Halves, 3> run(const LayerShape& n, Given given, const Rope* rotary, bool apart, int threads) {
  const auto ins = [&](const Halves& rows) {
    return Heads(rows, n.batch, n.tokens, n.in_heads, n.in_dim, apart);
  };
  const auto outs = [&](const Halves& rows) {
    return Heads(rows, n.batch, n.tokens, n.out_heads, n.out_dim, apart);
  };
  const auto matrix = [&](Halves& items) {
    return Tensor::contiguous(items.data(), DType::bf16, {1, 1, n.out(), n.in()});
  };
  Heads x = ins(given.x), d_x = x, d_y = outs(given.d_y), y = d_y;
  Halves d_weight = given.weight;
  const Tensor bias = Tensor::contiguous(given.bias.data(), DType::bf16, {1, 1, 1, n.out()});
  linear(x.tensor(), matrix(given.weight), bias, y.tensor(), rotary, {.num_threads = threads});
  linear_backward(d_y.tensor(), x.tensor(), matrix(given.weight),
                  {.d_x = d_x.tensor(), .d_weight = matrix(d_weight), .d_bias = {}}, rotary,
                  {.num_threads = threads});
  return {y.rows(), d_x.rows(), d_weight};
}

void check(const Halves& ours, const std::vector<float>& exact) {
  constexpr double kHalfUnit = 0x1p-8, kSums = 2e-5;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double want = exact[i];
    CHECK(std::fabs(number(ours[i]) - want) <= kHalfUnit * std::fabs(want) + kSums);
  }
}

void heads_anywhere() {
  Random random;
  for (const LayerShape& n :
       {LayerShape{1, 3, 3, 7, 2, 10}, LayerShape{2, 40, 3, 23, 3, 18}, LayerShape{3, 37, 9, 33, 2, 34}}) {
    for (const bool rotated : {false, true}) {
      Case c(n, random);
      const Rope* const rotary = rotated ? &c.rope : nullptr;
      const Given given{halved(c.x), halved(c.weight), halved(c.bias), halved(c.d_y)};
      c.run({}, rotary);
      const auto got = run(n, given, rotary, false, 1);
      check(got[0], c.y);
      check(got[1], c.d_x);
      check(got[2], c.d_weight);
      CHECK(run(n, given, rotary, true, 2) == got);
    }
  }
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    use_isa(isa);
    heads_anywhere();
  }
  return finish();
}
