// One step of the variational distribution N(center + prior_std z, std^2), for one element.
//
// In the whitened coordinate z = (mean - center) / prior_std the divergence from the prior is z^2 / 2, and plain
// descent on z is natural-gradient descent on the mean.
#pragma once

#include "elementary.h"

namespace vdu::VDU_ISA {

// How a gradient becomes a step; the values are part of the op's schema (vdu_fast/reference.py holds the same).
enum class Rule : int32_t { natural = 0, natural_sign = 1, natural_adam = 2, adam = 3 };

// The scalars of one step, in the order of the op's `constants` tensor (vdu_fast/reference.py holds the same).
template <typename T>
struct StepConstants {
  T learning_rate;      // in units of prior_std for the natural rules, of the weights for adam
  T std_learning_rate;  // of log_std, which always moves by Adam
  T momentum;           // of natural and natural_sign
  T beta1, one_minus_beta1, beta2, one_minus_beta2, eps;  // of the Adam rules
  T bias_correction;                                      // sqrt(1 - beta2^t) / (1 - beta1^t)
  T kl_weight;                                            // multiplies the divergence in the objective
  T gradient_scale;  // multiplies the gradient with respect to the weights, before the divergence's is added
  T clip;            // multiplies the whole gradient
  T noise_scale;     // std = noise_scale * prior_std where log_std is not learned; 0 writes the mean in any case
};
constexpr int kStepConstants = 13;

template <typename T>
VDU_INLINE StepConstants<T> step_constants(const double* c) {
  return {T(c[0]), T(c[1]), T(c[2]), T(c[3]),  T(c[4]),  T(c[5]), T(c[6]),
          T(c[7]), T(c[8]), T(c[9]), T(c[10]), T(c[11]), T(c[12])};
}

// dL/dz (dL/dmean for adam) from dL/dtheta.
template <typename T>
VDU_INLINE T mean_gradient(const StepConstants<T>& k, T grad, T z, T prior_std) {
  return prior_std * (k.gradient_scale * grad) + k.kl_weight * z;
}

// dL/dlog_std from noise_grad = n dL/dtheta.
template <typename T>
VDU_INLINE T std_gradient(const StepConstants<T>& k, T noise_grad, T std, T prior_std) {
  const T ratio = std / prior_std;
  return (k.gradient_scale * noise_grad) * std + k.kl_weight * (ratio * ratio - T(1));
}

// Adam's direction; moves the two running averages.
template <typename T>
VDU_INLINE T adam_direction(const StepConstants<T>& k, T gradient, T& first, T& second) {
  first = first + k.one_minus_beta1 * (gradient - first);
  second = k.beta2 * second + k.one_minus_beta2 * (gradient * gradient);
  return (k.bias_correction * first) / (square_root(second) + k.eps);
}

template <typename T>
VDU_INLINE T sign_of(T x) {
  return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x);  // 0 and NaN stay what they are
}

// The next z. `squared` receives the square of the gradient in the coordinate that the rule moves, before clipping.
// `first` is read and written by the rules that have momentum, `second` by the Adam rules.
template <Rule rule, bool with_momentum, typename T>
VDU_INLINE T next_z(const StepConstants<T>& k, T grad, T z, T prior_std, T& first, T& second, T& squared) {
  T g = mean_gradient(k, grad, z, prior_std);
  if constexpr (rule == Rule::adam) g = g / prior_std;
  squared = g * g;
  g = k.clip * g;
  if constexpr (rule == Rule::natural_adam) {
    return z - k.learning_rate * adam_direction(k, g, first, second);
  } else if constexpr (rule == Rule::adam) {
    return z - k.learning_rate * (adam_direction(k, g, first, second) / prior_std);
  } else {
    if constexpr (with_momentum) {
      first = k.momentum * first + g;
      g = first;
    }
    if constexpr (rule == Rule::natural_sign) g = sign_of(g);
    return z - k.learning_rate * g;
  }
}

// The weights that the network is evaluated at: center + prior_std z, plus std n.
template <typename T>
VDU_INLINE T whitened_mean(T center, T prior_std, T z) {
  return center + prior_std * z;
}

template <typename T>
VDU_INLINE T whitened_weight(T center, T prior_std, T z, T noise_scale, T n) {
  return whitened_mean(center, prior_std, z + noise_scale * n);
}

template <typename T>
VDU_INLINE T whitened_weight_of_std(T center, T prior_std, T z, T log_std, T n) {
  return whitened_mean(center, prior_std, z) + exponential(log_std) * n;
}

// The next log_std, by Adam, from noise_grad = n dL/dtheta.
template <typename T>
VDU_INLINE T next_log_std(const StepConstants<T>& k, T noise_grad, T log_std, T prior_std, T& first, T& second) {
  const T g = std_gradient(k, noise_grad, exponential(log_std), prior_std);
  return log_std - k.std_learning_rate * adam_direction(k, g, first, second);
}

// KL of one element, from z and log(std / prior_std).
template <typename T>
VDU_INLINE T whitened_kl(T z, T log_ratio) {
  return T(0.5) * z * z + (T(0.5) * exponential(T(2) * log_ratio) - log_ratio - T(0.5));
}

}  // namespace vdu::VDU_ISA
