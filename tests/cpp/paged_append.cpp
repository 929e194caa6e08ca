// append_paged() with random tables and lengths, in buffers of exactly their size, against a model that writes item by item:
// it refuses what the model refuses, and then has written nothing.
#include <attncore/cache.hpp>
#include <map>
#include <set>

#include "check.h"
#include "kit.h"
#include "paged_case.h"

namespace {

using namespace paged_case;

using Slot = std::pair<Index, Index>;  // page, slot

struct Append {
  Random& random;
  Index batch, heads, tokens, dim, value_dim, pages, slots, width;
  bool wide_ints, packed;
  DType dtype;
  std::vector<Index> table, before, count, starts{0};
  Buffer key, value, key_pages, value_pages, key_scale, value_scale, table_memory, before_memory,
      count_memory, starts_memory;
  PagedAppend call;

  explicit Append(Random& random) : random(random) {
    constexpr DType kStored[] = {DType::f32,  DType::f32, DType::f64, DType::f16,
                                 DType::bf16, DType::i8,  DType::f8,  DType::i4};
    batch = random.below(4), heads = 1 + random.below(2), tokens = random.below(9);
    dim = 2 * (1 + random.below(6)), value_dim = 2 * (1 + random.below(6));
    pages = 1 + random.below(14), slots = 1 + random.below(5), width = random.below(5);
    wide_ints = random.one_of(2), packed = random.one_of(3), dtype = kStored[random.below(8)];
    for (Index entry = 0; entry < batch; ++entry) {
      const Index end =
          entry + 1 == batch ? tokens : starts.back() + random.below(tokens - starts.back() + 1);
      starts.push_back(packed ? end : 0);
      const Index most = packed ? end - starts[starts.size() - 2] : tokens;
      count.push_back(random.one_of(3) ? most : random.below(most + 1));
      if (random.one_of(60)) count.back() = random.one_of(2) ? -1 : most + 1;
      before.push_back(random.one_of(40) ? random.below(40) - 5 : random.below(width * slots + 1) / 2);
      for (Index i = 0; i < width; ++i)
        table.push_back(random.one_of(60) ? random.below(2 * pages) - pages / 2 : random.below(pages));
    }
    if (packed && batch == 0) tokens = 0;
    if (random.one_of(2)) deal();
    set_call();
  }

  /// Pages of their own for all, as far as there are enough: else too few appends would be good.
  void deal() {
    std::vector<Index> order;
    for (Index page = 0; page < pages; ++page) order.insert(order.begin() + random.below(page + 1), page);
    for (std::size_t i = 0; i < table.size() && i < order.size(); ++i) table[i] = order[i];
  }

  Tensor floats(Buffer& memory, Index dims) {
    const Index entries = packed ? 1 : batch;
    memory = Buffer(static_cast<std::size_t>(entries * heads * tokens * dims * 4));
    for (Index i = 0; i < entries * heads * tokens * dims; ++i)
      put(random, memory.bytes.get(), i, DType::f32);
    return Tensor::contiguous(memory.bytes.get(), DType::f32, {entries, heads, tokens, dims});
  }

  Tensor pool(Buffer& memory, Index dims, DType type) const {
    Tensor t = Tensor::contiguous(nullptr, type, {pages, heads, slots, dims});
    memory = Buffer(static_cast<std::size_t>(t.stride[0] * pages));
    t.data = memory.bytes.get();
    return t;
  }

  void set_call() {
    call.key = floats(key, dim), call.value = floats(value, value_dim);
    call.key_pages = pool(key_pages, dim, dtype), call.value_pages = pool(value_pages, value_dim, dtype);
    if (dtype == DType::i8 || dtype == DType::f8 || dtype == DType::i4) {
      call.key_scale = pool(key_scale, 1, DType::f32), call.value_scale = pool(value_scale, 1, DType::f32);
    }
    call.block_table = ints(table_memory, table, width, wide_ints);
    call.block_table.shape[0] = batch;
    call.key_lengths = ints(before_memory, before, 1, wide_ints);
    call.lengths = ints(count_memory, count, 1, wide_ints);
    if (packed) call.token_starts = ints(starts_memory, starts, 1, wide_ints);
  }

  [[nodiscard]] Index page(Index entry, Index token) const {
    return table[static_cast<std::size_t>(entry * width + token / slots)];
  }

  [[nodiscard]] bool lengths_fit() const {
    for (std::size_t entry = 0; entry < before.size(); ++entry) {
      const Index most = packed ? starts[entry + 1] - starts[entry] : tokens;
      if (count[entry] < 0 || count[entry] > most || before[entry] < 0) return false;
      if (before[entry] + count[entry] > width * slots) return false;
    }
    return true;
  }

  /// Whether the append is good.
  [[nodiscard]] bool good() const {
    if (!lengths_fit()) return false;
    std::set<Slot> live;
    std::map<Index, Slot> writer;  // page → entry, place
    for (Index entry = 0; entry < batch; ++entry) {
      for (Index token = 0; token < before[static_cast<std::size_t>(entry)]; ++token)
        live.insert({page(entry, token), token % slots});
    }
    for (Index entry = 0; entry < batch; ++entry) {
      const Index first = before[static_cast<std::size_t>(entry)];
      for (Index token = first; token < first + count[static_cast<std::size_t>(entry)]; ++token) {
        const Index number = page(entry, token);
        if (number < 0 || number >= pages || live.contains({number, token % slots})) return false;
        const Slot by{entry, token / slots};
        if (writer.emplace(number, by).first->second != by) return false;
      }
    }
    return true;
  }
};

bool all_zero(const Buffer& b) {
  return std::all_of(b.bytes.get(), b.bytes.get() + b.size, [](std::byte x) { return x == std::byte{0}; });
}

/// float32 pages after a good append.
void check_items(const Append& a, const Tensor& from, const Tensor& pages) {
  std::vector<float> expected(static_cast<std::size_t>(a.pages * a.heads * a.slots * from.shape[3]));
  const Index dims = from.shape[3];
  for (Index entry = 0; entry < a.batch; ++entry) {
    const Index first = a.before[static_cast<std::size_t>(entry)];
    for (Index i = 0; i < a.count[static_cast<std::size_t>(entry)] * a.heads * dims; ++i) {
      const Index token = i / dims / a.heads, head = i / dims % a.heads;
      const Index in_batch = a.packed ? 0 : entry;
      const Index at = token + (a.packed ? a.starts[static_cast<std::size_t>(entry)] : 0);
      const Index item = ((in_batch * a.heads + head) * a.tokens + at) * dims + i % dims;
      const Index slot =
          (a.page(entry, first + token) * a.heads + head) * a.slots + (first + token) % a.slots;
      expected[static_cast<std::size_t>(slot * dims + i % dims)] = static_cast<const float*>(from.data)[item];
    }
  }
  CHECK(std::memcmp(expected.data(), pages.data, expected.size() * sizeof(float)) == 0);
}

void fuzz(int repeats) {
  Random random;
  int good = 0, bad = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    Append a(random);
    bool thrown = false;
    try {
      append_paged(a.call);
    } catch (const std::invalid_argument&) {
      thrown = true;
    }
    CHECK(thrown == !a.good());
    ++(thrown ? bad : good);
    if (thrown) {
      CHECK(all_zero(a.key_pages) && all_zero(a.value_pages) && all_zero(a.key_scale) &&
            all_zero(a.value_scale));
    } else if (a.dtype == DType::f32) {
      check_items(a, a.call.key, a.call.key_pages);
      check_items(a, a.call.value, a.call.value_pages);
    }
  }
  std::printf("%d good, %d bad\n", good, bad);
  CHECK(good > repeats / 4 && bad > repeats / 4);
}

/// What has a shape and no memory is no tensor that was left out.
void without_memory() {
  Random random;
  const auto refuses = [&](Tensor PagedAppend::* which, const char* text) {
    for (;;) {
      Append a(random);
      if (a.batch == 0 || a.width == 0 || !a.good()) continue;
      (a.call.*which).data = nullptr;
      return refused([&] { append_paged(a.call); }, text);
    }
  };
  CHECK(refuses(&PagedAppend::block_table, "block_table: is not given, but has the shape ("));
  CHECK(refuses(&PagedAppend::key_lengths, "key_lengths: is not given, but has the shape ("));
  CHECK(refuses(&PagedAppend::lengths, "lengths: is not given, but has the shape ("));
}

}  // namespace

int main() {
  fuzz(20000);
  without_memory();
  return finish();
}
