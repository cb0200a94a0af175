// How the elements of a tensor are stored; they are computed in float or, if any is stored so, in double.
#pragma once

#include <cstdint>

namespace vdu {

enum class Storage : int32_t { float32, float64, float16, bfloat16 };

constexpr int64_t bytes_of(Storage storage) {
  return storage == Storage::float64 ? 8 : storage == Storage::float32 ? 4 : 2;
}

}  // namespace vdu
