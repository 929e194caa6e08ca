#include "cache_memory.h"

#include <sys/mman.h>

#include <attncore/cache.hpp>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace attncore {
namespace {

/// Null if there is none.
void* reserve(std::size_t bytes) noexcept {
#ifdef MAP_NORESERVE
  void* const data =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return data == MAP_FAILED ? nullptr : data;
#else
  return std::calloc(bytes, 1);
#endif
}

void give_back(void* data, [[maybe_unused]] std::size_t bytes) noexcept {
#ifdef MAP_NORESERVE
  munmap(data, bytes);
#else
  std::free(data);
#endif
}

}  // namespace

Reservation::Reservation(Index bytes, const char* what) : bytes_(max(bytes, 1)) {
  data_ = static_cast<std::byte*>(reserve(static_cast<std::size_t>(bytes_)));
  if (data_ != nullptr) return;
  char text[128];
  std::snprintf(text, sizeof text, "%s: needs %.3g GiB of address space, the system has no such piece", what,
                static_cast<double>(bytes) * 0x1p-30);
  throw CacheFull(text);
}

Reservation::~Reservation() {
  if (data_ != nullptr) give_back(data_, static_cast<std::size_t>(bytes_));
}

void Reservation::huge_pages([[maybe_unused]] bool wanted, [[maybe_unused]] Index begin,
                             [[maybe_unused]] Index end, [[maybe_unused]] Index limit) noexcept {
#ifdef MADV_HUGEPAGE
  const auto start = static_cast<Index>(reinterpret_cast<std::uintptr_t>(data_));
  const Index from = round_up(start + begin, kHugePage) - start;
  const Index to = min(round_up(start + end, kHugePage), (start + limit) / kHugePage * kHugePage) - start;
  if (from >= to) return;
  madvise(data_ + from, static_cast<std::size_t>(to - from), wanted ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
#endif
}

}  // namespace attncore
