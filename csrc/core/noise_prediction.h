// Noising a batch and the error of predicting it, for one element.
#pragma once

#include "macros.h"

namespace vdu::VDU_ISA {

template <typename T>
VDU_INLINE T mixed(T x0, T n, T signal, T noise) {
  return signal * x0 + noise * n;
}

// prediction - target, the target being signal x0 + noise n or, where one of these is absent, the other alone.
template <bool with_x0, bool with_noise, typename T>
VDU_INLINE T prediction_difference(T prediction, T x0, T n, T signal, T noise) {
  if constexpr (!with_noise) return prediction - signal * x0;
  if constexpr (!with_x0) return prediction - noise * n;
  return prediction - mixed(x0, n, signal, noise);
}

}  // namespace vdu::VDU_ISA
