// attention's options as Python's dict of keywords has them.
#pragma once

#include <algorithm>

#include "arrays.h"

namespace attncore::python {

enum class Keyword : std::uint8_t {
  layout,
  causal,
  window,
  query_offset,
  mask,
  bias,
  alibi,
  relative_bias,
  softcap,
  sinks,
  scale,
  query_segments,
  key_segments,
  query_lengths,
  key_lengths,
  tree_parents,
  precision,
  num_threads,
  dropout_p,
  seed,
};

/// What a call gives of them, borrowed from its dict.  A call that gives few costs little: names are Python's interned ones,
/// found by their addresses.
class Keywords {
 public:
  /// In Keyword's order.
  static constexpr std::array kNames{"layout",       "causal",        "window",      "query_offset",
                                     "mask",         "bias",          "alibi",       "relative_bias",
                                     "softcap",      "sinks",         "scale",       "query_segments",
                                     "key_segments", "query_lengths", "key_lengths", "tree_parents",
                                     "precision",    "num_threads",   "dropout_p",   "seed"};

  static_assert(kNames.size() == static_cast<std::size_t>(Keyword::seed) + 1);

  Keywords(const char* function, const py::dict& options) {
    PyObject *name = nullptr, *value = nullptr;
    for (Py_ssize_t at = 0; PyDict_Next(options.ptr(), &at, &name, &value) != 0;) {
      const std::size_t which = find(name);
      if (which == kNames.size()) {
        throw py::type_error(std::string(function) + "() got an unexpected keyword argument '" +
                             py::str(name).cast<std::string>() + "'");
      }
      given_[which] = value;
    }
  }

  /// Null: not given.
  py::object operator[](Keyword keyword) const {
    return py::reinterpret_borrow<py::object>(given_[static_cast<std::size_t>(keyword)]);
  }

 private:
  /// kNames.size(): there is no such keyword.
  static std::size_t find(py::handle name) {
    const auto& names = interned();
    const auto same = std::find(names.begin(), names.end(), name.ptr());
    if (same != names.end()) return static_cast<std::size_t>(same - names.begin());
    const auto equal = std::find_if(kNames.begin(), kNames.end(), [&](const char* known) {
      return PyUnicode_Check(name.ptr()) && PyUnicode_CompareWithASCIIString(name.ptr(), known) == 0;
    });
    return static_cast<std::size_t>(equal - kNames.begin());
  }

  static const std::array<PyObject*, kNames.size()>& interned() {
    static const auto names = [] {
      std::array<PyObject*, kNames.size()> all{};
      std::transform(kNames.begin(), kNames.end(), all.begin(), PyUnicode_InternFromString);
      return all;
    }();
    return names;
  }

  std::array<py::handle, kNames.size()> given_{};
};

}  // namespace attncore::python
