// Many readers or one writer of an object: who may not enter is told so at once.
#pragma once

#include <atomic>
#include <attncore/state.hpp>

namespace attncore {

class Exclusion {
 public:
  class Reading {
   public:
    Reading(Exclusion& exclusion, const char* object) : users_(exclusion.users_) {
      int users = users_.load();
      do {
        if (users < 0) throw InUse(std::string(object) + ": another thread is changing it");
      } while (!users_.compare_exchange_weak(users, users + 1));
    }
    Reading(const Reading&) = delete;
    Reading& operator=(const Reading&) = delete;
    ~Reading() { --users_; }

   private:
    std::atomic<int>& users_;
  };

  class Writing {
   public:
    Writing(Exclusion& exclusion, const char* object) : users_(exclusion.users_) {
      int users = 0;
      if (!users_.compare_exchange_strong(users, -1)) {
        throw InUse(std::string(object) + ": another thread is " + (users < 0 ? "changing" : "reading") +
                    " it");
      }
    }
    Writing(const Writing&) = delete;
    Writing& operator=(const Writing&) = delete;
    ~Writing() { users_ = 0; }

   private:
    std::atomic<int>& users_;
  };

 private:
  std::atomic<int> users_{0};  // readers; −1: a writer
};

}  // namespace attncore
