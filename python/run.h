// Calls of the library, without the GIL.
#pragma once

#include <pthread.h>
#include <pybind11/pybind11.h>

#include <atomic>
#include <attncore/attncore.hpp>
#include <chrono>
#include <ctime>

#include "arrays.h"
#include "without_gil.h"

namespace attncore::python {

namespace py = pybind11;

/// The thread that runs Python's signal handlers; in a child of fork(), the one that forked.
inline bool on_main_thread() {
  static std::atomic<unsigned long> main_thread = 0;  // 0: to be asked for
  [[maybe_unused]] static const int at_fork = pthread_atfork(nullptr, nullptr, [] { main_thread = 0; });
  if (main_thread == 0)
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  return PyThread_get_thread_ident() == main_thread;
}

/// A clock that tells milliseconds in a few nanoseconds, where the system has one: small calls ask it more than once.
struct CoarseClock {
  static std::chrono::nanoseconds now() {
#ifdef CLOCK_MONOTONIC_COARSE
    timespec time{};
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return std::chrono::seconds(time.tv_sec) + std::chrono::nanoseconds(time.tv_nsec);
#else
    return std::chrono::steady_clock::now().time_since_epoch();
#endif
  }
};

/// Runs without the GIL.  On the main thread a long call looks for signals (Ctrl-C) now and then; elsewhere that would
/// do nothing but wait for the GIL.
template <class Run>
void run_without_gil(Options& options, Run run) {
  static constexpr auto kInterval = std::chrono::milliseconds(20);
  if (on_main_thread()) {
    options.cancelled = [last = CoarseClock::now()]() mutable {
      const auto now = CoarseClock::now();
      if (now - last < kInterval) return false;
      last = now;
      const py::gil_scoped_acquire gil;
      if (PyErr_CheckSignals() != 0) throw py::error_already_set();
      return false;
    };
  }
  const WithoutGil no_gil;
  run();
}

/// The same; the error of an operand's shape is in the axes of arrays.
template <class Run>
void run_without_gil(Options& options, bool bshd, py::ssize_t rank, Run run) {
  try {
    run_without_gil(options, run);
  } catch (const ShapeError& error) {
    reject_shape(error, bshd, rank);
  }
}

}  // namespace attncore::python
