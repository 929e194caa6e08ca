// The whole test framework: CHECK counts failures and says where, finish() is the exit status.
#pragma once

#include <atomic>
#include <cstdio>

inline std::atomic<int> failures = 0;

#define CHECK(condition)                                                                \
  do {                                                                                  \
    if (!(condition)) {                                                                 \
      if (++failures <= 20) std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                                   \
  } while (false)

inline int finish() {
  std::printf("%d failures\n", failures.load());
  return failures == 0 ? 0 : 1;
}
