// The caches: states of any content, calls at once, address space.
#include <thread>

#include "cache_kit.h"

namespace {

template <class Cache>
void restores(Cache& cache, Cache& other, Index entries) {
  const CacheState state = cache.state();
  other.restore(state);
  CHECK(other.lengths() == cache.lengths());
  for (Index entry = 0; entry < entries; ++entry) CHECK(gathered(other, entry) == gathered(cache, entry));
}

/// States of any content are taken or refused, but never followed out of bounds.
void states() {
  Random random;
  KVCache contiguous(kEntries, kCapacity, settings()), same(kEntries, kCapacity, settings());
  PagedKVCache paged(30, 4, settings()), smaller(10, 4, settings());
  const Tokens tokens(kEntries, 11, random);
  for (int i = 0; i < 3; ++i) paged.add();
  append(contiguous, tokens.tensor, {0, 1, 2}, {11, 0, 3});
  append(paged, tokens.tensor, {0, 1, 2}, {11, 0, 3});
  paged.truncate(ints({6}), ints({paged.fork(0)}));
  restores(contiguous, same, 3);
  restores(paged, smaller, 4);
  CHECK(smaller.free_pages() == 6);
  PagedKVCache three(30, 4, settings());
  for (int i = 0; i < 3; ++i) three.add();
  append(three, tokens.tensor, {0, 1, 2}, {1, 2, 3});
  CHECK(refused([&] { same.restore(three.state()); }, "state: is a paged cache's"));
  for (int round = 0; round < 3000; ++round) {
    CacheState state = paged.state();
    for (std::int64_t changes = 1 + random.below(2); changes > 0; --changes) {
      const Index value = random.one_of(4) ? Index{1} << random.below(63) : random.below(14) - 2;
      std::vector<Index>* const lists[] = {&state.lengths, &state.page_lengths, &state.given_back,
                                           &state.tables[static_cast<std::size_t>(random.below(4))]};
      std::vector<Index>& list = *lists[random.below(4)];
      if (random.one_of(6)) list.push_back(value);
      if (random.one_of(6) && !list.empty()) list.pop_back();
      if (!list.empty())
        list[static_cast<std::size_t>(random.below(static_cast<Index>(list.size())))] = value;
    }
    try {
      smaller.restore(state);
    } catch (const std::invalid_argument&) {
    } catch (const CacheFull&) {
    }
    const auto entries = static_cast<Index>(smaller.entries().size());
    CHECK(Query(entries).of(smaller).size() == static_cast<std::size_t>(entries * kHeads * kDim));
  }
}

/// From inside a call, as from another thread: readers may come together, a writer is alone.
void calls_at_once() {
  Random random;
  KVCache cache(1, 4000, settings());
  const Tokens tokens(1, 1500, random), none(1, 0, random);
  append(cache, tokens.tensor, {0});
  int inside = 0;
  const auto look = [&](bool writing) {
    return Options{
        .num_threads = 1, .cancelled = [&cache, &none, &inside, writing] {
          if (inside++ > 0) return false;
          CHECK(refused<InUse>([&] { append(cache, none.tensor, {0}); }, "cache: another thread is "));
          CHECK(refused<InUse>([&] { cache.truncate(ints({0})); }, "cache: another thread is "));
          CHECK(refused<InUse>([&] { (void)cache.lengths(); }, "cache: another thread is ") == writing);
          CHECK(refused<InUse>([&] { (void)cache.length(0); }, "cache: another thread is ") == writing);
          CHECK(refused<InUse>([&] { (void)cache.memory(); }, "cache: another thread is ") == writing);
          CHECK(refused<InUse>([&] { (void)cache.state(); }, "cache: another thread is ") == writing);
          CHECK(refused<InUse>([&] { Query(1).of(cache); }, "cache: another thread is ") == writing);
          return false;
        }};
  };
  append(cache, tokens.tensor, {0}, {}, look(true));
  CHECK(inside > 1 && cache.length(0) == 3000);
  const std::vector<float> expected = Query(1).of(cache);
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int repeat = 0; repeat < 20; ++repeat) CHECK(Query(1).of(cache) == expected);
    });
  }
  for (std::thread& thread : threads) thread.join();
  append(cache, tokens.tensor, {0}, {1000});
  CHECK(cache.length(0) == 4000);
  CHECK(refused<CacheFull>([&] { append(cache, tokens.tensor, {0}, {1}); },
                           "append: entry 0 has 4000 of 4000 tokens"));
}

/// Every call of a paged cache, from inside an append.
void paged_calls_at_once() {
  Random random;
  PagedKVCache cache(30, 4, settings());
  const Index entry = cache.add();
  const Tokens tokens(1, 20, random);
  append(cache, tokens.tensor, {entry});
  const CacheState before = cache.state();
  const std::vector<std::function<void()>> calls{[&] { (void)cache.add(); },
                                                 [&] { (void)cache.fork(entry); },
                                                 [&] { cache.free(entry); },
                                                 [&] { cache.truncate(ints({3}), ints({entry})); },
                                                 [&] { append(cache, tokens.tensor, {entry}); },
                                                 [&] { cache.restore(before); },
                                                 [&] { (void)cache.state(); },
                                                 [&] { (void)cache.memory(); },
                                                 [&] { (void)cache.free_pages(); },
                                                 [&] { (void)cache.entries(); },
                                                 [&] { (void)cache.lengths(); },
                                                 [&] { (void)cache.length(entry); },
                                                 [&] { (void)cache.block_table(entry); },
                                                 [&] { (void)cache.reference_counts(); },
                                                 [&] { (void)cache.kept_from(entry); },
                                                 [&] { (void)gathered(cache, entry); },
                                                 [&] { Query(1).of(cache); }};
  int denied = 0;
  const auto look = [&] {
    if (denied > 0) return false;
    for (const auto& call : calls) denied += int(refused<InUse>(call, "cache: another thread is changing"));
    return false;
  };
  append(cache, tokens.tensor, {entry}, {}, {.num_threads = 1, .cancelled = look});
  CHECK(denied == static_cast<int>(calls.size()));
  CHECK(cache.entries() == std::vector<Index>{entry} && cache.length(entry) == 40);
}

/// Reserved is not used: address space far beyond this machine's memory.
void address_space() {
  Random random;
  KVCache cache(4, Index{1} << 27, settings());
  const Tokens tokens(4, 5, random);
  append(cache, tokens.tensor, {0, 1, 2, 3});
  CHECK(cache.memory().reserved == 2 * 4 * kHeads * kDim * 4 * (Index{1} << 27));
  CHECK(cache.memory().used == 2 * 4 * kHeads * kDim * 4 * 5);
  CHECK(gathered(cache, 3)[4] == tokens.row(3, 4));
  CHECK(refused<CacheFull>([] { KVCache(4, Index{1} << 44, settings()); }, "capacity: "));
}

}  // namespace

int main() {
  states();
  calls_at_once();
  paged_calls_at_once();
  address_space();
  return finish();
}
