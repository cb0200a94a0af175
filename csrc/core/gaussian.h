// Sampling, Kullback-Leibler divergence and their derivatives, for one element.
#pragma once

#include "elementary.h"

namespace vdu::VDU_ISA {

// KL(N(mean, exp(log_std)^2) || N(prior_mean, prior_std^2)) of one element.
template <typename T>
VDU_INLINE T kl_term(T mean, T log_std, T prior_mean, T prior_std) {
  const T ratio = log_std - natural_log(prior_std);
  const T scaled = (mean - prior_mean) / prior_std;
  return T(0.5) * exponential(T(2) * ratio) + T(0.5) * scaled * scaled - ratio - T(0.5);
}

// Derivatives of kl_term. That in prior_mean is minus that in mean.
template <typename T>
struct KlGradient {
  T mean, log_std, prior_std;
};

template <typename T>
VDU_INLINE KlGradient<T> kl_gradient(T mean, T log_std, T prior_mean, T prior_std) {
  const T scaled = (mean - prior_mean) / prior_std;
  const T std_ratio = exponential(log_std) / prior_std;
  const T excess = std_ratio * std_ratio - T(1);
  return {scaled / prior_std, excess, -(excess + scaled * scaled) / prior_std};
}

// (mean - prior_mean)^2 / (2 prior_std^2) of one element.
template <typename T>
VDU_INLINE T penalty_term(T mean, T prior_mean, T prior_std) {
  const T scaled = (mean - prior_mean) / prior_std;
  return T(0.5) * scaled * scaled;
}

}  // namespace vdu::VDU_ISA
