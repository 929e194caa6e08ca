// What plans know of the machine: an argument, so that tests can pretend.
#pragma once

#include <string>

namespace attncore {

struct Machine {
  int threads = 1;  // that a call may use
};

/// The cores that this process may use.
[[nodiscard]] int available_cores() noexcept;

/// The CPU's name, and which of the extensions that matter for products of matrices it has.
[[nodiscard]] std::string cpu_name();
[[nodiscard]] std::string cpu_features();

}  // namespace attncore
