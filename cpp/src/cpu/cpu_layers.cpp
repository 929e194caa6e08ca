// Products of layers as threads' work: blocks of b are packed for all who need them, tiles of the result are tasks.
#include "cpu_layers.h"

#include <cmath>
#include <vector>

#include "crew.h"
#include "dispatch.h"
#include "memory.h"

namespace attncore {
namespace {

// What does not change bits.  There are two packed panels of b, up to 4 MiB each, and as many bytes of sums where the
// depth is more than a span.
constexpr Index kColumnBlock = 512;
constexpr Index kDepthSpan = 2048;
constexpr Index kRowSpan = 2048;
constexpr Index kRowTile = 192;
constexpr Index kFewRows = 48;  // up to here, a task packs for itself

static_assert(kDepthSpan % kDepthBlock == 0);

/// What turns share in a call: frequencies, and the angles of the nearest positions if there are enough tokens.
class Angles {
 public:
  Angles(Rotation& rotation, Index tokens) {
    const Index pairs = rotation.pairs();
    const Index near = tokens > 2 * Rotation::kNear ? Rotation::kNear : 0;
    memory_.resize(static_cast<std::size_t>((1 + 2 * near) * pairs));
    double* const frequency = memory_.data();
    for (Index i = 0; i < pairs; ++i) {
      const double power = -2.0 * static_cast<double>(i) / static_cast<double>(rotation.dims);
      frequency[i] = rotation.frequency != nullptr ? rotation.frequency[i] : std::pow(rotation.base, power);
    }
    for (Index position = 0; position < near; ++position) {
      double* const angles = frequency + (1 + 2 * position) * pairs;
      for (Index i = 0; i < pairs; ++i) {
        turn_near(static_cast<double>(position), frequency[i], angles[i], angles[pairs + i]);
      }
    }
    rotation.frequency = frequency;
    if (near > 0) rotation.near = frequency + pairs;
  }

 private:
  std::vector<double> memory_;
};

/// How a product is cut up.  Stages run in order: (a block of columns, a span of rows, a span of depth), the last fastest.
struct ProductPlan {
  Index column_block, depth_span, row_span, row_tile;
  Index column_blocks, depth_spans, row_spans;
  Index tiles, pieces;    // of a stage: tasks that multiply, tasks that pack
  Index columns_at_once;  // of a packing task
  int threads;

  ProductPlan(const Product& p, const Kernels& kernels, const Options& options) {
    const double products =
        static_cast<double>(p.rows) * static_cast<double>(p.columns) * static_cast<double>(p.depth);
    const Index unit = p.rotate_c.given() ? p.c.shape[3] : kernels.key_block;  // heads are not cut up
    const Index widest = p.compute() == DType::f64 ? kColumnBlock / 2 : kColumnBlock;
    column_blocks = ceil_div(p.columns, max(widest, unit));
    column_block = round_up(ceil_div(p.columns, column_blocks), unit);
    column_blocks = ceil_div(p.columns, column_block);
    depth_span = min(round_up(p.depth, kDepthBlock), kDepthSpan);
    depth_spans = max(1, ceil_div(p.depth, kDepthSpan));
    row_span = depth_spans > 1 ? min(p.rows, kRowSpan) : p.rows;
    row_spans = ceil_div(p.rows, row_span);
    threads = worthwhile_threads(products, ceil_div(p.rows, kernels.row_block), options);
    // As many tiles as threads, or a multiple.
    const Index enough = round_up(ceil_div(row_span, kRowTile), threads);
    row_tile = round_up(ceil_div(row_span, enough), kernels.row_block);
    tiles = ceil_div(row_span, row_tile);
    columns_at_once = min(round_up(column_block, kernels.key_block), 2 * kernels.key_block);
    pieces = ceil_div(depth_span, kDepthBlock) * ceil_div(column_block, columns_at_once);
  }
  [[nodiscard]] Index stages() const noexcept { return column_blocks * row_spans * depth_spans; }
};

struct Stage {
  Range columns, rows, depth;
  bool first, last;
};

/// Two panels take turns: one is packed while tiles use the other.
class ProductRun {
 public:
  ProductRun(const Product& product, const ProductPlan& plan, const Kernels& kernels, const Options& options)
      : p_(product),
        plan_(plan),
        kernels_(kernels),
        sizes_(kernels.product_sizes(product, plan.row_tile, plan.column_block, plan.depth_span)),
        crew_(plan.threads, options),
        memory_(options, bytes()) {
    scratch_ = memory_.take(plan.threads * sizes_.scratch);
    states_ = memory_.take(states() * sizes_.state);
    panels_ = memory_.take(2 * sizes_.panel);
    steps_ = reinterpret_cast<std::int32_t*>(memory_.take(0));
    std::fill_n(steps_, plan.tiles, 0);
  }

  void run() {
    const Index stage_tasks = plan_.tiles + plan_.pieces;
    const Index before = plan_.tiles / 2;  // tiles of a stage before the packing for the next one
    crew_.run(plan_.pieces + plan_.stages() * stage_tasks, [&](Index task, int thread) {
      if (task < plan_.pieces) return pack(0, task, thread);
      const Index stage = (task - plan_.pieces) / stage_tasks;
      const Index item = (task - plan_.pieces) % stage_tasks;
      if (item < before) return multiply(stage, item, thread);
      if (item < before + plan_.pieces) return pack(stage + 1, item - before, thread);
      multiply(stage, item - plan_.pieces, thread);
    });
  }

 private:
  [[nodiscard]] Index states() const noexcept { return plan_.depth_spans > 1 ? plan_.tiles : plan_.threads; }
  [[nodiscard]] Index bytes() const noexcept {
    return plan_.threads * sizes_.scratch + states() * sizes_.state + 2 * sizes_.panel +
           plan_.tiles * Index{sizeof(std::int32_t)};
  }

  [[nodiscard]] Stage stage(Index number) const noexcept {
    const auto part = [](Index i, Index size, Index whole) {
      return Range{i * size, min((i + 1) * size, whole)};
    };
    const Index depth = number % plan_.depth_spans;
    const Index rest = number / plan_.depth_spans;
    return {part(rest / plan_.row_spans, plan_.column_block, p_.columns),
            part(rest % plan_.row_spans, plan_.row_span, p_.rows), part(depth, plan_.depth_span, p_.depth),
            depth == 0, depth == plan_.depth_spans - 1};
  }

  void pack(Index number, Index piece, int thread) noexcept {
    if (number >= plan_.stages()) return;
    // All tiles of the stages that had this panel before.
    const Index used = number / 2 * plan_.tiles;
    if (!crew_.wait(thread, [&] { return used_[number % 2] >= used; })) return;
    const Stage s = stage(number);
    const Index column_pieces = ceil_div(plan_.column_block, plan_.columns_at_once);
    const auto part = [](const Range& whole, Index i, Index size) {
      const Index begin = min(whole.begin + i * size, whole.end);
      return Range{begin, min(begin + size, whole.end)};
    };
    const Range columns = part(s.columns, piece % column_pieces, plan_.columns_at_once);
    const Range depth = part(s.depth, piece / column_pieces, kDepthBlock);
    if (!columns.empty() && !depth.empty()) {
      kernels_.pack_product(p_, {s.columns, s.depth, columns, depth, panel(number)}, scratch(thread));
    }
    ++packed_[number % 2];
  }

  void multiply(Index number, Index tile, int thread) noexcept {
    const Index packed = (number / 2 + 1) * plan_.pieces;
    if (!crew_.wait(thread, [&] { return packed_[number % 2] >= packed; })) return;
    Counter step(steps_[tile]);  // sums are added up in the order of stages
    const bool kept = plan_.depth_spans > 1;
    if (kept && !crew_.wait(thread, [&] { return step.get() == number; })) return;
    const Stage s = stage(number);
    const Index row = min(s.rows.begin + tile * plan_.row_tile, s.rows.end);
    const ProductTask task{.rows = {row, min(row + plan_.row_tile, s.rows.end)},
                           .columns = s.columns,
                           .depth = s.depth,
                           .first = s.first,
                           .last = s.last,
                           .state = states_ + (kept ? tile : thread) * sizes_.state,
                           .packed = panel(number)};
    if (!task.rows.empty()) kernels_.product(p_, task, scratch(thread));
    if (kept) step.set(number + 1);
    ++used_[number % 2];
  }

  [[nodiscard]] std::byte* panel(Index number) const noexcept { return panels_ + number % 2 * sizes_.panel; }
  [[nodiscard]] std::byte* scratch(int thread) const noexcept { return scratch_ + thread * sizes_.scratch; }

  const Product& p_;
  const ProductPlan& plan_;
  const Kernels& kernels_;
  ProductSizes sizes_;
  Crew crew_;
  Memory memory_;
  std::byte* scratch_;
  std::byte* states_;
  std::byte* panels_;
  std::int32_t* steps_;                         // by tile, where sums are kept: the stages that it has seen
  std::atomic<Index> packed_[2]{}, used_[2]{};  // by panel: tasks done, in all
};

/// Few rows: a task takes some columns over the whole depth, and packs for itself what is used but once.
void multiply_few_rows(const Product& p, const Kernels& kernels, const Options& options) {
  const Index unit = p.rotate_c.given() ? p.c.shape[3] : kernels.key_block;
  const Index columns = min(p.columns, round_up(kernels.key_block, unit));
  const Index tasks = ceil_div(p.columns, columns);
  const double items = static_cast<double>(p.columns) * static_cast<double>(p.depth);
  const int threads =
      worthwhile_threads(items * static_cast<double>(max(p.rows, kernels.row_block)), tasks, options);
  const ProductSizes sizes = kernels.product_sizes(p, p.rows, columns, kDepthBlock);
  const Index bytes = sizes.scratch + sizes.state;
  Memory memory(options, threads * bytes);
  std::byte* const own = memory.take(threads * bytes);
  Crew crew(threads, options);
  crew.run(tasks, [&](Index number, int thread) {
    const Index first = number * columns;
    for (Index k = 0; k == 0 || k < p.depth; k += kDepthSpan) {
      const ProductTask task{.rows = {0, p.rows},
                             .columns = {first, min(first + columns, p.columns)},
                             .depth = {k, min(k + kDepthSpan, p.depth)},
                             .first = k == 0,
                             .last = k + kDepthSpan >= p.depth,
                             .state = own + thread * bytes + sizes.scratch};
      kernels.product(p, task, own + thread * bytes);
      if (crew.poll(thread)) return;
    }
  });
}

const Kernels& kernels_of(DType compute) { return current_table().kernels(compute); }

}  // namespace

void multiply(const Product& product, const Options& options) {
  if (product.rows == 0 || product.columns == 0) return;
  Product p = product;
  const Angles angles_of_a(p.rotate_a, rows_of(p.a)), angles_of_c(p.rotate_c, p.rows);
  const Kernels& kernels = current_table().product_kernels(p);
  if (p.rows <= kFewRows) return multiply_few_rows(p, kernels, options);
  const ProductPlan plan(p, kernels, options);
  ProductRun(p, plan, kernels, options).run();
}

void sum_rows(const Product& product, const Options& options) {
  if (product.columns == 0) return;
  Product p = product;
  const Angles angles(p.rotate_a, rows_of(p.a));
  const Kernels& kernels = kernels_of(p.compute());
  const Index columns = min(p.columns, 4 * kernels.key_block);
  const Index tasks = ceil_div(p.columns, columns);
  const int threads =
      worthwhile_threads(static_cast<double>(p.columns) * static_cast<double>(p.depth), tasks, options);
  const ProductSizes sizes = kernels.product_sizes(p, 2, columns, 0);
  const Index bytes = sizes.scratch + sizes.state;
  Memory memory(options, threads * bytes);
  std::byte* const own = memory.take(threads * bytes);
  Crew crew(threads, options);
  crew.run(tasks, [&](Index number, int thread) {
    const Index first = number * columns;
    for (Index row = 0; row == 0 || row < p.depth; row += kDepthBlock) {
      const ProductTask task{.rows = {row, min(row + kDepthBlock, p.depth)},
                             .columns = {first, min(first + columns, p.columns)},
                             .first = row == 0,
                             .last = row + kDepthBlock >= p.depth,
                             .state = own + thread * bytes + sizes.scratch};
      kernels.column_sums(p, task, own + thread * bytes);
      if (crew.poll(thread)) return;
    }
  });
}

void rope(const RopeCall& given, const Options& options) {
  RopeCall call = given;
  const Index batch = call.x.shape[0], tokens = call.x.shape[2];
  const Index items = call.x.shape[0] * call.x.shape[1] * call.x.shape[2] * call.x.shape[3];
  if (items == 0) return;
  const Angles angles(call.rotation, batch * tokens);
  const Kernels& kernels = kernels_of(accumulation(call.x.dtype));
  // Entries that share positions are turned together.
  const bool shared = !call.rotation.positions.given() || call.rotation.positions.stride[0] == 0;
  const Index groups = shared ? 1 : batch;
  const Index blocks = ceil_div(tokens, kRopeTokens);
  const int threads = worthwhile_threads(8.0 * static_cast<double>(items), groups * blocks, options);
  const Index bytes = kernels.rope_scratch(call);
  Memory memory(options, threads * bytes);
  std::byte* const scratch = memory.take(threads * bytes);
  Crew crew(threads, options);
  crew.run(groups * blocks, [&](Index number, int thread) {
    const Index first = number % blocks * kRopeTokens;
    const RopeTask task{.batch = number / blocks,
                        .batches = shared ? batch : 1,
                        .tokens = {first, min(first + kRopeTokens, tokens)}};
    kernels.rope(call, task, scratch + thread * bytes);
  });
}

}  // namespace attncore
