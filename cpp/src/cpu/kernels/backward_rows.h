// The pass before the others: what each query row needs for its weights and their gradient.
#pragma once

#include "backward_tile.h"
#include "rows.h"

namespace attncore {

/// lse beyond this has lost digits that exp(score − lse) needs: 2⁻²⁴ · 64 is 4e-6.  Of few rows, whose scores have the
/// roundings that lse has, 2⁻²⁴ · 16 = 1e-6 is as much as all else.
inline constexpr double kPreciseLse = 64, kPreciseLseOfFewRows = 16;

/// Whether lse may be `exact` but for rounding.  Else it is of more keys than are given here, and counts as it is: the
/// gradients of parts of the keys add up.
template <class T>
ATTN_INLINE bool is_rounded(T exact, T lse) noexcept {
  constexpr T kUnits = 16 * (sizeof(T) == 8 ? T(0x1p-52) : T(0x1p-23));
  return !(absolute(exact - lse) > kUnits * absolute(lse));  // NaN and Inf too
}

/// Maximum and sum of the rows anew, as the forward pass had them.
template <class Isa, class T, class Item>
void renormalise(const Call& call, const BackwardTask& task, BackwardTile<Isa, T, Item>& tile, Range rows,
                 const OnlineSoftmax<Isa, T>& softmax, T* keep) noexcept {
  softmax.clear(rows.size());
  tile.load_rows(rows);
  const Index key_tile = Isa::template kKeyTile<T>;
  for (Index key = 0; key < task.sequence.keys; key += key_tile) {
    const Range keys{key, min(key + key_tile, task.sequence.keys)};
    const auto seen = tile.look(rows, keys);
    if (seen.keys.empty()) continue;
    if (task.poll()) return;
    tile.load_keys(keys);
    tile.score(seen, [&](Index row, const Row&, T* scores, Range columns, bool) {
      softmax.update(row, scores, seen.keys.size(), false, keep, nullptr, columns);
    });
  }
  const Index first_head = task.kv_head * call.group;
  add_sinks<Isa, T>(call, softmax, rows.size(),
                    [&](Index row) { return first_head + (rows.begin + row) % call.group; });
}

/// Σ d_out · out over the dims of a row.  Where out is 0, so is the term: a row that sees nothing may have any d_out.
template <class Isa, class T>
ATTN_INLINE T dot(const std::byte* d_out, const Tensor& like_d_out, const std::byte* out,
                  const Tensor& like_out, Index dims) noexcept {
  return with_storage<T>(like_out.dtype, [&]<DType kStorage>() {
    using V = Vec<Isa, T>;
    const Index d_stride = like_d_out.stride[3], stride = like_out.stride[3];
    V sum{};
    for (Index dim = 0; dim < dims; dim += kWidth<Isa, T>) {
      const Index count = min(kWidth<Isa, T>, dims - dim);
      const V d = load_items<Isa, T, kStorage>(d_out + dim * d_stride, d_stride, count);
      const V x = load_items<Isa, T, kStorage>(out + dim * stride, stride, count);
      sum += x == 0 ? V{} : d * x;
    }
    return horizontal_sum<Isa, T>(sum);
  });
}

/// Scratch that backward_rows_task needs.
template <class Isa, class T, class Item>
Index rows_scratch(const Call& call) noexcept {
  const Index rows = backward_rows(call, Isa::kRows);
  return BackwardScratch<Isa, T, Item>::in(nullptr, call).bytes + OnlineSoftmax<Isa, T>::bytes(rows, 0) +
         OnlineSoftmax<Isa, T>::padded(rows) * Index{sizeof(T)};
}

/// task.rows: the stats, and for each head of the group the rows' share of the sink's gradient,
/// Σ exp(sink − lse) · −delta.
template <class Isa, class T, class Item>
void backward_rows_task(const BackwardCall& backward, const BackwardTask& task, std::byte* scratch) noexcept {
  const Call& call = backward.call;
  const Tensor &d_out = backward.gradients.d_out, &d_lse = backward.gradients.d_lse,
               &sinks = call.score.sinks;
  using Softmax = OnlineSoftmax<Isa, T>;
  BackwardTile<Isa, T, Item> tile(backward, task.sequence, task.kv_head, scratch, task.stats);
  const auto stats = RowStats<T>::in(task.stats, call, task.sequence, task.kv_head);
  const Index most = backward_rows(call, Isa::kRows);
  const auto softmax = Softmax::in(scratch + tile.scratch().bytes, most, 0);
  T* const keep = softmax.exact_sum + Softmax::padded(most);

  const T precise_lse = tile.in_place() ? kPreciseLseOfFewRows : kPreciseLse;

  for (Index head = 0; task.sink_shares != nullptr && head < call.group; ++head) task.sink_shares[head] = 0;
  for (Index first = task.rows.begin; first < task.rows.end; first += most) {
    const Range rows{first, min(first + most, task.rows.end)};
    const Task of_rows{.sequence = task.sequence, .kv_head = task.kv_head, .rows = rows};
    const TaskRows row_at{call, of_rows};
    bool precise = true;
    for (Index row = 0; row < rows.size(); ++row) {
      const Row r = row_at(row);
      const Index i = first + row;
      T lse = 0, d = 0;
      __builtin_memcpy(&lse, at(call.lse, r), sizeof lse);
      if (d_lse.given()) __builtin_memcpy(&d, at(d_lse, r), sizeof d);
      stats.origin[i] = Softmax::base(lse);
      stats.factor[i] = 1;
      stats.delta[i] = dot<Isa, T>(at(d_out, r), d_out, at(call.out, r), call.out, call.value_dim) - d;
      precise &= !(absolute(stats.origin[i]) > precise_lse);
    }
    if (!precise) renormalise<Isa, T>(call, task, tile, rows, softmax, keep);
    for (Index row = 0; row < rows.size(); ++row) {
      const Index i = first + row;
      if (!precise && absolute(stats.origin[i]) > precise_lse &&
          is_rounded(softmax.log_sum_exp(row), stats.origin[i])) {
        stats.origin[i] = Softmax::base(softmax.maximum[row]);
        stats.factor[i] = softmax.sum[row] == 0 ? T{0} : 1 / softmax.sum[row];
      }
      if (task.sink_shares == nullptr) continue;
      const T sink = load_scalar<Isa, T>(at(sinks, 0, row_at(row).head), sinks.dtype);
      const T weight = exp<Isa, T>(broadcast<Vec<Isa, T>>(sink - stats.origin[i]))[0] * stats.factor[i];
      task.sink_shares[i % call.group] -= static_cast<double>(weight * stats.delta[i]);
    }
  }
}

}  // namespace attncore
