#include <sys/mman.h>

#include <cstdlib>
#include <limits>
#include <new>
#include <utility>

#include "call.h"

namespace attncore {

namespace {
constexpr std::size_t kAlignment = 64;
constexpr std::size_t kHugePage = std::size_t{2} << 20U;
}  // namespace

Workspace::Workspace() noexcept = default;

Workspace::Workspace(Workspace&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}

Workspace& Workspace::operator=(Workspace&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(bytes_, other.bytes_);
  return *this;
}

Workspace::~Workspace() { std::free(data_); }

std::byte* Workspace::reserve(std::size_t bytes) {
  if (bytes > bytes_) {
    if (bytes > std::numeric_limits<std::size_t>::max() - kHugePage) throw std::bad_alloc();
    trim(0);
    const std::size_t alignment = bytes >= kHugePage ? kHugePage : kAlignment;
    const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
    void* const memory = std::aligned_alloc(alignment, rounded);
    if (memory == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (alignment == kHugePage)
      madvise(memory, rounded, MADV_HUGEPAGE);  // a page fault for 2 MiB instead of 512
#endif
    data_ = static_cast<std::byte*>(memory);
    bytes_ = rounded;
  }
  return data_;
}

void Workspace::trim(std::size_t bytes) noexcept {
  if (bytes_ <= bytes) return;
  std::free(std::exchange(data_, nullptr));
  bytes_ = 0;
}

}  // namespace attncore
