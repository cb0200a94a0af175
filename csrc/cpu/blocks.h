// The table of block functions: each works on kBlock contiguous elements, is compiled once per instruction set, and is
// picked at run time. Reductions are folded in an order that depends on neither instruction set nor thread count.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vdu {

constexpr int64_t kBlock = 256;

// What identifies a draw, as plain words so that it crosses instruction sets.
struct Draw {
  uint32_t seed_low, seed_high, stream, step;
};

// Pointers to kBlock elements each; null where an op's optional operand is absent.
template <typename T>
struct StepBlock {
  const T *grad, *prior_std;
  T *z, *first, *second;
  // Only where log_std is learned:
  T *log_std, *std_first, *std_second;
  const T* noise_grad;
};

template <typename T>
struct KlGradientBlock {
  T *mean, *log_std, *prior_mean, *prior_std;  // each may be null
};

struct StepSums {
  double kl, squared_gradient;
};

template <typename T>
struct Blocks {
  // out[i] = the normal of element first + i.
  void (*normals)(const Draw&, uint64_t first, T* out);

  void (*sample)(const T* mean, const T* log_std, const T* n, T* out);
  void (*sample_backward)(const T* grad, const T* log_std, const T* n, T* out);
  // center + prior_std z + std n; std = exp(log_std), or noise_scale prior_std where log_std is null; no n, no noise.
  void (*whitened)(const T* center, const T* prior_std, const T* z, const T* log_std, const T* n, T noise_scale,
                   T* out);
  // signal * x0 + noise * n
  void (*mix)(const T* x0, const T* n, T signal, T noise, T* out);

  // Sum over count elements of (target - prediction)^2, target = signal * x0 + noise * n; x0 or n may be null.
  double (*squared_error)(const T* prediction, const T* x0, const T* n, T signal, T noise, int64_t count);
  // scale * (prediction - target)
  void (*squared_error_backward)(const T* prediction, const T* x0, const T* n, T signal, T noise, T scale, T* out);

  double (*kl)(const T* mean, const T* log_std, const T* prior_mean, const T* prior_std, int64_t count);
  void (*kl_backward)(T scale, const T* mean, const T* log_std, const T* prior_mean, const T* prior_std,
                      const KlGradientBlock<T>& out);
  double (*penalty)(const T* mean, const T* prior_mean, const T* prior_std, int64_t count);
  void (*penalty_backward)(T scale, const T* mean, const T* prior_mean, const T* prior_std,
                           const KlGradientBlock<T>& out);

  // constants: StepConstants as an array of doubles.
  StepSums (*step)(int32_t rule, const double* constants, const StepBlock<T>&, int64_t count);
  // Square of the gradient that `step` would see, without moving anything.
  double (*squared_gradient)(int32_t rule, const double* constants, const T* grad, const T* z, const T* prior_std,
                             int64_t count);
  // Adds scale * grad * n to sum.
  void (*add_noise_gradient)(const T* grad, const T* n, T scale, T* sum);

  // Gradients of (loss + kl_weight KL) in mean and log_std from the loss's gradient at the sample; returns the KL.
  double (*gradients)(const T* grad, const T* mean, const T* log_std, const T* prior_mean, const T* prior_std,
                      const T* n, T kl_weight, T* d_mean, T* d_log_std, int64_t count);

  // Welford's update of running mean and squared deviations; distance and length receive the sums of (value - mean)^2
  // and value^2.
  void (*welford)(T* mean, T* squares, const T* value, T inverse_count, int64_t count, double& distance,
                  double& length);
};

// Conversions of n elements between storage and computation.
struct Conversions {
  void (*from_half)(const uint16_t*, float*, int64_t n);
  void (*to_half)(const float*, uint16_t*, int64_t n);
  void (*from_bfloat16)(const uint16_t*, float*, int64_t n);
  void (*to_bfloat16)(const float*, uint16_t*, int64_t n);
};

struct Isa {
  const char* name;
  Blocks<float> f32;
  Blocks<double> f64;
  Conversions convert;
  // memcpy between addresses that are multiples of 16, of a multiple of 64 bytes, around the caches where there are
  // instructions for it. No software prefetch goes with it: into the second-level cache it cost up to a quarter.
  void (*copy_around_caches)(void* to, const void* from, int64_t bytes);

  template <typename T>
  const Blocks<T>& blocks() const;
};
template <>
inline const Blocks<float>& Isa::blocks<float>() const {
  return f32;
}
template <>
inline const Blocks<double>& Isa::blocks<double>() const {
  return f64;
}

}  // namespace vdu
