#pragma once

#include <string>
#include <vector>

namespace attncore {

/// "a, b, c"
inline std::string joined(const std::vector<std::string>& words, const char* separator) {
  std::string text;
  for (const std::string& word : words) {
    if (!text.empty()) text += separator;
    text += word;
  }
  return text;
}

}  // namespace attncore
