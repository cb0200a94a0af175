// Refusing operands: VDU_CHECK(condition, "what", " is wrong") throws std::runtime_error, which torch raises in Python.
//
// Not by STD_TORCH_CHECK, which writes its message, with a line number in it, to a stream. Where the compiler links
// libstdc++ statically, a library has one of its own beside torch's, and writing a number to a stream ends the process.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace vdu {

[[noreturn]] inline void refuse(std::initializer_list<const char*> parts) {
  std::string message;
  for (const char* part : parts) message += part;
  throw std::runtime_error(message);
}

}  // namespace vdu

#define VDU_CHECK(condition, ...)                   \
  do {                                              \
    if (!(condition)) ::vdu::refuse({__VA_ARGS__}); \
  } while (false)
