// Readers of an object together, a writer alone.  Nobody waits: who comes at the wrong time is told so at once.
#pragma once

#include <atomic>
#include <attncore/attncore.hpp>

namespace attncore {

class Exclusion {
 public:
  /// `object`: what it is called in messages.
  explicit Exclusion(const char* object) noexcept : object_(object) {}

 private:
  template <bool kWrites>
  friend class Inside;

  static constexpr int kWriter = -1;
  const char* object_;
  std::atomic<int> users_ = 0;  // readers, or kWriter
};

/// At work on the object from here to the end of the scope.
template <bool kWrites>
class Inside {
 public:
  explicit Inside(Exclusion& exclusion) : Inside(exclusion, exclusion.object_) {}
  /// `object`: what this call calls it.  Throws InUse.
  Inside(Exclusion& exclusion, const char* object) : users_(exclusion.users_) {
    int now = users_.load(std::memory_order_relaxed);
    do {
      const bool changing = now == Exclusion::kWriter;
      if (changing || (kWrites && now > 0)) {
        throw InUse(std::string(object) + ": another thread is " + (changing ? "changing" : "reading") +
                    " it");
      }
    } while (!users_.compare_exchange_weak(now, kWrites ? Exclusion::kWriter : now + 1,
                                           std::memory_order_acquire, std::memory_order_relaxed));
  }
  Inside(const Inside&) = delete;
  Inside& operator=(const Inside&) = delete;
  ~Inside() { users_.fetch_add(kWrites ? -Exclusion::kWriter : -1, std::memory_order_release); }

 private:
  std::atomic<int>& users_;
};
using Reading = Inside<false>;
using Writing = Inside<true>;

}  // namespace attncore
