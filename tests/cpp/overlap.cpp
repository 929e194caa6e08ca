// may_overlap and may_overlap_itself against the bytes of small tensors: false is certain, and common layouts
// get it.
#include <algorithm>
#include <attncore/layers.hpp>
#include <attncore/state.hpp>
#include <set>
#include <string>

#include "check.h"
#include "kit.h"
#include "tensor.h"

namespace {

using namespace attncore;

/// The address of every item, in the order of its indices.
std::vector<std::uintptr_t> addresses(const Tensor& t) {
  std::vector<std::uintptr_t> list;
  for (Index a = 0; a < t.shape[0]; ++a) {
    for (Index b = 0; b < t.shape[1]; ++b) {
      for (Index c = 0; c < t.shape[2]; ++c) {
        for (Index d = 0; d < t.shape[3]; ++d)
          list.push_back(reinterpret_cast<std::uintptr_t>(at(t, a, b, c, d)));
      }
    }
  }
  return list;
}

std::set<std::uintptr_t> bytes(const Tensor& t) {
  std::set<std::uintptr_t> set;
  for (const std::uintptr_t item : addresses(t)) {
    for (Index i = 0; i < item_size(t.dtype); ++i) set.insert(item + static_cast<std::uintptr_t>(i));
  }
  return set;
}

bool overlap(const Tensor& a, const Tensor& b) {
  const auto in_a = bytes(a), in_b = bytes(b);
  return std::any_of(in_a.begin(), in_a.end(), [&](std::uintptr_t byte) { return in_b.contains(byte); });
}

bool overlaps_itself(const Tensor& t) {
  return bytes(t).size() != addresses(t).size() * static_cast<std::size_t>(item_size(t.dtype));
}

/// No memory lies there: only addresses are asked for.
void* address(Index at) { return reinterpret_cast<void*>(Index{1} << 40U | at); }

void any_tensors() {
  Random random;
  const auto any = [&] {
    constexpr DType kDTypes[] = {DType::boolean, DType::f16, DType::f32, DType::f64};
    Tensor t{address(random.below(160)), kDTypes[random.below(4)], {}, {}};
    const Index step = random.one_of(2) ? item_size(t.dtype) : 1;  // unaligned half of the time
    for (std::size_t axis = 0; axis < 4; ++axis) {
      t.shape[axis] = random.one_of(20) ? 0 : 1 + random.below(4);
      t.stride[axis] = (random.below(61) - 30) * step;
      if (random.one_of(3)) t.stride[axis] = random.one_of(2) ? 8 * (random.below(9) - 4) : 0;
    }
    return t;
  };
  int overlaps = 0, proven = 0, self_overlaps = 0, self_proven = 0;
  for (int repeat = 0; repeat < 10000; ++repeat) {
    const Tensor a = any(), b = any();
    const bool apart = !may_overlap(a, b), simple = !may_overlap_itself(a);
    CHECK(apart == !may_overlap(b, a));
    const bool together = overlap(a, b), folded = overlaps_itself(a);
    CHECK(!(apart && together));
    CHECK(!(simple && folded));
    overlaps += together, proven += apart, self_overlaps += folded, self_proven += simple;
  }
  std::printf("apart: %d proven, %d overlap; simple: %d proven, %d fold\n", proven, overlaps, self_proven,
              self_overlaps);
  for (const int count : {overlaps, proven, self_overlaps, self_proven})
    CHECK(count > 500);  // all cases were met
}

/// A view (batch, heads, tokens, dim) of a buffer of f32 items, `offset` and strides in items.
Tensor view(Index offset, const std::array<Index, 4>& shape, std::array<Index, 4> stride) {
  for (Index& s : stride) s *= 4;
  return {address(offset * 4), DType::f32, shape, stride};
}

void apart(const std::vector<Tensor>& views) {
  for (std::size_t i = 0; i < views.size(); ++i) {
    CHECK(!may_overlap_itself(views[i]));
    CHECK(may_overlap(views[i], views[i]));
    for (std::size_t j = 0; j < i; ++j) CHECK(!may_overlap(views[i], views[j]));
  }
}

/// What one buffer often holds.
void common_layouts() {
  constexpr Index b = 2, h = 4, s = 33, d = 16;
  const std::array<Index, 4> shape{b, h, s, d};
  std::vector<Tensor> blocks, packed, by_head, grouped, columns, heads, halves;
  for (Index i = 0; i < 4; ++i) {
    blocks.push_back(view(i * b * h * s * d, shape, {h * s * d, s * d, d, 1}));   // (4, b, h, s, d)
    packed.push_back(view(i * h * d, shape, {s * 4 * h * d, d, 4 * h * d, 1}));   // (b, s, 4, h, d)
    by_head.push_back(view(i * d, shape, {s * h * 4 * d, 4 * d, h * 4 * d, 1}));  // (b, s, h, 4, d)
    columns.push_back(view(i, shape, {s * h * d * 4, d * 4, h * d * 4, 4}));      // (b, s, h, d, 4)
    heads.push_back(view(i * d, {b, 1, s, d}, {s * h * d, d, h * d, 1}));         // heads of (b, s, h, d)
    halves.push_back(view(i * s * d, {b, h, s, d}, {4 * h * s * d, 4 * s * d, d, 1}));  // (b, h, 4, s, d)
  }
  // Grouped queries: (b, s, (h + 2) d), and its output in a buffer of its own, reversed.
  grouped.push_back(view(0, shape, {s * (h + 2) * d, d, (h + 2) * d, 1}));
  grouped.push_back(view(h * d, {b, 1, s, d}, {s * (h + 2) * d, d, (h + 2) * d, 1}));
  grouped.push_back(view((h + 1) * d, {b, 1, s, d}, {s * (h + 2) * d, d, (h + 2) * d, 1}));
  const Index end = 2 * b * s * (h + 2) * d;
  grouped.push_back(view(end - 1, shape, {-s * h * d, -d, -h * d, -1}));
  for (const auto& views : {blocks, packed, by_head, grouped, columns, heads, halves}) apart(views);
  // Even and odd tokens; a transposed output.
  apart({view(0, shape, {h * s * 2 * d, s * 2 * d, 2 * d, 1}),
         view(d, shape, {h * s * 2 * d, s * 2 * d, 2 * d, 1})});
  apart({view(0, {1, 1, s, d}, {0, 0, 1, s}), view(s * d, {1, 1, s, d}, {0, 0, d, 1})});
}

/// Reads of a broadcast array fold; an empty array meets nothing.
void edges() {
  CHECK(may_overlap_itself(view(0, {2, 1, 5, 4}, {0, 0, 4, 1})));
  CHECK(!may_overlap_itself(view(0, {1, 1, 5, 4}, {0, 0, 4, 1})));
  const Tensor full = view(0, {2, 3, 5, 4}, {60, 20, 4, 1});
  CHECK(!may_overlap(full, view(7, {2, 0, 5, 4}, {60, 20, 4, 1})));
  CHECK(!may_overlap(full, view(120, {2, 3, 5, 4}, {60, 20, 4, 1})));
  CHECK(may_overlap(full, view(119, {2, 3, 5, 4}, {60, 20, 4, 1})));
  CHECK(may_overlap(full, view(119, {1, 1, 1, 1}, {0, 0, 0, 0})));
}

/// What has a shape and no memory was not left out; what is written overlaps nothing; sizes beyond memory.
void tensors_that_are_none() {
  float numbers[16]{}, out[4];
  const Tensor x = Tensor::contiguous(numbers, DType::f32, {1, 1, 4, 1});
  const Problem good{
      .query = x, .key = x, .value = x, .out = Tensor::contiguous(out, DType::f32, {1, 1, 4, 1})};
  const auto with = [&](auto change) {
    Problem problem = good;
    change(problem);
    return [problem] { forward(problem); };
  };
  forward(good);
  const Tensor lost = Tensor::contiguous(nullptr, DType::boolean, {1, 1, 1, 4});
  CHECK(refused(with([&](Problem& p) { p.score.mask = lost; }),
                "mask: is not given, but has the shape (1, 1, 1, 4)"));
  CHECK(refused(with([&](Problem& p) { p.lse = {nullptr, DType::f32, {1, 1, 4, 1}, {}}; }),
                "lse: is not given, but"));
  const Tensor pairs = Tensor::contiguous(numbers, DType::f32, {1, 1, 4, 2});
  CHECK(refused([&] { rope(pairs, {.positions = {nullptr, DType::i64, {1, 1, 4, 1}, {}}}, pairs); },
                "positions: is not given, but"));
  for (Tensor Score::* const option :
       {&Score::mask, &Score::alibi, &Score::sinks, &Score::query_offset, &Score::query_lengths,
        &Score::key_lengths, &Score::tree_parents, &Score::query_segments, &Score::key_segments}) {
    std::string message;
    try {
      with([&](Problem& p) { p.score.*option = lost; })();
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    CHECK(message.find(": is not given, but has the shape (1, 1, 1, 4)") != std::string::npos);
  }
  CHECK(refused(with([&](Problem& p) { p.score.relative_bias.table = lost; }),
                "relative_bias: is not given, but"));
  CHECK(refused(with([&](Problem& p) { p.key_scale = lost; }), "key_scale: is not given, but"));
  CHECK(refused(with([&](Problem& p) { p.value_scale = lost; }), "value_scale: is not given, but"));
  CHECK(refused(with([&](Problem& p) { p.packing.query_tokens = lost; }),
                "cu_query_lengths: is not given, but"));
  CHECK(refused(with([&](Problem& p) { p.packing.key_tokens = lost; }), "cu_key_lengths: is not given, but"));
  CHECK(refused(with([&](Problem& p) { p.paging.block_table = lost; }), "block_table: is not given, but"));
  AttentionState state(x);
  CHECK(refused([&] { state.update({.key = x, .value = x, .mask = lost}); }, "mask: is not given, but"));
  CHECK(refused(with([](Problem& p) { p.query = {}; }), "query: is not given"));
  CHECK(refused(with([](Problem& p) { p.out = {}; }), "out: is not given"));
  CHECK(refused(with([](Problem& p) { p.lse = p.out; }), "lse: overlaps out"));
  CHECK(refused(with([](Problem& p) { p.query.shape[2] = kUnbounded; }), "query: shape is"));
  CHECK(refused([&] { forward(good, {.num_threads = -5}); }, "num_threads: is -5, must be at least 0"));
  std::byte coins[4];
  Tensor keep = Tensor::contiguous(coins, DType::boolean, {1, 1, 2, 2});
  keep.stride[2] = 0;
  CHECK(refused([&] { dropout_mask({.probability = 0.5}, {}, keep); }, "keep: items overlap"));
  CHECK(refused([] { (void)fma_peak("baseline", DType::boolean, 1); }, "dtype: "));
  const Tensor huge = Tensor::contiguous(nullptr, DType::f32, {Index{1} << 40, Index{1} << 40, 1, 1});
  CHECK(huge.stride[0] == Index{4} << 40);
  try {
    (void)Workspace().reserve(std::numeric_limits<std::size_t>::max());
    CHECK(false);
  } catch (const std::bad_alloc&) {
  }
}

}  // namespace

int main() {
  any_tensors();
  common_layouts();
  edges();
  tensors_that_are_none();
  return finish();
}
