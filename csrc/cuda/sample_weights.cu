#include "../core/gaussian.h"
#include "../core/variational.h"
#include "op.cuh"

namespace vdu {

namespace {

template <typename T>
struct SampleWeights {
  static constexpr int kSums = 0, kTogether = 2;
  enum : int { kOut, kMean, kLogStd, kOperands };
  Noise noise;

  __device__ NoiseKey prepare() const { return noise.key(); }

  __device__ int64_t first_normal() const { return noise.offset; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Place& place, double*) const {
    T mean[kItem], log_std[kItem], n[kItem];
    place.load(kMean, mean, kLogStd, log_std);
    place.draw(key, noise.offset, n);
    VDU_LANES mean[i] = portable::sampled_weight(mean[i], portable::exponential(log_std[i]), n[i]);
    place.store(kOut, mean);
  }
};

template <typename T>
struct SampleWeightsBackward {
  static constexpr int kSums = 0, kTogether = 2;
  enum : int { kOut, kGrad, kLogStd, kOperands };
  Noise noise;

  __device__ NoiseKey prepare() const { return noise.key(); }

  __device__ int64_t first_normal() const { return noise.offset; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Place& place, double*) const {
    T grad[kItem], log_std[kItem], n[kItem];
    place.load(kGrad, grad, kLogStd, log_std);
    place.draw(key, noise.offset, n);
    VDU_LANES grad[i] = portable::sampled_log_std_gradient(grad[i], log_std[i], n[i]);
    place.store(kOut, grad);
  }
};

template <typename T>
struct SampleWhitened {
  static constexpr int kSums = 0, kTogether = 2;
  enum : int { kOut, kCenter, kPriorStd, kZ, kLogStd, kOperands };
  Noise noise;
  T noise_scale;

  __device__ NoiseKey prepare() const { return noise.key(); }

  __device__ int64_t first_normal() const { return noise.offset; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Place& place, double*) const {
    T center[kItem], prior_std[kItem], z[kItem], n[kItem];
    place.load(kCenter, center, kPriorStd, prior_std, kZ, z);
    if (noise_scale == T(0)) {
      VDU_LANES z[i] = portable::whitened_mean(center[i], prior_std[i], z[i]);
    } else {
      place.draw(key, noise.offset, n);
      if (place.has(kLogStd)) {
        T log_std[kItem];
        place.load(kLogStd, log_std);
        VDU_LANES z[i] = portable::whitened_weight_of_std(center[i], prior_std[i], z[i], log_std[i], n[i]);
      } else {
        VDU_LANES z[i] = portable::whitened_weight(center[i], prior_std[i], z[i], noise_scale, n[i]);
      }
    }
    place.store(kOut, z);
  }
};

}  // namespace

// out = mean + exp(log_std) n over lists of tensors; `out` may have another dtype.
void sample_weights_(Tensors out, Tensors mean, Tensors log_std, Tensor seed, Tensor step, int64_t offset) {
  if (out.empty()) return;
  const auto numels = numels_of(out);
  check_same_sizes(numels, mean, "mean");
  check_same_sizes(numels, log_std, "log_std");
  const auto guard = on_device_of(out[0]);
  const Noise noise = noise_of(seed, step, kWeightsStream, offset, out[0]);
  const Lists<3> lists(out[0], is_wide(mean),
                       {Operand{out, "out"}, Operand{mean, "mean"}, Operand{log_std, "log_std"}});
  with_items(lists, [&](auto items) {
    over_lists<decltype(items)>(lists, SampleWeights<typename decltype(items)::Type>{noise});
  });
}

Tensor sample_weights(Tensor mean, Tensor log_std, Tensor seed, Tensor step, int64_t offset) {
  check_same_shape(mean, log_std, "log_std");
  const auto guard = on_device_of(mean);
  mean = torch::stable::contiguous(mean);
  Tensor out = torch::stable::empty_like(mean);
  sample_weights_({out}, {mean}, {torch::stable::contiguous(log_std)}, seed, step, offset);
  return out;
}

// The gradient in log_std: grad exp(log_std) n, with the noise drawn again. That in mean is grad itself.
Tensor sample_weights_backward(Tensor grad, Tensor log_std, Tensor seed, Tensor step, int64_t offset) {
  check_same_shape(log_std, grad, "grad");
  const auto guard = on_device_of(log_std);
  grad = torch::stable::contiguous(grad);
  log_std = torch::stable::contiguous(log_std);
  Tensor out = torch::stable::empty_like(log_std);
  const Noise noise = noise_of(seed, step, kWeightsStream, offset, out);
  const Lists<3, 1> lists(out, is_wide(log_std),
                          {Operand{{out}, "out"}, Operand{{grad}, "grad"}, Operand{{log_std}, "log_std"}});
  with_items(lists, [&](auto items) {
    over_lists<decltype(items)>(lists, SampleWeightsBackward<typename decltype(items)::Type>{noise});
  });
  return out;
}

// out = center + prior_std z + std n, where std = exp(log_std), or noise_scale prior_std if log_std is empty. With
// noise_scale 0 no noise is drawn: the mean.
void sample_whitened_weights_(Tensors out, Tensors center, Tensors prior_std, Tensors z, Tensors log_std, Tensor seed,
                              Tensor step, double noise_scale, int64_t offset) {
  if (out.empty()) return;
  const auto numels = numels_of(out);
  check_same_sizes(numels, center, "center");
  check_same_sizes(numels, prior_std, "prior_std");
  check_same_sizes(numels, z, "z");
  check_same_sizes(numels, log_std, "log_std", true);
  const auto guard = on_device_of(out[0]);
  const Noise noise = noise_of(seed, step, kWeightsStream, offset, out[0]);
  const Lists<5> lists(out[0], is_wide(z),
                       {Operand{out, "out"}, Operand{center, "center"}, Operand{prior_std, "prior_std"},
                        Operand{z, "z"}, Operand{log_std, "log_std"}});
  with_items(lists, [&](auto items) {
    using T = typename decltype(items)::Type;
    over_lists<decltype(items)>(lists, SampleWhitened<T>{noise, static_cast<T>(noise_scale)});
  });
}

Tensor sample_whitened_weights(Tensor center, Tensor prior_std, Tensor z, Tensor seed, Tensor step, double noise_scale,
                               int64_t offset) {
  check_same_shape(center, prior_std, "prior_std");
  check_same_shape(center, z, "z");
  const auto guard = on_device_of(z);
  z = torch::stable::contiguous(z);
  Tensor out = torch::stable::empty_like(z);
  sample_whitened_weights_({out}, {torch::stable::contiguous(center)}, {torch::stable::contiguous(prior_std)}, {z}, {},
                           seed, step, noise_scale, offset);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CUDA, m) {
  m.impl("sample_weights", TORCH_BOX(&sample_weights));
  m.impl("sample_weights_", TORCH_BOX(&sample_weights_));
  m.impl("sample_weights_backward", TORCH_BOX(&sample_weights_backward));
  m.impl("sample_whitened_weights", TORCH_BOX(&sample_whitened_weights));
  m.impl("sample_whitened_weights_", TORCH_BOX(&sample_whitened_weights_));
}

}  // namespace vdu
