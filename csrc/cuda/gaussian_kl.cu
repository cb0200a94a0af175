#include "../core/gaussian.h"
#include "op.cuh"

namespace vdu {

namespace {

// Bits of `needs`: which gradients are asked for. The others come back empty.
enum Needs : int64_t { kNeedsMean = 1, kNeedsLogStd = 2, kNeedsPriorMean = 4, kNeedsPriorStd = 8 };

enum : int { kMean, kPriorMean, kPriorStd, kLogStd };

template <typename T, bool with_log_std>
struct Divergence {
  static constexpr int kSums = 1;

  __device__ Nothing prepare() const { return {}; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(Nothing, const Place& place, double* sums) const {
    T mean[kItem], prior_mean[kItem], prior_std[kItem];
    if constexpr (with_log_std) {
      T log_std[kItem];
      place.load(kMean, mean, kPriorMean, prior_mean, kPriorStd, prior_std, kLogStd, log_std);
      VDU_LANES mean[i] = portable::kl_term(mean[i], log_std[i], prior_mean[i], prior_std[i]);
    } else {
      place.load(kMean, mean, kPriorMean, prior_mean, kPriorStd, prior_std);
      VDU_LANES mean[i] = portable::penalty_term(mean[i], prior_mean[i], prior_std[i]);
    }
    add_terms(sums[0], mean, place);
  }
};

// The gradients of a divergence times `grad`, those that have somewhere to go.
template <typename T, bool with_log_std>
struct DivergenceBackward {
  static constexpr int kSums = 0;
  static constexpr int kInputs = with_log_std ? 4 : 3;  // then the gradients, in the same order
  Reals grad;

  __device__ T prepare() const { return grad.get<T>(0); }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(T scale, const Place& place, double*) const {
    T mean[kItem], prior_mean[kItem], prior_std[kItem], log_std[kItem];
    if constexpr (with_log_std) {
      place.load(kMean, mean, kPriorMean, prior_mean, kPriorStd, prior_std, kLogStd, log_std);
    } else {
      place.load(kMean, mean, kPriorMean, prior_mean, kPriorStd, prior_std);
    }
    VDU_LANES {
      portable::KlGradient<T> d;
      if constexpr (with_log_std) {
        d = portable::kl_gradient(mean[i], log_std[i], prior_mean[i], prior_std[i]);
        log_std[i] = scale * d.log_std;
      } else {
        d = portable::penalty_gradient(mean[i], prior_mean[i], prior_std[i]);
      }
      mean[i] = scale * d.mean;
      prior_mean[i] = -mean[i];
      prior_std[i] = scale * d.prior_std;
    }
    write(place, kMean, mean);
    write(place, kPriorMean, prior_mean);
    write(place, kPriorStd, prior_std);
    if constexpr (with_log_std) write(place, kLogStd, log_std);
  }

  template <int kItem, typename Place>
  __device__ __forceinline__ void write(const Place& place, int input, const T (&gradient)[kItem]) const {
    if (place.has(kInputs + input)) place.store(kInputs + input, gradient);
  }
};

template <typename T>
struct VariationalGradients {
  static constexpr int kSums = 1, kTogether = 1;
  enum : int { kGrad, kMean, kLogStd, kPriorMean, kPriorStd, kDMean, kDLogStd, kOperands };
  Noise noise;
  T kl_weight;

  __device__ NoiseKey prepare() const { return noise.key(); }

  __device__ int64_t first_normal() const { return noise.offset; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Place& place, double* sums) const {
    T grad[kItem], mean[kItem], log_std[kItem], prior_mean[kItem], prior_std[kItem], n[kItem];
    place.load(kGrad, grad, kMean, mean, kLogStd, log_std, kPriorMean, prior_mean, kPriorStd, prior_std);
    place.draw(key, noise.offset, n);
    VDU_LANES {
      T d_mean, d_log_std, kl;
      const T std = portable::exponential(log_std[i]), log_prior_std = portable::natural_log(prior_std[i]);
      portable::objective_gradients(grad[i], mean[i], log_std[i], prior_mean[i], prior_std[i], std, log_prior_std, n[i],
                                    kl_weight, d_mean, d_log_std, kl);
      mean[i] = d_mean, log_std[i] = d_log_std, n[i] = kl;
    }
    place.store(kDMean, mean);
    place.store(kDLogStd, log_std);
    add_terms(sums[0], n, place);
  }
};

void make_contiguous(Tensors& tensors) {
  for (Tensor& tensor : tensors) {
    check_same_shape(tensors[0], tensor, "every argument");
    tensor = torch::stable::contiguous(tensor);
  }
}

template <bool with_log_std, size_t kInputs>
Tensor divergence(const std::array<Operand, kInputs>& inputs, const Tensor& mean) {
  Tensor out = sum_beside(mean);
  const Lists<kInputs, 1> lists(mean, is_wide(mean), inputs);
  with_items(lists, [&](auto items) {
    over_lists<decltype(items)>(lists, Divergence<typename decltype(items)::Type, with_log_std>{}, out);
  });
  return out;
}

template <bool with_log_std, size_t kOperands>
void divergence_backward(const std::array<Operand, kOperands>& operands, const Tensor& mean, const Tensor& grad) {
  const Tensor scale = reals_beside(grad, 1, "grad", mean);
  const Lists<kOperands, 1> lists(mean, is_wide(mean), operands);
  with_items(lists, [&](auto items) {
    using T = typename decltype(items)::Type;
    over_lists<decltype(items)>(lists, DivergenceBackward<T, with_log_std>{reals_of(scale)});
  });
}

Tensor gradient_like(const Tensor& like, bool needed) {
  return needed ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
}

Operand gradient(const Tensor& tensor, bool needed) { return {needed ? Tensors{tensor} : Tensors{}, "gradient"}; }

}  // namespace

// KL(N(mean, exp(log_std)^2) || N(prior_mean, prior_std^2)), the sum over elements.
Tensor gaussian_kl(Tensor mean, Tensor log_std, Tensor prior_mean, Tensor prior_std) {
  const auto guard = on_device_of(mean);
  Tensors all{mean, prior_mean, prior_std, log_std};
  make_contiguous(all);
  return divergence<true, 4>({Operand{{all[0]}, "mean"}, Operand{{all[1]}, "prior_mean"},
                              Operand{{all[2]}, "prior_std"}, Operand{{all[3]}, "log_std"}},
                             all[0]);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_backward(Tensor grad, Tensor mean, Tensor log_std,
                                                                Tensor prior_mean, Tensor prior_std, int64_t needs) {
  const auto guard = on_device_of(mean);
  Tensors all{mean, prior_mean, prior_std, log_std};
  make_contiguous(all);
  const std::array<bool, 4> wanted{(needs & kNeedsMean) != 0, (needs & kNeedsPriorMean) != 0,
                                   (needs & kNeedsPriorStd) != 0, (needs & kNeedsLogStd) != 0};
  Tensors out;
  for (size_t k = 0; k < 4; ++k) out.push_back(gradient_like(all[k], wanted[k]));
  divergence_backward<true, 8>(
      {Operand{{all[0]}, "mean"}, Operand{{all[1]}, "prior_mean"}, Operand{{all[2]}, "prior_std"},
       Operand{{all[3]}, "log_std"}, gradient(out[0], wanted[0]), gradient(out[1], wanted[1]),
       gradient(out[2], wanted[2]), gradient(out[3], wanted[3])},
      all[0], grad);
  return {out[0], out[3], out[1], out[2]};
}

// sum (mean - prior_mean)^2 / (2 prior_std^2)
Tensor quadratic_penalty(Tensor mean, Tensor prior_mean, Tensor prior_std) {
  const auto guard = on_device_of(mean);
  Tensors all{mean, prior_mean, prior_std};
  make_contiguous(all);
  return divergence<false, 3>(
      {Operand{{all[0]}, "mean"}, Operand{{all[1]}, "prior_mean"}, Operand{{all[2]}, "prior_std"}}, all[0]);
}

std::tuple<Tensor, Tensor, Tensor> quadratic_penalty_backward(Tensor grad, Tensor mean, Tensor prior_mean,
                                                              Tensor prior_std, int64_t needs) {
  const auto guard = on_device_of(mean);
  Tensors all{mean, prior_mean, prior_std};
  make_contiguous(all);
  const std::array<bool, 3> wanted{(needs & kNeedsMean) != 0, (needs & kNeedsPriorMean) != 0,
                                   (needs & kNeedsPriorStd) != 0};
  Tensors out;
  for (size_t k = 0; k < 3; ++k) out.push_back(gradient_like(all[k], wanted[k]));
  divergence_backward<false, 6>(
      {Operand{{all[0]}, "mean"}, Operand{{all[1]}, "prior_mean"}, Operand{{all[2]}, "prior_std"},
       gradient(out[0], wanted[0]), gradient(out[1], wanted[1]), gradient(out[2], wanted[2])},
      all[0], grad);
  return {out[0], out[1], out[2]};
}

// The KL, and the gradients of loss + kl_weight KL in mean and log_std, from the loss's gradient at the sample of
// (seed, step).
Tensor variational_gradients_(Tensor d_mean, Tensor d_log_std, Tensor grad, Tensor mean, Tensor log_std,
                              Tensor prior_mean, Tensor prior_std, Tensor seed, Tensor step, double kl_weight,
                              int64_t offset) {
  const auto guard = on_device_of(mean);
  check_same_shape(grad, d_mean, "d_mean");
  check_same_shape(grad, d_log_std, "d_log_std");
  Tensors all{grad, mean, log_std, prior_mean, prior_std};
  make_contiguous(all);
  Tensor kl = sum_beside(mean);
  const Noise noise = noise_of(seed, step, kWeightsStream, offset, mean);
  const Lists<7, 1> lists(mean, is_wide(mean),
                          {Operand{{all[0]}, "grad"}, Operand{{all[1]}, "mean"}, Operand{{all[2]}, "log_std"},
                           Operand{{all[3]}, "prior_mean"}, Operand{{all[4]}, "prior_std"}, Operand{{d_mean}, "d_mean"},
                           Operand{{d_log_std}, "d_log_std"}});
  with_items(lists, [&](auto items) {
    using T = typename decltype(items)::Type;
    over_lists<decltype(items)>(lists, VariationalGradients<T>{noise, static_cast<T>(kl_weight)}, kl);
  });
  return kl;
}

std::tuple<Tensor, Tensor, Tensor> variational_gradients(Tensor grad, Tensor mean, Tensor log_std, Tensor prior_mean,
                                                         Tensor prior_std, Tensor seed, Tensor step, double kl_weight,
                                                         int64_t offset) {
  const auto guard = on_device_of(mean);
  mean = torch::stable::contiguous(mean);
  log_std = torch::stable::contiguous(log_std);
  Tensor d_mean = torch::stable::empty_like(mean), d_log_std = torch::stable::empty_like(log_std);
  Tensor kl = variational_gradients_(d_mean, d_log_std, grad, mean, log_std, prior_mean, prior_std, seed, step,
                                     kl_weight, offset);
  return {kl, d_mean, d_log_std};
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CUDA, m) {
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
  m.impl("quadratic_penalty", TORCH_BOX(&quadratic_penalty));
  m.impl("quadratic_penalty_backward", TORCH_BOX(&quadratic_penalty_backward));
  m.impl("variational_gradients", TORCH_BOX(&variational_gradients));
  m.impl("variational_gradients_", TORCH_BOX(&variational_gradients_));
}

}  // namespace vdu
