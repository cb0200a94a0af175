// Sampling, Kullback-Leibler divergence and their derivatives, for one element.
#pragma once

#include "elementary.h"

namespace vdu::VDU_ISA {

// A weight of N(mean, std^2) from a standard normal.
template <typename T>
VDU_INLINE T sampled_weight(T mean, T std, T n) {
  return mean + std * n;
}

// Its derivative in log_std, times grad.
template <typename T>
VDU_INLINE T sampled_log_std_gradient(T grad, T log_std, T n) {
  return grad * exponential(log_std) * n;
}

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
  const T precision_root = T(1) / prior_std;  // one division: it costs as much as twenty products
  const T scaled = (mean - prior_mean) * precision_root;
  const T std_ratio = exponential(log_std) * precision_root;
  const T excess = std_ratio * std_ratio - T(1);
  return {scaled * precision_root, excess, -(excess + scaled * scaled) * precision_root};
}

// (mean - prior_mean)^2 / (2 prior_std^2) of one element.
template <typename T>
VDU_INLINE T penalty_term(T mean, T prior_mean, T prior_std) {
  const T scaled = (mean - prior_mean) / prior_std;
  return T(0.5) * scaled * scaled;
}

// Its derivatives, those of kl_term without the terms of log_std.
template <typename T>
VDU_INLINE KlGradient<T> penalty_gradient(T mean, T prior_mean, T prior_std) {
  const T precision_root = T(1) / prior_std;
  const T scaled = (mean - prior_mean) * precision_root;
  return {scaled * precision_root, T(0), -(scaled * scaled) * precision_root};
}

// The gradients of loss + kl_weight KL from the loss's gradient at the sample that n gave, and the KL; one exponential
// serves all three. std = exp(log_std), log_prior_std = log(prior_std).
template <typename T>
VDU_INLINE void objective_gradients(T grad, T mean, T log_std, T prior_mean, T prior_std, T std, T log_prior_std, T n,
                                    T kl_weight, T& d_mean, T& d_log_std, T& kl) {
  const T precision_root = T(1) / prior_std;
  const T std_ratio = std * precision_root;
  const T scaled = (mean - prior_mean) * precision_root;
  const T squared_ratio = std_ratio * std_ratio;
  kl = T(0.5) * squared_ratio + T(0.5) * scaled * scaled - (log_std - log_prior_std) - T(0.5);
  d_mean = grad + kl_weight * (scaled * precision_root);
  d_log_std = grad * n * std + kl_weight * (squared_ratio - T(1));
}

}  // namespace vdu::VDU_ISA
