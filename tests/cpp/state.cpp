// AttentionState from C++: pieces against the whole, resuming, files, threads, what is refused.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <attncore/state.hpp>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>
#include <thread>

#include "check.h"
#include "kit.h"

namespace {

using namespace attncore;
using Piece = AttentionState::Piece;

constexpr Index kBatch = 2, kHeads = 4, kKvHeads = 2, kQueries = 5, kKeys = 300, kDim = 12, kValueDim = 7;

Tensor part(Tensor t, std::size_t axis, Index first, Index count) {
  t.data = static_cast<std::byte*>(t.data) + first * t.stride[axis];
  t.shape[axis] = count;
  return t;
}

/// Queries, keys and values, and what attention to all of them gives.
struct Case {
  Random random;
  std::vector<float> q = noise(kBatch * kHeads * kQueries * kDim, random),
                     k = noise(kBatch * kKvHeads * kKeys * kDim, random),
                     v = noise(kBatch * kKvHeads * kKeys * kValueDim, random), slopes{0.1F, 0.2F, 0.3F, 0.4F},
                     sinks{1, 2, 3, 4}, scale = noise(kBatch * kKvHeads * kKeys, random);
  std::vector<Index> offset{kKeys - 40, 150};
  Tensor query = Tensor::contiguous(q.data(), DType::f32, {kBatch, kHeads, kQueries, kDim}),
         key = Tensor::contiguous(k.data(), DType::f32, {kBatch, kKvHeads, kKeys, kDim}),
         value = Tensor::contiguous(v.data(), DType::f32, {kBatch, kKvHeads, kKeys, kValueDim}),
         key_scale = Tensor::contiguous(scale.data(), DType::f32, {kBatch, kKvHeads, kKeys, 1});
  AttentionStateSettings settings{.value_dim = kValueDim};

  Case() {
    settings.score.causal = true;
    settings.score.query_offset = Tensor::contiguous(offset.data(), DType::i64, {kBatch, 1, 1, 1});
    settings.score.alibi = Tensor::contiguous(slopes.data(), DType::f32, {1, kHeads, 1, 1});
    settings.score.sinks = Tensor::contiguous(sinks.data(), DType::f32, {1, kHeads, 1, 1});
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case() = default;

  [[nodiscard]] Piece piece(Index first, Index count) const {
    Piece piece{.key = part(key, 2, first, count), .value = part(value, 2, first, count)};
    piece.key_scale = part(key_scale, 2, first, count);
    return piece;
  }

  /// out and lse of all keys.
  [[nodiscard]] std::vector<float> whole() const {
    std::vector<float> results(kBatch * kHeads * kQueries * (kValueDim + 1));
    Problem problem{.query = query, .key = key, .value = value, .key_scale = key_scale};
    problem.score = settings.score;
    float* const lse = results.data() + kBatch * kHeads * kQueries * kValueDim;
    problem.out = Tensor::contiguous(results.data(), DType::f32, {kBatch, kHeads, kQueries, kValueDim});
    problem.lse = Tensor::contiguous(lse, DType::f32, {kBatch, kHeads, kQueries, 1});
    forward(problem);
    return results;
  }
};

template <class T>
std::vector<T> result(const AttentionState& state) {
  std::vector<T> results(kBatch * kHeads * kQueries * (kValueDim + 1));
  const DType dtype = state.settings().dtype;
  T* const lse = results.data() + kBatch * kHeads * kQueries * kValueDim;
  state.result(Tensor::contiguous(results.data(), dtype, {kBatch, kHeads, kQueries, kValueDim}),
               Tensor::contiguous(lse, dtype, {kBatch, kHeads, kQueries, 1}));
  return results;
}

template <class T>
bool close(const std::vector<T>& a, const std::vector<float>& b) {
  bool same = a.size() == b.size();
  for (std::size_t i = 0; same && i < a.size(); ++i) same = std::fabs(double(a[i]) - double(b[i])) < 2e-6;
  return same;
}

void pieces() {
  Case c;
  for (const DType dtype : {DType::f32, DType::f64}) {
    c.settings.dtype = dtype;
    AttentionState state(c.query, c.settings), other(c.query, c.settings);
    const auto is_whole = [&] {
      return dtype == DType::f32 ? close(result<float>(state), c.whole())
                                 : close(result<double>(state), c.whole());
    };
    for (Index first = 0; first < 200; first += 40) state.update(c.piece(first, 40));
    Index at = 200;
    Piece last = c.piece(200, 100);
    last.first_key = Tensor::contiguous(&at, DType::i64, {1, 1, 1, 1});
    other.update(last, {.num_threads = 2});
    CHECK(!is_whole());
    state.merge(other);
    CHECK(is_whole());
    CHECK(state.settings().score.scale == 1 / std::sqrt(double(kDim)));
  }
}

/// A state's parts carried over, after some pieces, to another one: the bits are those of a state that saw all.
void resuming() {
  Case c;
  c.settings.dtype = DType::f64;
  AttentionState first(c.query, c.settings), second(c.query, c.settings), all(c.query, c.settings);
  for (AttentionState* const state : {&first, &all}) state->update(c.piece(0, 111));
  std::vector<Tensor> parts;
  first.read_parts([&](const AttentionState::Part& p) { parts.push_back(p.tensor); });
  std::size_t number = 0;
  second.write_parts([&](const AttentionState::Part& p) {
    const Tensor& from = parts[number++];
    const Index items = from.shape[0] * from.shape[1] * from.shape[2] * from.shape[3];
    CHECK(from.shape == p.tensor.shape && from.dtype == p.tensor.dtype);
    std::memcpy(p.tensor.data, from.data, static_cast<std::size_t>(items * item_size(from.dtype)));
  });
  CHECK(number == 6);
  AttentionState moved = std::move(second);
  for (AttentionState* const state : {&moved, &all}) state->update(c.piece(111, kKeys - 111));
  CHECK(result<double>(moved) == result<double>(all));
}

/// Keys in a mapped file: its pages are given back, what was written to them stays.
void files() {
  constexpr Index kTokens = 30'000, kWidth = 64;
  constexpr std::size_t kBytes = kTokens * kWidth * 4;
  std::FILE* const file = std::tmpfile();
  CHECK(file != nullptr && ftruncate(fileno(file), kBytes) == 0);
  void* const mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fileno(file), 0);
  CHECK(mapped != MAP_FAILED);
  auto* const numbers = static_cast<float*>(mapped);
  for (Index i = 0; i < kTokens * kWidth; ++i) numbers[i] = float(i % 7);
  const std::vector<float> query(kWidth, 0.1F), copy(numbers, numbers + kTokens * kWidth);
  AttentionState mine(Tensor::contiguous(query.data(), DType::f32, {1, 1, 1, kWidth}), {.dtype = DType::f64}),
      other(Tensor::contiguous(query.data(), DType::f32, {1, 1, 1, kWidth}), {.dtype = DType::f64});
  Piece piece;
  piece.key = piece.value = Tensor::contiguous(mapped, DType::f32, {1, 1, kTokens, kWidth});
  piece.mappings.push_back({mapped, kBytes});
  mine.update(piece);
  CHECK(std::equal(copy.begin(), copy.end(), numbers));
  piece.key = piece.value = Tensor::contiguous(copy.data(), DType::f32, {1, 1, kTokens, kWidth});
  other.update(piece);  // outside of the mapping: nothing is given back
  std::vector<double> results[2];
  for (auto& r : results) {
    r.resize(kWidth + 1);
    (&r == results ? mine : other)
        .result(Tensor::contiguous(r.data(), DType::f64, {1, 1, 1, kWidth}),
                Tensor::contiguous(r.data() + kWidth, DType::f64, {1, 1, 1, 1}));
  }
  CHECK(results[0] == results[1]);
  munmap(mapped, kBytes);
  std::fclose(file);
}

void wrong() {
  Case c;
  AttentionState state(c.query, c.settings), other(c.query, {.value_dim = kValueDim});
  state.update(c.piece(0, 50));
  const auto before = result<float>(state);
  Piece piece = c.piece(0, 10);
  std::swap(piece.key, piece.value);
  CHECK(refused([&] { state.update(piece); }, "key: shape"));
  CHECK(refused([&] { state.update({}); }, "key: "));
  CHECK(refused([&] { state.merge(other); }, "other: has another window"));
  CHECK(refused([&] { state.merge(state); }, "other: is the state itself"));
  CHECK(refused<Cancelled>([&] { state.update(c.piece(0, 10), {.cancelled = [] { return true; }}); },
                           "the call"));
  CHECK(refused([&] { state.result(c.query, {}); }, "out: shape"));
  CHECK(result<float>(state) == before);
  AttentionStateSettings settings = c.settings;
  settings.score.mask = Tensor::contiguous(&c, DType::boolean, {1, 1, 1, 1});
  CHECK(refused([&] { AttentionState made(c.query, settings); }, "mask: is given for all pieces"));
  settings = c.settings;
  settings.score.query_offset = {};
  CHECK(refused([&] { AttentionState made(c.query, settings); }, "query_offset: is not given"));
  CHECK(refused<DTypeError>([&] { AttentionState made(c.query, {.dtype = DType::bf16}); }, "dtype: "));
  CHECK(refused([&] { AttentionState made(c.query, {.value_dim = -1}); }, "value_dim: is -1"));
}

/// A piece of several stretches, cancelled anywhere: nothing of it has been taken into account.
void cancelled() {
  Case c;
  c.settings = {.dtype = DType::f64, .value_dim = kValueDim};  // float32 is converted: 4 MiB at a time
  AttentionState state(c.query, c.settings);
  Piece piece = c.piece(0, 50);
  piece.key_scale = {};
  state.update(piece);
  const auto before = result<double>(state);
  for (Tensor* const t : {&piece.key, &piece.value}) {  // the same token 40000 times
    t->shape[2] = 40000;
    t->stride[2] = 0;
  }
  constexpr int kPlaces = 9;
  int polls = 0;
  AttentionState counted(c.query, c.settings);
  counted.update(piece, {.num_threads = 1, .cancelled = [&] { return ++polls < 0; }});
  for (int place = 0; place < kPlaces; ++place) {
    int left = polls * place / kPlaces;
    CHECK(refused<Cancelled>(
        [&] { state.update(piece, {.num_threads = 1, .cancelled = [&] { return left-- == 0; }}); },
        "the call"));
    CHECK(result<double>(state) == before);
  }
  CHECK(polls > kPlaces);
}

/// A call from within a call (as from another thread) is refused; calls that read go together.
void one_at_a_time() {
  Case c;
  AttentionState state(c.query, c.settings), other(c.query, c.settings);
  std::atomic<int> refusals = 0;
  const auto call = [&] {
    refusals += int(refused<InUse>([&] { (void)result<float>(state); }, "state: another thread is changing"));
    refusals +=
        int(refused<InUse>([&] { state.update(c.piece(0, 10)); }, "state: another thread is changing"));
    refusals += int(refused<InUse>([&] { other.merge(state); }, "other: another thread is changing"));
  };
  state.write_parts([&](const AttentionState::Part& p) {
    if (std::strcmp(p.name, "sum") == 0) std::thread(call).join();
  });
  CHECK(refusals == 3);
  state.read_parts([&](const AttentionState::Part&) {
    CHECK(result<float>(state).size() == result<float>(other).size());
    other.merge(state);
    refusals += int(refused<InUse>([&] { state.merge(other); }, "state: another thread is reading"));
  });
  CHECK(refusals == 3 + 4);  // a float32 state has four parts

  std::vector<std::thread> threads;
  threads.reserve(4);
  std::atomic<int> done = 0;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int tries = 0; tries < 20; ++tries) {
        try {
          state.update(c.piece(0, 10), {.num_threads = 2});
          ++done;
        } catch (const InUse&) {
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  Index seen = 0;
  state.read_parts([&](const AttentionState::Part& p) {
    if (std::strcmp(p.name, "next_key") == 0) seen = *static_cast<const Index*>(p.tensor.data);
  });
  CHECK(seen == 10 * done);
}

}  // namespace

int main() try {
  for (const std::string& name : available_isas()) {
    use_isa(name);
    pieces();
    resuming();
    files();
  }
  wrong();
  cancelled();
  one_at_a_time();
  return finish();
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
