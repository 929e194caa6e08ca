// Pieces of messages.
#pragma once

#include <cstdio>
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

/// A number of any size.
inline std::string short_text(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", number);
  return text;
}

}  // namespace attncore
