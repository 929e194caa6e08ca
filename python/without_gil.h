// Work without Python's global lock.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace attncore::python {

/// The calling thread is without the GIL while this lives.  A daemon thread that wants it back while the interpreter ends waits for the
/// process to end: Python before 3.14 would unwind its stack, whose destructors need the GIL and may not throw.
class WithoutGil {
 public:
  WithoutGil() : thread_(PyEval_SaveThread()) {}
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;
  ~WithoutGil() {
    try {
      PyEval_RestoreThread(thread_);
    } catch (...) {  // pthread_exit
      for (;;) pause();
    }
  }

 private:
  PyThreadState* const thread_;
};

}  // namespace attncore::python
