// The caches: what is appended comes back, shared pages, windows, quantised numbers, errors that change nothing.
#include <algorithm>
#include <cmath>

#include "cache_kit.h"

namespace {

/// Random appends and truncations; both caches hold what they were given, and give the same results.
void tokens_come_back() {
  Random random;
  for (const Index page_size : {1, 3, 16}) {
    KVCache contiguous(kEntries, kCapacity, settings());
    PagedKVCache paged(kEntries * kCapacity, page_size, settings());
    for (Index i = 0; i < kEntries; ++i) CHECK(paged.add() == i);
    std::vector<Rows> model(kEntries);
    for (int step = 0; step < 60; ++step) {
      const std::vector<Index> entries = random.one_of(2) ? std::vector<Index>{2, 0} : std::vector<Index>{1};
      const Index tokens = random.below(14);
      std::vector<Index> counts, left;
      for (const Index entry : entries) {
        const auto length = static_cast<Index>(model[static_cast<std::size_t>(entry)].size());
        counts.push_back(std::min(random.below(tokens + 1), kCapacity - length));
        left.push_back(random.one_of(3) ? random.below(length + counts.back() + 1) : length + counts.back());
      }
      const Tokens given(static_cast<Index>(entries.size()), tokens, random);
      append(contiguous, given.tensor, entries, counts);
      append(paged, given.tensor, entries, counts);
      contiguous.truncate(ints(left), ints(entries));
      paged.truncate(ints(left), ints(entries));
      for (std::size_t i = 0; i < entries.size(); ++i) {
        Rows& rows = model[static_cast<std::size_t>(entries[i])];
        for (Index token = 0; token < counts[i]; ++token)
          rows.push_back(given.row(static_cast<Index>(i), token));
        rows.resize(static_cast<std::size_t>(left[i]));
      }
      for (Index entry = 0; entry < kEntries; ++entry) {
        CHECK(gathered(contiguous, entry) == model[static_cast<std::size_t>(entry)]);
        CHECK(gathered(paged, entry) == model[static_cast<std::size_t>(entry)]);
      }
      CHECK(Query(kEntries).of(contiguous) == Query(kEntries).of(paged));
      const std::vector<Index> some{2, 2, 0};
      CHECK(Query(3).of(contiguous, ints(some)) == Query(3).of(paged, ints(some)));
    }
  }
}

Index shared_pages(const PagedKVCache& cache) {
  const std::vector<Index> counts = cache.reference_counts();
  return std::count_if(counts.begin(), counts.end(), [](Index count) { return count > 1; });
}

void forks_share_pages() {
  Random random;
  PagedKVCache cache(6, 4, settings());
  const Index prompt = cache.add();
  const Tokens first(1, 10, random), more(2, 1, random);
  append(cache, first.tensor, {prompt});
  const Index fork = cache.fork(prompt), third = cache.fork(fork);
  CHECK(cache.free_pages() == 3 && shared_pages(cache) == 3);
  append(cache, more.tensor, {fork, third});
  CHECK(cache.free_pages() == 1 && shared_pages(cache) == 2);
  CHECK(gathered(cache, prompt).size() == 10 && gathered(cache, fork)[10] == more.row(0, 0) &&
        gathered(cache, third)[10] == more.row(1, 0));
  const Tokens many(1, 9, random);
  CHECK(refused<CacheFull>([&] { append(cache, many.tensor, {prompt}); },
                           "append: needs 2 pages, 1 of 6 are free"));
  CHECK(gathered(cache, prompt).size() == 10 && cache.free_pages() == 1);
  cache.free(fork);
  cache.free(third);
  CHECK(cache.free_pages() == 3 && shared_pages(cache) == 0 && cache.entries() == std::vector<Index>{prompt});
  cache.free(prompt);
  CHECK(cache.free_pages() == 6);
}

/// Forks that begin to write in one page in one call: the longest needs no copy, whatever the order, and what a call that
/// fails had begun is undone.
void forks_write_at_once() {
  Random random;
  for (int round = 0; round < 4; ++round) {
    const bool shorter = round % 2 != 0, turned = round / 2 != 0;
    PagedKVCache cache(2, 4, settings());
    const Tokens first(1, 2, random), more(2, 1, random);
    append(cache, first.tensor, {cache.add()});
    const Index fork = cache.fork(0);
    if (shorter) cache.truncate(ints({1}), ints({fork}));
    const std::vector<Index> both = turned ? std::vector<Index>{fork, 0} : std::vector<Index>{0, fork};
    int polls = 0;
    const Options stops{.cancelled = [&] { return ++polls > 1; }};
    CHECK(refused<Cancelled>([&] { append(cache, more.tensor, both, {}, stops); }, "the call"));
    CHECK(gathered(cache, 0) == Rows({first.row(0, 0), first.row(0, 1)}) && shared_pages(cache) == 1);
    append(cache, more.tensor, both);
    CHECK(gathered(cache, 0) == Rows({first.row(0, 0), first.row(0, 1), more.row(turned ? 1 : 0, 0)}));
    Rows of_fork{first.row(0, 0), first.row(0, 1), more.row(turned ? 0 : 1, 0)};
    if (shorter) of_fork.erase(of_fork.begin() + 1);
    CHECK(gathered(cache, fork) == of_fork && shared_pages(cache) == 0 && cache.free_pages() == 0);
    cache.free(fork), cache.free(0);
    CHECK(cache.free_pages() == 2);
  }
}

/// An empty list of entries is none of them, also where a vector has no memory; a list without memory is an error.
void lists_of_entries() {
  Random random;
  KVCache cache(kEntries, kCapacity, settings());
  append(cache, Tokens(kEntries, 3, random).tensor, {0, 1, 2});
  const Index zero = 0;
  const Tensor to_zero = Tensor::contiguous(&zero, DType::i64, {1, 1, 1, 1});
  cache.truncate(to_zero, ints({}));
  CHECK(cache.lengths() == std::vector<Index>(kEntries, 3));
  const Tensor lost = Tensor::contiguous(nullptr, DType::i64, {2, 1, 1, 1});
  CHECK(refused([&] { cache.truncate(to_zero, lost); }, "entries: is not given, but"));
  cache.truncate(to_zero);
  CHECK(cache.lengths() == std::vector<Index>(kEntries, 0));
}

/// Of forks each keeps a branch of the last tokens, in pages of its own where tokens move.
void branches_stay() {
  Random random;
  for (const Index page_size : {1, 3, 16}) {
    for (int step = 0; step < 40; ++step) {
      const Index old = random.below(20), count = 1 + random.below(9);
      PagedKVCache paged(3 * (old + count), page_size, settings());
      KVCache contiguous(1, kCapacity, settings());
      const Tokens tokens(1, old + count, random);
      paged.add();
      append(paged, tokens.tensor, {0});
      append(contiguous, tokens.tensor, {0});
      const std::vector<Index> forks{paged.fork(0), paged.fork(0)};
      std::vector<Index> branch;
      Rows kept = gathered(paged, 0);
      const Rows all = kept;
      kept.resize(static_cast<std::size_t>(old));
      for (Index token = 0; token < count; ++token) {
        if (random.one_of(2)) continue;
        branch.push_back(token);
        kept.push_back(tokens.row(0, old + token));
      }
      branch.push_back(-1);
      const Tensor of_both =
          Tensor::contiguous(branch.data(), DType::i64, {1, 1, static_cast<Index>(branch.size()), 1});
      paged.accept(of_both, ints({count}), ints(forks));
      contiguous.accept(of_both, ints({count}));
      CHECK(gathered(paged, 0) == all && gathered(contiguous, 0) == kept);
      for (const Index fork : forks) CHECK(gathered(paged, fork) == kept);
      paged.free(0);
      for (const Index fork : forks) paged.free(fork);
      CHECK(paged.free_pages() == paged.pages());
    }
  }
  KVCache cache(1, 4, settings());
  CHECK(refused([&] { cache.accept(ints({0}), ints({1})); }, "new_tokens: is 1"));
}

/// Queries turn by the positions of their tokens.
void queries_turn() {
  Random random;
  CacheSettings turning = settings();
  turning.rotary.emplace().frequencies = {0.5, -0.25};  // of four of the dims
  KVCache cache(kEntries, kCapacity, turning);
  append(cache, Tokens(kEntries, 20, random).tensor, {0, 1, 2}, {20, 7, 1});
  Query query(kEntries);
  cache.attend(query.problem, {}, {}, true);
  const std::vector<float> turned = query.out;
  const std::vector<Index> last{19, 6, 0};
  Rope by_hand = *turning.rotary;
  by_hand.positions = ints(last);
  rope(query.problem.query, by_hand, query.problem.query);
  CHECK(query.of(cache) == turned);
  KVCache plain(1, kCapacity, settings());
  CHECK(refused([&] { plain.attend(Query(1).problem, {}, {}, true); }, "rotate_query: "));
}

void windows_give_pages_back() {
  Random random;
  PagedKVCache cache(5, 4, settings(DType::f32, 6));
  KVCache all(1, 200, settings(DType::f32, 6));
  cache.add();
  for (int step = 0; step < 60; ++step) {
    const Tokens tokens(1, 3, random);
    append(cache, tokens.tensor, {0});
    append(all, tokens.tensor, {0});
    CHECK(Query(1).of(cache) == Query(1).of(all));
  }
  CHECK(cache.length(0) == 180 && cache.kept_from(0) == 168 && cache.free_pages() == 2);
  const Rows kept = gathered(cache, 0, 168), whole = gathered(all, 0);
  CHECK(std::equal(kept.begin(), kept.end(), whole.begin() + 168));
  CHECK(refused([&] { gathered(cache, 0); }, "first: is 0"));
  CHECK(refused([&] { cache.truncate(ints({170})); },
                "lengths: leaves 170 tokens of entry 0, whose tokens before 168 were given back: must be 0 "
                "or at least 174"));
}

/// Quantised numbers are within their bounds; what is not finite is refused, and nothing has changed.
void quantised_tokens() {
  Random random;
  for (const DType dtype : {DType::i8, DType::i4, DType::f8}) {
    PagedKVCache cache(20, 4, settings(dtype));
    cache.add();
    Tokens tokens(1, 11, random);
    append(cache, tokens.tensor, {0});
    const Rows rows = gathered(cache, 0);
    for (Index token = 0; token < 11; ++token) {
      const Row given = tokens.row(0, token);
      for (std::size_t i = 0; i < given.size(); ++i) {
        const auto head = given.begin() + static_cast<Index>(i) / kDim * kDim;
        const double largest = std::abs(
            *std::max_element(head, head + kDim, [](float a, float b) { return std::abs(a) < std::abs(b); }));
        const double x = given[i], steps = dtype == DType::i8 ? 127 : 7;
        const double bound =
            dtype == DType::f8 ? std::max(std::abs(x) / 16, largest / 448 / 1024) : largest / steps / 2;
        CHECK(std::abs(x - static_cast<double>(rows[static_cast<std::size_t>(token)][i])) <=
              bound * (1 + 1e-6));
      }
    }
    tokens.memory.back() = INFINITY;
    CHECK(refused([&] { append(cache, tokens.tensor, {0}); }, "key: has a NaN or an infinity"));
    CHECK(gathered(cache, 0) == rows && cache.free_pages() == 17);
  }
}

/// Values that lie in keys: the results are those of a cache that has both.
void latent() {
  Random random;
  CacheSettings once = settings(), twice = settings();
  once.value_dim = twice.value_dim = 4;
  once.value_in_key = true;
  PagedKVCache paged(20, 4, once), restored(20, 4, once);
  KVCache contiguous(1, 20, once), both(1, 20, twice);
  paged.add();
  const Tokens tokens(1, 11, random);
  NewTokens keys{.key = tokens.tensor}, all = keys;
  all.value = tokens.tensor;
  all.value.shape[3] = 4;
  paged.append(keys);
  contiguous.append(keys);
  both.append(all);
  Query one(1), other(1);
  one.problem.out.shape[3] = other.problem.out.shape[3] = 4;
  CHECK(one.of(contiguous) == other.of(both));
  CHECK(one.of(paged) == other.of(both));
  restored.restore(paged.state());
  CHECK(!paged.state().tokens.value.given() && one.of(restored) == other.of(both));
  CHECK(contiguous.memory().used == 11 * kHeads * kDim * 4 && both.memory().used == 11 * kHeads * 10 * 4);

  std::vector<float> key(tokens.memory.size());
  const Tensor to = Tensor::contiguous(key.data(), DType::f32, tokens.tensor.shape);
  paged.gather(0, 0, to, {});
  CHECK(key == tokens.memory);
  constexpr auto kGiven = "value: is given, the cache's values are the first 4 dims of keys";
  CHECK(refused([&] { paged.append(all); }, kGiven));
  CHECK(refused([&] { paged.gather(0, 0, to, all.value); }, kGiven));
  CHECK(refused([&] { paged.restore(both.state()); }, "state: "));
  CHECK(refused([&] { contiguous.restore(both.state()); }, kGiven));
  CHECK(refused([&] { both.restore(contiguous.state()); }, "value: is not given"));
  CHECK(refused([&] { both.append(keys); }, "value: "));
  CHECK(paged.length(0) == 11 && contiguous.length(0) == 11 && both.length(0) == 11);
}

/// A cancelled append has changed nothing, wherever it ended.
void cancelled() {
  Random random;
  CacheSettings s = settings();
  s.rotary.emplace();
  PagedKVCache cache(100, 4, s);
  cache.add();
  const Tokens first(1, 6, random), tokens(2, 170, random);
  cache.append({.key = first.tensor, .value = first.tensor});
  cache.fork(0);
  for (int calls = 0; calls < 8; ++calls) {
    int left = calls;
    const Options options{.num_threads = 1, .cancelled = [&] { return left-- == 0; }};
    bool ended = false;
    try {
      append(cache, tokens.tensor, {0, 1}, {}, options);
    } catch (const Cancelled&) {
      ended = true;
    }
    if (!ended) break;
    CHECK(cache.free_pages() == 98 && cache.length(0) == 6 && cache.length(1) == 6 &&
          shared_pages(cache) == 2);
  }
  CHECK(cache.length(0) == 6);
}

}  // namespace

int main() {
  tokens_come_back();
  forks_share_pages();
  forks_write_at_once();
  lists_of_entries();
  branches_stay();
  queries_turn();
  windows_give_pages_back();
  quantised_tokens();
  latent();
  cancelled();
  return finish();
}
