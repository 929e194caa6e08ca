// What few rows must give: near the baseline's, alone or in a gang the same bits, whatever they don't see.
#pragma once

#include "decode_case.h"

namespace attncore {
namespace {

constexpr Index kSlots[] = {0, 1, 7, 16, 64};

void set_option(DecodeCase& c, Index number) {
  Score& score = c.problem.score;
  switch (number % 5) {
    case 1:
      score.causal = true;
      score.left = c.n.keys / 2;
      return;
    case 2: {
      Random random;
      c.mask.resize(static_cast<std::size_t>(c.n.keys));
      for (std::uint8_t& seen : c.mask) seen = random.one_of(3) ? 0 : 1;
      score.mask = Tensor::contiguous(c.mask.data(), DType::boolean, {1, 1, 1, c.n.keys});
      return;
    }
    case 3:
      c.problem.dropout = {.probability = 0.25, .seed = 5};
      return;
    case 4:
      c.lengths[0] -= 17;
      score.key_lengths = c.ints(c.lengths);
      return;
    default:
      return;
  }
}

/// Each number of rows, of one query or several, in each kind of pages.
void every_shape(const Kernels& kernels) {
  constexpr Index kDims[] = {1, 2, 16, 31, 32, 33, 64, 80, 100, 128, 129, 200};
  Index number = 0;
  for (Index rows = 1; rows <= 32; rows += rows < 18 ? 1 : 7) {
    for (const Index slots : kSlots) {
      const Index queries = rows % 3 == 0 ? 3 : 1, heads = rows / queries, dim = kDims[number % 12];
      const Index keys = (rows > 8 ? 257 : 18) + 2 * (number % 23), value_dim = kDims[(number / 3 + 5) % 12];
      DecodeCase c(DecodeShape{{1, 2 * heads, 2, queries, keys, dim, value_dim}, slots});
      set_option(c, number++);
      check(kernels, c);
    }
  }
  DecodeCase wide(DecodeShape{{1, 5, 1, 1, 35, 512, 257}});
  check(kernels, wide);
}

/// Items that are not beside each other, and tokens that are not, do not change bits.
void strides(const Kernels& kernels) {
  for (const Index dim : {48, 33}) {
    DecodeCase c(DecodeShape{{1, 6, 1, 1, 75, dim, 40}});
    c.run(kernels, 1);
    const Halves want = c.out, k = c.k, v = c.v;
    const auto spread = [&](Halves& to, const Halves& of, Tensor& tensor, Index token_gap, Index item_gap) {
      const Index dims = tensor.shape[3], token = dims * item_gap + token_gap;
      to.assign(static_cast<std::size_t>(c.n.keys * token), std::uint16_t{0x7fc0});
      for (Index i = 0; i < c.n.keys * dims; ++i) {
        to[static_cast<std::size_t>(i / dims * token + i % dims * item_gap)] =
            of[static_cast<std::size_t>(i)];
      }
      tensor.data = to.data();
      tensor.stride = {0, 0, 2 * token, 2 * item_gap};
    };
    for (const Index item_gap : {1, 2}) {
      spread(c.k, k, c.problem.key, 3, item_gap);
      spread(c.v, v, c.problem.value, 5, item_gap);
      c.run(kernels, 1);
      CHECK(c.out == want);
    }
  }
}

/// Entries that share keys: each has the bits that it has alone.  Rows: group · query length.
void gangs(const Kernels& kernels, Index group, const std::vector<std::int32_t>& query_lengths,
           Index offset) {
  const auto batch = static_cast<Index>(query_lengths.size());
  const Index queries = *std::max_element(query_lengths.begin(), query_lengths.end());
  DecodeCase c(DecodeShape{{batch, group, 1, queries, 1140, 40, 24}, 16, 1040});
  c.query_lengths = query_lengths;
  c.problem.score.query_lengths = c.ints(c.query_lengths);
  c.problem.score.causal = true;
  for (std::size_t i = 0; i < c.lengths.size(); ++i) c.lengths[i] -= static_cast<std::int32_t>(i);
  std::vector<std::int32_t> offsets;
  for (const std::int32_t length : c.lengths) {
    offsets.push_back(offsets.empty() ? static_cast<std::int32_t>(offset) : length - 1);
  }
  c.problem.score.query_offset = c.ints(offsets);
  const Call call = validate(c.problem);
  CHECK(!make_plan(call, kernels, Machine{1}).gangs.empty());
  c.run(kernels, 1);
  const Halves together = c.out;
  const std::vector<float> lse = c.lse;
  for (const int threads : {1, 3}) {
    std::fill(c.out.begin(), c.out.end(), std::uint16_t{0x7fc0});
    for (Index i = 0; i < batch; ++i) {
      Problem alone = c.entry(i);
      alone.score.query_offset.data = &offsets[static_cast<std::size_t>(i)];
      alone.score.query_offset.shape[0] = 1;
      const Call one = validate(alone);
      cpu_backend.forward(one, make_plan(one, kernels, Machine{threads}), {.num_threads = threads});
    }
    CHECK(c.out == together && c.lse == lse);
  }
  check(kernels, c);
}

/// Inf and NaN where some rows don't look: their bits stay, and the others are NaN.
void poison(const Kernels& kernels) {
  constexpr std::uint16_t kPoison[] = {0x7f80, 0xff80, 0x7fc0};  // Inf, −Inf, NaN
  for (const Index rows : {4, 7, 16, 20}) {
    for (const Index slots : {0, 7, 16}) {
      DecodeCase c(DecodeShape{{1, 1, 1, rows, 301, 40, 72}, slots});
      c.problem.score.causal = true;
      c.run(kernels, 1);
      const Halves want = c.out;
      const std::vector<float> lse = c.lse;
      const Index seen = rows / 2, key = c.n.keys - rows + seen;  // by rows from `seen` on
      const Index token =
          slots == 0 ? key : c.table[static_cast<std::size_t>(key / slots)] * slots + key % slots;
      const auto tokens = [](Halves& x, Index at, Index dims) {
        return x.begin() + static_cast<std::ptrdiff_t>(at * dims);
      };
      for (Index i = 0; i < 72; ++i) *(tokens(c.v, token, 72) + i) = kPoison[i % 3];
      c.run(kernels, 1);
      const auto first = static_cast<std::ptrdiff_t>(seen * 72);
      CHECK(std::equal(want.begin(), want.begin() + first, c.out.begin()) && c.lse == lse);
      const auto is_poisoned = [](std::uint16_t x) { return (x & 0x7f80) == 0x7f80; };
      CHECK(std::all_of(c.out.begin() + first, c.out.end(), is_poisoned));
      for (Index i = 0; i < 40; ++i) *(tokens(c.k, token, 40) + i) = 0x7fc0;
      c.run(kernels, 1);
      CHECK(std::equal(want.begin(), want.begin() + first, c.out.begin()));
      CHECK(std::equal(lse.begin(), lse.begin() + seen, c.lse.begin()));
      CHECK(std::all_of(c.out.begin() + first, c.out.end(), is_poisoned));
    }
  }
}

/// One query's rows: their number is the head group's, which it is the same for all; only what others hold may change.
void rows_beside_each_other(const Kernels& kernels) {
  for (const Index rows : {5, 8, 13, 32}) {
    DecodeCase c(DecodeShape{{1, rows, 1, 1, 260, 64, 48}, 16});
    c.run(kernels, 1);
    const Halves want = c.out;
    const auto kept = static_cast<std::ptrdiff_t>(rows / 2);
    std::fill(c.q.begin() + kept * 64, c.q.end(), std::uint16_t{0x7f80});
    c.run(kernels, 1);
    CHECK(std::equal(want.begin(), want.begin() + kept * 48, c.out.begin()));
  }
}

/// Random numbers of a dtype, none of them NaN, and the same ones in bfloat16.
template <DType kStorage>
std::vector<std::byte> quantised(Halves& same, Index tokens, Index dims, Random& random) {
  using V = Vec<Modelled, float>;
  constexpr Index n = kWidth<Modelled, float>, kMost = 128;
  const Index bytes = kStorage == DType::i4 ? (dims + 1) / 2 : dims;
  std::vector<std::byte> items(static_cast<std::size_t>(tokens * bytes));
  for (std::byte& item : items) item = static_cast<std::byte>(random.below(128) * 2);
  same.resize(static_cast<std::size_t>(tokens * dims));
  for (Index token = 0; token < tokens; ++token) {
    std::byte room[kMost]{};
    std::memcpy(room, items.data() + token * bytes, static_cast<std::size_t>(bytes));
    for (Index dim = 0; dim < dims; ++dim) {
      const Index first = dim - dim % n;
      const V widened = Widen<Modelled, float, kStorage>::load(room + item_offset<kStorage>(first, 1));
      same[static_cast<std::size_t>(token * dims + dim)] = narrow(widened[dim % n]);
    }
  }
  return items;
}

/// Quantised keys and values have the bits of the same numbers in bfloat16.
template <DType kStorage>
void quantised(const Kernels& kernels) {
  Random random;
  for (const Index rows : {3, 5, 16, 20, 40}) {
    for (const Index slots : {7, 16}) {
      DecodeCase c(DecodeShape{{1, rows, 1, 1, 141, 72, 38}, slots});
      const auto k = quantised<kStorage>(c.k, c.pages * slots, 72, random);
      const auto v = quantised<kStorage>(c.v, c.pages * slots, 38, random);
      c.problem.key.data = c.k.data(), c.problem.value.data = c.v.data();
      c.problem.score.scale = 0.01;
      c.run(kernels, 1);
      const Halves want = c.out;
      c.problem.key = Tensor::contiguous(k.data(), kStorage, c.problem.key.shape);
      c.problem.value = Tensor::contiguous(v.data(), kStorage, c.problem.value.shape);
      c.run(kernels, 2);
      CHECK(c.out == want);
    }
  }
}

void check_decoding(const Kernels& kernels) {
  every_shape(kernels);
  strides(kernels);
  for (const Index offset : {1139, 1000}) {
    gangs(kernels, 1, {5, 1, 6}, offset);
    gangs(kernels, 2, {1, 3, 2, 5, 8}, offset);
    gangs(kernels, 4, {5, 1, 2, 8}, offset);
    gangs(kernels, 8, {1, 1, 1, 1, 1}, offset);
  }
  poison(kernels);
  rows_beside_each_other(kernels);
  quantised<DType::i8>(kernels);
  quantised<DType::f8>(kernels);
  quantised<DType::i4>(kernels);
}

}  // namespace
}  // namespace attncore
