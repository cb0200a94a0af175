// Welford's update of a running mean and sum of squared deviations, for one element.
#pragma once

#include "macros.h"

namespace vdu::VDU_ISA {

// Returns value - mean before.
template <typename T>
VDU_INLINE T welford_step(T& mean, T& squares, T value, T inverse_count) {
  const T delta = value - mean;
  mean = mean + inverse_count * delta;
  squares = squares + delta * (value - mean);
  return delta;
}

}  // namespace vdu::VDU_ISA
