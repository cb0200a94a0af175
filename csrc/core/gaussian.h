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
  const T precision_root = T(1) / prior_std;  // one division: it costs as much as twenty products
  const T scaled = (mean - prior_mean) * precision_root;
  const T std_ratio = exponential(log_std) * precision_root;
  const T excess = std_ratio * std_ratio - T(1);
  return {scaled * precision_root, excess, -(excess + scaled * scaled) * precision_root};
}

// KL of one element, and the gradients of loss + kl_weight KL in mean and log_std from dloss/dtheta at the sample
// mean + exp(log_std) n.
template <typename T>
struct VariationalGradient {
  T kl, mean, log_std;
};

template <typename T>
VDU_INLINE VariationalGradient<T> variational_gradient(T grad, T mean, T log_std, T prior_mean, T prior_std, T n,
                                                       T kl_weight) {
  const T precision_root = T(1) / prior_std;
  const T std = exponential(log_std);
  const T std_ratio = std * precision_root;
  const T scaled = (mean - prior_mean) * precision_root;
  const T squared_ratio = std_ratio * std_ratio;
  return {T(0.5) * squared_ratio + T(0.5) * scaled * scaled - (log_std - natural_log(prior_std)) - T(0.5),
          grad + kl_weight * (scaled * precision_root), grad * n * std + kl_weight * (squared_ratio - T(1))};
}

// (mean - prior_mean)^2 / (2 prior_std^2) of one element.
template <typename T>
VDU_INLINE T penalty_term(T mean, T prior_mean, T prior_std) {
  const T scaled = (mean - prior_mean) / prior_std;
  return T(0.5) * scaled * scaled;
}

}  // namespace vdu::VDU_ISA
