// The memory of caches: address space that becomes memory, zeros, where it is written.
#pragma once

#include "call.h"

namespace attncore {

inline constexpr Index kHugePage = Index{2} << 20U;

class Reservation {
 public:
  Reservation() = default;
  /// Throws CacheFull, naming what the memory is for.
  Reservation(Index bytes, const char* what);
  Reservation(Reservation&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
  Reservation& operator=(Reservation&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Reservation();

  [[nodiscard]] std::byte* data() const noexcept { return data_; }
  [[nodiscard]] Index bytes() const noexcept { return bytes_; }

  /// Whether memory comes in pieces of 2 MiB where it is written for the first time, which are faster to get and to read:
  /// the pieces that begin among bytes begin … end − 1 and end by `limit`.
  void huge_pages(bool wanted, Index begin, Index end, Index limit) noexcept;

 private:
  std::byte* data_ = nullptr;
  Index bytes_ = 0;
};

}  // namespace attncore
