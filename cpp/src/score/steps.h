// The list of score steps: a new one is a file, and a name here.
#pragma once

#include "alibi.h"
#include "bias.h"
#include "lengths.h"
#include "mask.h"
#include "relative.h"
#include "segments.h"
#include "softcap.h"
#include "tree.h"
#include "window.h"

namespace attncore {

/// Which steps have element work in a tile: bit i is step i.
using StepSet = unsigned;

struct TileWork {
  bool hidden = false;
  StepSet steps = 0;
};

template <class... Steps>
struct Pipeline {
  /// The keys outside which no row of the block sees anything.
  static ATTN_FN Range visible(const Call& call, const Block& block) noexcept {
    Range keys{0, block.sequence.keys};
    ((keys = intersect(keys, Steps::visible(call, block))), ...);
    return keys;
  }

  /// The keys outside which a query sees nothing, where those of the next position lie one further.
  static ATTN_FN Range band(const Call& call, Index position) noexcept {
    Range keys{-kBeyond, kBeyond};
    (narrow_band<Steps>(call, position, keys), ...);
    return keys;
  }

  /// Whether these steps do nothing to the block but hide what lies outside of its band.
  static ATTN_FN bool only_band(const Call& call, const Block& block, StepSet steps) noexcept {
    StepSet bit = 1, others = 0;
    ((others |= is_band<Steps>(call, block) ? 0 : bit, bit <<= 1U), ...);
    return (steps & others) == 0;
  }

  /// The keys of a tile up to the last that any row sees, by the steps that find it soon.
  static ATTN_FN Range narrow(const Call& call, const Block& block, Range keys) noexcept {
    (narrow_by<Steps>(call, block, keys), ...);
    return keys;
  }

  /// What the steps do to a tile; `keys` may reach past the sequence's keys, into the padding of a register.
  static ATTN_FN TileWork touch(const Call& call, const Block& block, Range keys) noexcept {
    TileWork work;
    StepSet bit = 1;
    (note(Steps::touch(call, block, keys), bit, work), ...);
    return work;
  }

  /// Brings what those steps will read of one row of a tile.
  static ATTN_FN void fetch(const Call& call, const Row& row, StepSet steps, Range keys) noexcept {
    StepSet bit = 1;
    (fetch_one<Steps>(call, row, steps, bit, keys), ...);
  }

  /// Scores of one row are visited by each step that has work, in the list's order: M says what a register of them is.
  template <class M, class Visit>
  static ATTN_FN void apply(const Call& call, const Row& row, StepSet steps, Visit visit) noexcept {
    StepSet bit = 1;
    (apply_one<Steps, M>(call, row, steps, bit, visit), ...);
  }

  /// The same, and after each step that is not additive visit_slope(scores → d result / d scores) at its result.
  template <class M, class Visit, class VisitSlope>
  static ATTN_FN void apply(const Call& call, const Row& row, StepSet steps, Visit visit,
                            VisitSlope visit_slope) noexcept {
    StepSet bit = 1;
    (apply_with_slope<Steps, M>(call, row, steps, bit, visit, visit_slope), ...);
  }

 private:
  static ATTN_FN void note(Touch touch, StepSet& bit, TileWork& work) noexcept {
    if (touch == Touch::hides_all) work.hidden = true;
    if (touch != Touch::nothing) work.steps |= bit;
    bit <<= 1U;
  }

  template <class Step>
  static ATTN_FN bool is_band(const Call& call, const Block& block) noexcept {
    if constexpr (requires { Step::is_band(call, block); }) return Step::is_band(call, block);
    return false;
  }
  template <class Step>
  static ATTN_FN void narrow_band(const Call& call, Index position, Range& keys) noexcept {
    if constexpr (requires { Step::band(call, position); })
      keys = intersect(keys, Step::band(call, position));
  }

  template <class Step>
  static ATTN_FN void narrow_by(const Call& call, const Block& block, Range& keys) noexcept {
    if constexpr (requires { Step::narrow(call, block, keys); }) keys = Step::narrow(call, block, keys);
  }

  template <class Step>
  static ATTN_FN void fetch_one(const Call& call, const Row& row, StepSet steps, StepSet& bit,
                                Range keys) noexcept {
    if constexpr (requires { Step::fetch(call, row, keys); }) {
      if ((steps & bit) != 0) Step::fetch(call, row, keys);
    }
    bit <<= 1U;
  }

  template <class Step, class M, class Visit>
  static ATTN_FN void apply_one(const Call& call, const Row& row, StepSet steps, StepSet& bit,
                                Visit& visit) noexcept {
    const bool applied = (steps & bit) != 0;
    bit <<= 1U;
    if (!applied) return;
    if constexpr (requires { Step::template apply_row<M>(call, row, visit); }) {
      Step::template apply_row<M>(call, row, visit);
    } else {
      visit([&](typename M::Scores s, const typename M::Keys& keys) {
        return Step::template apply<M>(call, row, s, keys);
      });
    }
  }

  template <class Step, class M, class Visit, class VisitSlope>
  static ATTN_FN void apply_with_slope(const Call& call, const Row& row, StepSet steps, StepSet& bit,
                                       Visit& visit, VisitSlope& visit_slope) noexcept {
    const bool applied = (steps & bit) != 0;
    apply_one<Step, M>(call, row, steps, bit, visit);
    if constexpr (requires(typename M::Scores s) { Step::template slope<M>(call, s); }) {
      if (applied) {
        visit_slope([&](typename M::Scores result) { return Step::template slope<M>(call, result); });
      }
    }
  }
};

/// In the order of application.
using ScoreSteps = Pipeline<SoftCap, Alibi, Relative, Bias, Mask, Segments, TreeMask, Window, Lengths>;

}  // namespace attncore
