// What kernels of one ISA are made of, against loops: registers, items in memory, packed panels.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/kernels/probe.h"
#include "isa_test.h"

namespace {

using namespace attncore;

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();

// ---- registers
// -------------------------------------------------------------------------------------------------------

template <class T>
void registers() {
  constexpr int n = kWidth<Isa, T>;
  Vec<Isa, T> rows[n];
  for (int i = 0; i < n; ++i) rows[i] = lanes<Isa, T>() + static_cast<T>(i * n);
  transpose<Isa, T>(rows);
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j < n; ++j) CHECK(rows[i][j] == static_cast<T>(j * n + i));
  }
  Random random;
  for (int repeat = 0; repeat < 1000; ++repeat) {
    Vec<Isa, T> v;
    T sum = 0, highest = -kInfinity<T>;
    for (int i = 0; i < n; ++i) {
      v[i] = static_cast<T>(random.below(2000) - 1500);  // sums of integers are exact
      sum += v[i];
      if (repeat % 3 == 0 && i != repeat % n) v[i] = -kInfinity<T>;
      highest = std::max(highest, T(v[i]));
    }
    if (repeat % 3 != 0) CHECK((horizontal_sum<Isa, T>(v) == sum));
    CHECK((horizontal_max<Isa, T>(v) == highest));
  }
}

// ---- items in memory
// ---------------------------------------------------------------------------------------------------

/// Memory between two pages that must not be touched.
class Guarded {
 public:
  explicit Guarded(Index bytes) : page_(sysconf(_SC_PAGESIZE)), bytes_(round_up(bytes, page_)) {
    memory_ = static_cast<std::byte*>(
        mmap(nullptr, mapped(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(memory_, static_cast<std::size_t>(page_), PROT_NONE);
    mprotect(memory_ + page_ + bytes_, static_cast<std::size_t>(page_), PROT_NONE);
    memory_ += page_;
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { munmap(memory_ - page_, mapped()); }

  [[nodiscard]] Index bytes() const { return bytes_; }
  [[nodiscard]] std::byte* begin() const { return memory_; }
  /// Where an array with bytes at low … high − 1 of its origin lies, at the end of this memory or at its
  /// beginning.
  [[nodiscard]] std::byte* place(Index low, Index high, bool at_end) const {
    return at_end ? memory_ + bytes_ - high : memory_ - low;
  }
  void fill(Random& random) const {
    for (Index i = 0; i < bytes_; i += 4) {
      const std::uint32_t finite = random.bits() & 0xbfbfbfbfU;  // in every format, at any address
      std::memcpy(memory_ + i, &finite, 4);
    }
  }

 private:
  [[nodiscard]] std::size_t mapped() const { return static_cast<std::size_t>(bytes_ + 2 * page_); }

  Index page_, bytes_;
  std::byte* memory_;
};

template <class T, DType kStorage>
void items(const Guarded& memory) {
  constexpr Index n = kWidth<Isa, T>;
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  Random random;
  for (const Index stride : {kItem, 2 * kItem, kItem + 1, Index{3} * n * kItem, -kItem, -kItem - 1}) {
    for (Index count = 0; count <= n; ++count) {
      const Index reach = std::max<Index>(count - 1, 0) * stride;
      for (const bool at_end : {true, false}) {
        memory.fill(random);
        std::byte* const p = memory.place(std::min<Index>(reach, 0),
                                          std::max<Index>(reach, 0) + (count > 0 ? kItem : 0), at_end);
        const Vec<Isa, T> v = load_items<Isa, T, kStorage>(p, stride, count);
        for (Index i = 0; i < n; ++i) {
          CHECK(v[i] == (i < count ? load_scalar<Isa, T>(p + i * stride, kStorage) : T(0)));
        }
        // Written back negated: each item changes in its sign, and nothing else does.
        std::vector<std::byte> want(memory.begin(), memory.begin() + memory.bytes());
        for (Index i = 0; i < count; ++i)
          want[static_cast<std::size_t>(p - memory.begin() + i * stride + kItem - 1)] ^= std::byte{0x80};
        if (stride * stride >= kItem * kItem) store_items<Isa, T, kStorage>(p, stride, count, -v);
        CHECK(std::equal(want.begin(), want.end(), memory.begin()));
      }
    }
  }
  memory.fill(random);
  const std::byte* const last = memory.place(0, kItem, true);
  for (Index i = 0; i < n; ++i) {
    CHECK((load_items<Isa, T, kStorage>(last, 0, n)[i] == load_scalar<Isa, T>(last, kStorage)));
  }
}

// ---- panels
// ------------------------------------------------------------------------------------------------------------

/// Packs `keys` tokens of `dims` items from `first` on, both ways, and reads the panels.
template <class T, DType kStorage>
void check_packing(const Guarded& memory, Index keys, Index dims, Index first, Index token_stride,
                   Index dim_stride) {
  constexpr Index n = kWidth<Isa, T>;
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  const Index tokens[] = {first * token_stride, (first + keys - 1) * token_stride};
  const Index along = (dims - 1) * dim_stride;
  const Index low = std::min(tokens[0], tokens[1]) + std::min<Index>(along, 0);
  const Index high = std::max(tokens[0], tokens[1]) + std::max<Index>(along, 0) + kItem;
  for (const bool at_end : {true, false}) {
    const KeySource source{memory.place(low, high, at_end), token_stride, dim_stride, kStorage};
    OwnPanel<T> transposed(keys, dims), rows(dims, keys);
    pack_transposed<Isa, T, kStorage>(transposed.panel, source, first);
    CHECK((pack_rows<Isa, T, kStorage>(rows.panel, source, first)));
    for (Index key = 0; key < round_up(keys, n); ++key) {
      for (Index dim = 0; dim < round_up(dims, n); ++dim) {
        T want = 0;  // in the padding
        if (key < keys && dim < dims) {
          want = load_scalar<Isa, T>(source.data + (first + key) * token_stride + dim * dim_stride, kStorage);
        }
        if (dim < dims) CHECK(transposed(dim, key) == want);
        if (key < keys) CHECK(rows(key, dim) == want);
      }
    }
  }
}

template <class T, DType kStorage>
void packing(const Guarded& memory) {
  constexpr Index n = kWidth<Isa, T>;
  constexpr Index kItem = sizeof(typename Storage<kStorage>::Item);
  Random random;
  memory.fill(random);
  for (const Index keys : {Index{1}, n - 1, n, Isa::kColumns * n, Isa::kColumns * n + n + 1, Index{37}}) {
    for (const Index dims : {Index{1}, n, n + 1, Index{2} * n + 3, Index{2} * Isa::kColumns * n}) {
      const Index row = dims * kItem;
      for (const Index token_stride : {row, -row, row + 1, 3 * row + 5, Index{0}}) {
        check_packing<T, kStorage>(memory, keys, dims, random.below(4), token_stride, kItem);
        check_packing<T, kStorage>(memory, keys, dims, random.below(4), token_stride, -kItem);
      }
      check_packing<T, kStorage>(memory, keys, dims, 2, kItem, keys * kItem);
      check_packing<T, kStorage>(memory, keys, dims, 2, kItem + 1, keys * (kItem + 1) + 1);
      check_packing<T, kStorage>(memory, keys, dims, 1, row, 0);
    }
  }
}

/// pack_rows finds an Inf or a NaN wherever it stands.
template <class T>
void poison() {
  constexpr DType kStorage = sizeof(T) == 8 ? DType::f64 : DType::f32;
  constexpr std::size_t dims = 2 * kWidth<Isa, T> + 3, keys = 5;
  for (const T bad : {kInfinity<T>, -kInfinity<T>, std::numeric_limits<T>::quiet_NaN()}) {
    for (std::size_t place = 0; place < dims * keys; ++place) {
      std::vector<T> values(dims * keys, std::numeric_limits<T>::max());
      values[place] = bad;
      OwnPanel<T> panel(dims, keys);
      const KeySource source{reinterpret_cast<const std::byte*>(values.data()), dims * sizeof(T), sizeof(T),
                             kStorage};
      CHECK(!(pack_rows<Isa, T, kStorage>(panel.panel, source, 0)));
      values[place] = 0;
      CHECK((pack_rows<Isa, T, kStorage>(panel.panel, source, 0)));
    }
  }
}

/// The bandwidth probe reads every byte of what it is given, in each of its ways.
void reading() {
  for (const Index bytes : {kReadStep, 3 * kReadStep}) {
    std::vector<std::uint64_t> words(static_cast<std::size_t>(bytes / 8));
    const auto* const memory = reinterpret_cast<const std::byte*>(words.data());
    for (int pattern = 0; pattern < kReadPatterns; ++pattern) {
      CHECK(read_memory<Isa>(memory, bytes, pattern) == 0);
      for (std::size_t i = 0; i < words.size(); ++i) {
        words[i] = std::uint64_t{1} << i % 64;
        CHECK(read_memory<Isa>(memory, bytes, pattern) == words[i]);
        words[i] = 0;
      }
    }
  }
}

}  // namespace

void test() {
  const Guarded page(1), memory(Index{1} << 18);
  registers<float>();
  registers<double>();
  items<float, DType::f32>(page);
  items<float, DType::f16>(page);
  items<float, DType::bf16>(page);
  items<double, DType::f64>(page);
  items<double, DType::f32>(page);
  packing<float, DType::f32>(memory);
  packing<float, DType::f16>(memory);
  packing<float, DType::bf16>(memory);
  packing<double, DType::f64>(memory);
  poison<float>();
  poison<double>();
  reading();
}
