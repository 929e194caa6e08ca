// How backward's work is cut into tasks.  Sums and their order are the kernels' alone: a plan changes no bits.
//
// First come the rows' stats, which all else waits for.  Then, if the (sequence, KV head) pairs fill the threads, each
// has one owner of all its rows and keys: five products a tile.  If not, and for sequences whose sums would take too much
// memory, there are two passes, over keys and over rows, which both recompute the scores: seven products.  Last come the
// tiles of broadcast biases' gradients.
#pragma once

#include <vector>

#include "cpu/kernels/kernels.h"
#include "machine.h"

namespace attncore {

struct BackwardPlan {
  const Kernels* kernels = nullptr;
  int threads = 1;
  std::vector<Sequence> sequences;  // by batch entry
  std::vector<BackwardTask> rows;   // the stats
  std::vector<BackwardTask> tasks;
  std::vector<BackwardBiasTask> biases;

  std::vector<Index> first_key_tile;            // (batch + 1): key tiles of the entries before
  Index alibi_shares = 0, relative_shares = 0;  // of one key tile of a (sequence, KV head): numbers
  Index sink_shares = 0;                        // of one task of `rows`
  Index stats_bytes = 0, shares_bytes = 0, thread_bytes = 0, workspace_bytes = 0;

  [[nodiscard]] Index key_tiles(Index entry) const noexcept {
    return first_key_tile[static_cast<std::size_t>(entry) + 1] -
           first_key_tile[static_cast<std::size_t>(entry)];
  }
  /// Where the key tiles of a (sequence, KV head) stand among all that have shares.
  [[nodiscard]] Index first_share(const Call& call, Index entry, Index kv_head) const noexcept {
    return first_key_tile[static_cast<std::size_t>(entry)] * call.kv_heads + kv_head * key_tiles(entry);
  }
  [[nodiscard]] Index size() const noexcept {
    return static_cast<Index>(rows.size() + tasks.size() + biases.size());
  }
};

[[nodiscard]] BackwardPlan make_plan(const BackwardCall& backward, const Kernels& kernels,
                                     const Machine& machine);

}  // namespace attncore
