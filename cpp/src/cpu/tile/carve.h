// Memory, carved up: one function says what lies where, and so how much that takes.
#pragma once

#include "../../call.h"

namespace attncore {

/// Hands out parts of some memory, one after another; without memory it only counts.
class Carver {
 public:
  explicit ATTN_INLINE Carver(std::byte* memory = nullptr) noexcept : memory_(memory) {}

  template <class T>
  ATTN_INLINE T* take(Index items) noexcept {
    std::byte* const taken = memory_ != nullptr ? memory_ + used_ : nullptr;
    used_ += items * Index{sizeof(T)};
    return reinterpret_cast<T*>(taken);
  }
  [[nodiscard]] ATTN_INLINE Index used() const noexcept { return used_; }

 private:
  std::byte* memory_;
  Index used_ = 0;
};

}  // namespace attncore
