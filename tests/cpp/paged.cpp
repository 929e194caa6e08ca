// Random block tables, lengths, trees: what is valid equals the gathered call, what is not is an error that leaves out alone.
#include "check.h"
#include "paged_case.h"

namespace {

using namespace paged_case;

/// Packed queries or trees, now and then.
struct Extras {
  Buffer cumulative, parents;

  void add_to(Case& c) {
    Problem& p = c.problem;
    if (c.random.one_of(3)) pack(c);
    const bool has_room = std::all_of(c.lengths.begin(), c.lengths.end(),
                                      [&](Index length) { return length >= p.query.shape[2]; });
    if (!has_room || p.score.left != kUnbounded || !c.random.one_of(2)) return;
    std::vector<Index> list;
    for (Index i = 0; i < p.query.shape[0] * p.query.shape[2]; ++i) {
      const Index place = p.packing.query_tokens.given() ? place_of(c, i) : i % p.query.shape[2];
      list.push_back(c.random.below(place + 1) - 1);
    }
    p.score.tree_parents = ints(parents, list, 1, c.wide_ints);
    p.score.tree_parents.shape = {p.query.shape[0], 1, p.query.shape[2], 1};
    p.score.tree_parents.stride = {p.query.shape[2] * (c.wide_ints ? 8 : 4), 0, c.wide_ints ? 8 : 4, 0};
  }

 private:
  std::vector<Index> ends_;

  /// The same tokens, dealt out to the entries anew.
  void pack(Case& c) {
    Problem& p = c.problem;
    const Index tokens = c.batch == 0 ? 0 : c.queries;
    for (Tensor* const t : {&p.query, &p.out, &p.lse}) t->shape[0] = 1, t->shape[2] = tokens;
    ends_ = {0};
    for (Index entry = 0; entry < c.batch; ++entry)
      ends_.push_back(entry + 1 == c.batch ? tokens
                                           : ends_.back() + c.random.below(tokens - ends_.back() + 1));
    p.packing.query_tokens = ints(cumulative, ends_, 1, c.wide_ints);
  }

  [[nodiscard]] Index place_of(const Case& c, Index token) const {
    Index first = 0;
    for (Index entry = 0; entry < c.batch; ++entry) {
      if (ends_[static_cast<std::size_t>(entry)] <= token) first = ends_[static_cast<std::size_t>(entry)];
    }
    return token - first;
  }
};

double number_at(const Buffer& buffer, Index i, DType dtype) {
  double x = 0;
  float y = 0;
  if (dtype == DType::f64) std::memcpy(&x, buffer.bytes.get() + i * 8, 8);
  if (dtype == DType::f32) std::memcpy(&y, buffer.bytes.get() + i * 4, 4);
  return dtype == DType::f64 ? x : y;
}

/// Without scales the bits are those of the gathered call; but bfloat16 keys of few rows are summed in another order.
void compare(const Case& c, const Buffer& ours, const Buffer& theirs, double tolerance) {
  if (!c.problem.key_scale.given() && !c.problem.value_scale.given() && c.problem.key.dtype != DType::bf16) {
    CHECK(ours.size == 0 || std::memcmp(ours.bytes.get(), theirs.bytes.get(), ours.size) == 0);
    return;
  }
  for (Index i = 0; i < static_cast<Index>(ours.size) / item_size(c.compute); ++i) {
    const double a = number_at(ours, i, c.compute), b = number_at(theirs, i, c.compute);
    CHECK(a == b || std::fabs(a - b) <= tolerance * (1 + std::fabs(b)));
  }
}

void valid(Case& c) {
  forward(c.problem, {.num_threads = 1 + static_cast<int>(c.random.below(3))});
  Problem dense = c.problem;
  dense.key = c.key.gathered;
  dense.value = c.value.gathered;
  dense.key_scale = dense.value_scale = {};
  dense.paging = {};
  Buffer out(c.out_memory.size), lse(c.lse_memory.size);
  dense.out.data = out.bytes.get();
  dense.lse.data = lse.bytes.get();
  forward(dense, {.num_threads = 1});
  double largest = 1;
  for (Index i = 0; i < static_cast<Index>(c.value.gathered_memory.size) / item_size(c.compute); ++i)
    largest = std::max(largest, std::fabs(number_at(c.value.gathered_memory, i, c.compute)));
  compare(c, c.out_memory, out, 1e-3 * largest);
  compare(c, c.lse_memory, lse, 1e-4);
}

/// Spoils one thing; false if there is nothing to spoil.
bool spoil(Case& c, Buffer& memory) {
  Random& random = c.random;
  Problem& p = c.problem;
  constexpr Index kLast = std::numeric_limits<std::int32_t>::max();
  switch (random.below(6)) {
    case 0: {  // a page
      const Index entry = random.below(std::max<Index>(1, c.batch));
      if (c.batch == 0 || c.lengths[static_cast<std::size_t>(entry)] == 0) return false;
      const Index used = (c.lengths[static_cast<std::size_t>(entry)] - 1) / c.slots + 1;
      const Index bad[] = {-1,
                           c.pages,
                           kLast,
                           -kLast - 1,
                           c.wide_ints ? Index{1} << 40 : -7,
                           c.wide_ints ? std::numeric_limits<Index>::min() : c.pages + 1};
      c.table[static_cast<std::size_t>(entry * c.width + random.below(used))] = bad[random.below(6)];
      p.paging.block_table = ints(memory, c.table, c.width, c.wide_ints);
      return true;
    }
    case 1: {  // a length
      if (c.batch == 0) return false;
      const Index bad[] = {-1, c.width * c.slots + 1, kLast, -kLast - 1};
      c.lengths[static_cast<std::size_t>(random.below(c.batch))] = bad[random.below(4)];
      p.score.key_lengths = ints(memory, c.lengths, 1, c.wide_ints);
      return true;
    }
    case 2:
      p.paging.block_table.shape[0] += 1;
      return true;
    case 3:
      p.value.shape[random.below(3)] -= 1;
      return true;
    case 4:
      if (!p.key_scale.given()) return false;
      p.key_scale.shape[random.below(4)] += 1;
      return true;
    default: {
      if (p.query.shape[0] * p.query.shape[2] == 0 || c.batch != p.query.shape[0]) return false;
      if (p.score.query_lengths.given() || p.score.tree_parents.given()) return false;
      std::vector<Index> parents(static_cast<std::size_t>(p.query.shape[2]), -1);
      const Index at = random.below(p.query.shape[2]);
      const Index bad[] = {at, at + 1, -2, kLast, -kLast - 1};
      parents[static_cast<std::size_t>(at)] = bad[random.below(5)];
      const Tensor line = ints(memory, parents, 1, c.wide_ints);
      p.score.tree_parents = {line.data, line.dtype, {1, 1, line.shape[0], 1}, {0, 0, line.stride[0], 0}};
      return true;
    }
  }
}

bool invalid(Case& c) {
  Buffer memory;
  if (!spoil(c, memory)) return false;
  bool thrown = false;
  try {
    forward(c.problem);
  } catch (const std::invalid_argument& error) {
    thrown = std::strchr(error.what(), ':') != nullptr;
  }
  CHECK(thrown);
  const auto untouched = [](const Buffer& b) {
    return std::all_of(b.bytes.get(), b.bytes.get() + b.size, [](std::byte x) { return x == std::byte{0}; });
  };
  CHECK(untouched(c.out_memory) && untouched(c.lse_memory));
  return true;
}

void fuzz(int repeats) {
  Random random;
  int good = 0, bad = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    Case c(random);
    Extras extras;
    extras.add_to(c);
    if (random.one_of(3)) {
      bad += invalid(c) ? 1 : 0;
    } else {
      valid(c);
      ++good;
    }
  }
  std::printf("%d valid, %d invalid\n", good, bad);
  CHECK(good > repeats / 2 && bad > repeats / 10);
}

}  // namespace

int main() {
  for (const std::string& name : available_isas()) {
    use_isa(name);
    std::printf("%s\n", name.c_str());
    fuzz(2000);
  }
  return finish();
}
