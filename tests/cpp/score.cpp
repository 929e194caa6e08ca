// The score steps that hide keys, against one (row, key) at a time: what a block may see, whether a tile has
// work, and which scores are hidden once the steps are applied.

#include "check.h"
#include "cpu/tile/score_math.h"
#include "random.h"
#include "score/steps.h"
#include "segment_ranges.h"

namespace {

using namespace attncore;

struct TestIsa {
  static constexpr int kBytes = 16;
};
using Math = ScoreMath<TestIsa, float>;
constexpr Index kLanes = kWidth<TestIsa, float>;

/// A small call with arrays of its own: one sequence, shorter than the arrays.
struct Case {
  Call call;
  Sequence sequence;
  Index kv_head = 0;
  std::vector<std::uint8_t> mask;
  std::vector<std::int32_t> query_segments;
  std::vector<std::int64_t> key_segments;

  explicit Case(Random& random) {
    call.batch = 2, call.group = 1 + random.below(3), call.kv_heads = 1 + random.below(2);
    call.heads = call.group * call.kv_heads;
    call.queries = 1 + random.below(9), call.keys = 1 + random.below(24);
    sequence = {random.below(2), 1 + random.below(call.queries), 1 + random.below(call.keys),
                random.below(40) - 20};
    place(random.one_of(2));
    kv_head = random.below(call.kv_heads);
    if (random.one_of(2)) call.score.left = random.one_of(2) ? random.below(12) : Index{1} << 60;
    if (random.one_of(2)) call.score.right = random.one_of(2) ? random.below(12) : 0;
    if (random.one_of(2)) add_mask(random);
    if (random.one_of(2)) add_segments(random);
  }
  Case(const Case&) = delete;
  Case& operator=(const Case&) = delete;
  ~Case() = default;

  /// Tokens stand in arrays (batch, token), or packed in (1, token): the same memory.
  void place(bool packed) {
    const Index batch = sequence.batch;
    sequence.query_place = {batch, 0, call.queries}, sequence.key_place = {batch, 0, call.keys};
    if (packed) sequence.query_place = {0, batch * call.queries, call.queries};
    if (packed) sequence.key_place = {0, batch * call.keys, call.keys};
  }

  void add_mask(Random& random) {
    std::array<Index, 4> shape{call.batch, call.heads, call.queries, call.keys};
    for (std::size_t axis = 0; axis < 4; ++axis) shape[axis] = random.one_of(3) ? 1 : shape[axis];
    mask.resize(static_cast<std::size_t>(shape[0] * shape[1] * shape[2] * shape[3]));
    const Index seldom = 1 + random.below(40);
    const bool otherwise = random.one_of(2);  // mostly True or mostly False, so that whole tiles are
    for (std::uint8_t& item : mask) item = random.one_of(seldom) == otherwise ? 0 : 1;
    Tensor& t = call.score.mask = Tensor::contiguous(mask.data(), DType::boolean, shape);
    for (std::size_t axis = 0; axis < 4; ++axis) t.stride[axis] = shape[axis] == 1 ? 0 : t.stride[axis];
    t.shape = {call.batch, call.heads, call.queries, call.keys};
  }

  void add_segments(Random& random) {
    const Index length = 1 + random.below(20);
    const bool in_order = random.one_of(2), steps = random.one_of(3);
    const auto any = [&](Index token) {
      if (!in_order && random.one_of(9)) return random.below(5);
      return steps ? 7 - token / length / 2 * 2 : token / length;  // falling, and some of queries only
    };
    for (Index i = 0; i < call.batch * call.queries; ++i) query_segments.push_back(static_cast<int>(any(i)));
    for (Index i = 0; i < call.batch * call.keys; ++i) key_segments.push_back(any(i));
    call.score.query_segments =
        Tensor::contiguous(query_segments.data(), DType::i32, {call.batch, 1, call.queries, 1});
    call.score.key_segments =
        Tensor::contiguous(key_segments.data(), DType::i64, {call.batch, 1, call.keys, 1});
    if (random.one_of(4)) return;
    call.sequences = {sequence, sequence};
    resolve_segments(call);
    if (in_order) CHECK(call.segments.of(sequence.query_place) != nullptr);
  }

  // ---- what each step says of one row and one key
  // --------------------------------------------------------------------

  [[nodiscard]] Row row(Index r) const {
    const Index query = r / call.group;
    return row_of(sequence, kv_head * call.group + r % call.group, query);
  }
  [[nodiscard]] bool window_sees(const Row& row, Index key) const {
    const Score& score = call.score;
    return (score.left == kUnbounded || row.position - key <= score.left) &&
           (score.right == kUnbounded || key - row.position <= score.right);
  }
  [[nodiscard]] bool mask_sees(const Row& row, Index key) const {
    return mask.empty() || *at(call.score.mask, row.batch, row.head, row.query, key) != std::byte{0};
  }
  [[nodiscard]] bool segment_sees(const Row& row, Index key) const {
    if (query_segments.empty()) return true;
    return query_segments[static_cast<std::size_t>(row.batch * call.queries + row.query)] ==
           key_segments[static_cast<std::size_t>(row.batch * call.keys + key)];
  }
  [[nodiscard]] bool sees(const Row& row, Index key) const {
    return key < sequence.keys && window_sees(row, key) && mask_sees(row, key) && segment_sees(row, key);
  }
};

/// A step must not call a tile untouched where it hides a pair, nor hidden where it leaves one.
template <class Sees>
void check_touch(Touch touch, const Block& block, Range keys, bool exact, Sees sees) {
  bool any = false, all = true;
  for (Index head = block.heads.begin; head < block.heads.end; ++head) {
    for (Index query = block.queries.begin; query < block.queries.end; ++query) {
      const Row row = row_of(block.sequence, head, query);
      for (Index key = keys.begin; key < keys.end; ++key) {
        any |= sees(row, key);
        all &= sees(row, key);
      }
    }
  }
  if (touch == Touch::nothing) CHECK(all);
  if (touch == Touch::hides_all) CHECK(!any);
  if (exact) CHECK(touch == (all ? Touch::nothing : any ? Touch::elements : Touch::hides_all));
}

void check_steps(const Case& c, const Block& block, Range keys) {
  const Range existing{keys.begin, min(keys.end, c.sequence.keys)};
  check_touch(Window::touch(c.call, block, keys), block, keys, false,
              [&](const Row& row, Index key) { return c.window_sees(row, key); });
  check_touch(Lengths::touch(c.call, block, keys), block, keys, false,
              [&](const Row&, Index key) { return key < c.sequence.keys; });
  check_touch(Mask::touch(c.call, block, keys), block, existing, true,
              [&](const Row& row, Index key) { return c.mask_sees(row, key); });
  check_touch(Segments::touch(c.call, block, keys), block, existing, false,
              [&](const Row& row, Index key) { return c.segment_sees(row, key); });
  // A window that leaves all of a tile, and one document, have no element work.
  bool all = true;
  for (Index query = block.queries.begin; query < block.queries.end; ++query) {
    for (const Index key : {keys.begin, keys.end - 1})
      all &= c.window_sees({0, 0, query, query + c.sequence.offset}, key);
  }
  if (all) CHECK(Window::touch(c.call, block, keys) == Touch::nothing);
}

/// The scores of a tile, once the steps that say that they have work are applied.
void check_apply(const Case& c, Range rows, Range keys) {
  const Block block = block_of(c.call, c.sequence, c.kv_head, rows);
  const Index padded = round_up(keys.size(), kLanes);
  const TileWork work = ScoreSteps::touch(c.call, block, {keys.begin, keys.begin + padded});
  for (Index r = rows.begin; r < rows.end; ++r) {
    const Row row = c.row(r);
    std::vector<float> scores(static_cast<std::size_t>(padded), 0.5F);
    ScoreSteps::apply<Math>(c.call, row, work.steps, [&](auto step) {
      for (Index i = 0; i < keys.size(); i += kLanes) {
        float* const in = scores.data() + i;
        const Math::Keys at{keys.begin + i, min(kLanes, c.sequence.keys - keys.begin - i)};
        store(in, step(load<Vec<TestIsa, float>>(in), at));
      }
    });
    for (Index i = 0; i < padded; ++i) {
      const Index key = keys.begin + i;
      const bool sees = key < c.sequence.keys && c.sees(row, key);
      if (work.hidden) CHECK(!sees);
      if (!work.hidden)
        CHECK(scores[static_cast<std::size_t>(i)] == (sees ? 0.5F : -static_cast<float>(__builtin_inf())));
    }
  }
}

void check_case(const Case& c, Random& random) {
  const Index all_rows = c.sequence.queries * c.call.group;
  const Index first = random.below(all_rows);
  const Range rows{first, first + 1 + random.below(all_rows - first)};
  const Block block = block_of(c.call, c.sequence, c.kv_head, rows);
  CHECK(block.queries.begin == c.row(rows.begin).query && block.queries.end == c.row(rows.end - 1).query + 1);

  const Range seen = ScoreSteps::visible(c.call, block);
  for (Index r = rows.begin; r < rows.end; ++r) {
    for (Index key = 0; key < c.sequence.keys; ++key) {
      CHECK(!c.sees(c.row(r), key) || (seen.begin <= key && key < seen.end));
    }
  }
  // Not wider than the band: a row sees its first and last key, as far as the window says.
  if (!seen.empty()) {
    CHECK(seen.begin >= 0 && seen.end <= c.sequence.keys);
    CHECK(c.window_sees(c.row(rows.begin), seen.begin) || seen.begin > c.row(rows.begin).position);
    CHECK(c.window_sees(c.row(rows.end - 1), seen.end - 1) || seen.end - 1 < c.row(rows.end - 1).position);
  }
  for (Index begin = 0; begin < c.sequence.keys; begin += kLanes) {
    for (const Index count : {Index{1}, Index{3}, kLanes, 2 * kLanes, Index{24}}) {
      const Range keys{begin, min(begin + count, c.sequence.keys)};
      check_steps(c, block, {begin, begin + round_up(keys.size(), kLanes)});
      check_apply(c, rows, keys);
    }
  }
}

}  // namespace

int main() {
  Random random;
  for (int repeat = 0; repeat < 3000; ++repeat) check_case(Case(random), random);
  return finish();
}
