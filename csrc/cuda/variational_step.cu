#include "../core/variational.h"
#include "op.cuh"

namespace vdu {

namespace {

using portable::Rule;
using portable::StepConstants;

// The op's `constants`, by value, or in device memory.
struct Constants {
  double values[portable::kStepConstants];
  const double* pointer;

  template <typename T>
  __device__ __forceinline__ StepConstants<T> get() const {
    if (pointer != nullptr) return portable::step_constants<T>(pointer);
    return portable::step_constants<T>(values);
  }
};

Constants constants_of(const Tensor& constants, const Tensor& like) {
  VDU_CHECK(constants.scalar_type() == ScalarType::Double && constants.is_contiguous() &&
                constants.numel() == portable::kStepConstants,
            "constants must be a float64 tensor of 13 elements");
  const auto* data = static_cast<const double*>(constants.const_data_ptr());
  Constants result{};
  if (is_readable(constants)) {
    std::copy_n(data, portable::kStepConstants, result.values);
  } else {
    VDU_CHECK(is_beside(constants, like), "constants must be on the CPU or on the device of the other tensors");
    result.pointer = data;
  }
  return result;
}

// z of one item, its moments and the terms of the gradient's norm. Rules that differ little share a kernel.
template <bool adaptive, typename T, int kItem>
__device__ __forceinline__ void move_z(Rule rule, bool with_momentum, const StepConstants<T>& k, const T (&grad)[kItem],
                                       const T (&prior_std)[kItem], T (&z)[kItem], T (&first)[kItem],
                                       T (&second)[kItem], T (&squares)[kItem]) {
#define VDU_MOVE(RULE, MOMENTUM) \
  VDU_LANES z[i] = portable::next_z<RULE, MOMENTUM>(k, grad[i], z[i], prior_std[i], first[i], second[i], squares[i])
  if constexpr (adaptive) {
    if (rule == Rule::natural_adam) {
      VDU_MOVE(Rule::natural_adam, true);
    } else {
      VDU_MOVE(Rule::adam, true);
    }
  } else if (rule == Rule::natural) {
    if (with_momentum) {
      VDU_MOVE(Rule::natural, true);
    } else {
      VDU_MOVE(Rule::natural, false);
    }
  } else {
    if (with_momentum) {
      VDU_MOVE(Rule::natural_sign, true);
    } else {
      VDU_MOVE(Rule::natural_sign, false);
    }
  }
#undef VDU_MOVE
}

// adaptive: the Adam rules; learned: log_std is.
template <typename T, bool adaptive, bool learned>
struct VariationalStep {
  static constexpr int kSums = 2;
  enum : int {
    kTheta,
    kGrad,
    kCenter,
    kPriorStd,
    kZ,
    kFirst,
    kSecond,
    kLogStd,
    kStdFirst,
    kStdSecond,
    kNoiseGrad,
    kOperands
  };
  using BestItems = Items<T, 4, false, sizeof(T) == 8 ? 2 : learned ? 3 : 4>;
  struct Prepared {
    StepConstants<T> constants;
    NoiseKey now, next;
  };
  Constants constants;
  Noise noise;
  Integer next_draw;
  Rule rule;

  __device__ Prepared prepare() const {
    const NoiseKey now = noise.key();
    NoiseKey next = now;
    next.step = static_cast<uint32_t>(next_draw.get());
    return {constants.get<T>(), now, next};
  }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const Prepared& prepared, const Place& place, double* sums) const {
    const StepConstants<T>& k = prepared.constants;
    T grad[kItem], prior_std[kItem], z[kItem], log_std[kItem];
    {
      T first[kItem], second[kItem], squares[kItem];
      const bool with_first = adaptive || place.has(kFirst);
      if (with_first) place.load_state(kFirst, first);
      if constexpr (adaptive) place.load_state(kSecond, second);
      place.load_state(kPriorStd, prior_std);
      place.load_state(kZ, z);
      place.load(kGrad, grad);
      move_z<adaptive>(rule, with_first, k, grad, prior_std, z, first, second, squares);
      place.store_state(kZ, z);
      if (with_first) place.store_state(kFirst, first);
      if constexpr (adaptive) place.store_state(kSecond, second);
      add_terms(sums[1], squares, place);
    }
    if constexpr (learned) move_log_std(prepared, place, grad, prior_std, log_std);
    add_divergence(place, z, prior_std, log_std, sums[0]);
    write_theta(prepared, place, prior_std, z, log_std);
  }

  // Also leaves the new log_std behind.
  template <int kItem, typename Place>
  __device__ __forceinline__ void move_log_std(const Prepared& prepared, const Place& place, const T (&grad)[kItem],
                                               const T (&prior_std)[kItem], T (&log_std)[kItem]) const {
    T noise_grad[kItem], first[kItem], second[kItem];
    if (place.has(kNoiseGrad)) {
      place.load_state(kNoiseGrad, noise_grad);
    } else {
      place.draw(prepared.now, noise.offset, noise_grad);
      VDU_LANES noise_grad[i] = grad[i] * noise_grad[i];
    }
    place.load_state(kLogStd, log_std);
    place.load_state(kStdFirst, first);
    place.load_state(kStdSecond, second);
    VDU_LANES log_std[i] =
        portable::next_log_std(prepared.constants, noise_grad[i], log_std[i], prior_std[i], first[i], second[i]);
    place.store_state(kLogStd, log_std);
    place.store_state(kStdFirst, first);
    place.store_state(kStdSecond, second);
  }

  template <int kItem, typename Place>
  __device__ __forceinline__ void add_divergence(const Place& place, const T (&z)[kItem], const T (&prior_std)[kItem],
                                                 const T (&log_std)[kItem], double& sum) const {
    T terms[kItem];
    if constexpr (learned) {
      VDU_LANES terms[i] = portable::whitened_kl(z[i], log_std[i] - portable::natural_log(prior_std[i]));
    } else {
      VDU_LANES terms[i] = T(0.5) * z[i] * z[i];
    }
    add_terms(sum, terms, place);
  }

  // The weights of the next draw; the mean where noise_scale is 0.
  template <int kItem, typename Place>
  __device__ __forceinline__ void write_theta(const Prepared& prepared, const Place& place, const T (&prior_std)[kItem],
                                              const T (&z)[kItem], const T (&log_std)[kItem]) const {
    const T noise_scale = prepared.constants.noise_scale;
    T center[kItem], n[kItem];
    place.load_state(kCenter, center);
    if (noise_scale == T(0)) {
      VDU_LANES center[i] = portable::whitened_mean(center[i], prior_std[i], z[i]);
    } else {
      place.draw(prepared.next, noise.offset, n);
      if constexpr (learned) {
        VDU_LANES center[i] = portable::whitened_weight_of_std(center[i], prior_std[i], z[i], log_std[i], n[i]);
      } else {
        VDU_LANES center[i] = portable::whitened_weight(center[i], prior_std[i], z[i], noise_scale, n[i]);
      }
    }
    place.store(kTheta, center);
  }
};

// The terms of the norm that the step would report, with nothing moved.
template <typename T>
struct GradientNorm {
  static constexpr int kSums = 1;
  enum : int { kGrad, kZ, kPriorStd, kOperands };
  Constants constants;
  Rule rule;

  __device__ StepConstants<T> prepare() const { return constants.get<T>(); }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const StepConstants<T>& k, const Place& place, double* sums) const {
    T grad[kItem], z[kItem], prior_std[kItem];
    place.load_state(kZ, z);
    place.load_state(kPriorStd, prior_std);
    place.load(kGrad, grad);
    VDU_LANES grad[i] = portable::mean_gradient(k, grad[i], z[i], prior_std[i]);
    if (rule == Rule::adam) VDU_LANES grad[i] = grad[i] / prior_std[i];
    VDU_LANES grad[i] = grad[i] * grad[i];
    add_terms(sums[0], grad, place);
  }
};

template <typename T>
struct AddNoiseGradient {
  static constexpr int kSums = 0, kTogether = 2;
  enum : int { kSum, kGrad, kOperands };
  Noise noise;
  T scale;

  __device__ NoiseKey prepare() const { return noise.key(); }

  __device__ int64_t first_normal() const { return noise.offset; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Place& place, double*) const {
    T sum[kItem], grad[kItem], n[kItem];
    place.load_state(kSum, sum);
    place.load(kGrad, grad);
    place.draw(key, noise.offset, n);
    VDU_LANES sum[i] = sum[i] + scale * (grad[i] * n[i]);
    place.store_state(kSum, sum);
  }
};

// Calls body with whether the rule is one of Adam's and whether log_std is learned, as types.
template <typename Body>
void with_kind(bool adaptive, bool learned, const Body& body) {
  if (adaptive) {
    learned ? body(std::true_type{}, std::true_type{}) : body(std::true_type{}, std::false_type{});
  } else {
    learned ? body(std::false_type{}, std::true_type{}) : body(std::false_type{}, std::false_type{});
  }
}

}  // namespace

// After backward, one pass: form the gradients of z (and log_std) from that of the weights, add the divergence's, apply
// the rule, write z (and log_std), and write the weights of the next draw into theta in its own dtype.
//
// Returns [2] in float64, on the device: the KL of the new distribution, and the squared norm of the gradient before
// clipping. Absent state is an empty list, as on the CPU.
Tensor variational_step_(Tensors theta, Tensors grad, Tensors center, Tensors prior_std, Tensors z, Tensors first,
                         Tensors second, Tensors log_std, Tensors std_first, Tensors std_second, Tensors noise_grad,
                         Tensor constants, Tensor seed, Tensor draw, Tensor next_draw, int64_t rule, int64_t offset) {
  const auto numels =
      check_step(theta, grad, center, prior_std, z, first, second, log_std, std_first, std_second, noise_grad, rule);
  if (theta.empty()) return torch::stable::new_zeros(constants, {2}, ScalarType::Double);
  const Tensor& like = theta[0];
  const auto guard = on_device_of(like);
  Tensor sums = doubles_beside(like, 2);
  const Constants k = constants_of(constants, like);
  const Noise noise = noise_of(seed, draw, kWeightsStream, offset, like);
  const Integer next = integer(next_draw, "next_draw", like);
  const Lists<11> lists(
      like, is_wide(z),
      {Operand{theta, "theta"}, Operand{grad, "grad"}, state(center, "center"), state(prior_std, "prior_std"),
       state(z, "z"), state(first, "first"), state(second, "second"), state(log_std, "log_std"),
       state(std_first, "std_first"), state(std_second, "std_second"), state(noise_grad, "noise_grad")});
  with_kind(rule >= 2, !log_std.empty(), [&](auto adaptive, auto learned) {
    with_compute_type(lists.wide, [&](auto zero) {
      using T = decltype(zero);
      using Step = VariationalStep<T, adaptive.value, learned.value>;
      over_lists<typename Step::BestItems>(lists, Step{k, noise, next, static_cast<Rule>(rule)}, sums);
    });
  });
  return sums;
}

// The squared norm [1], float64, that variational_step_ would report, without moving anything: for clipping.
Tensor variational_gradient_norm(Tensors grad, Tensors z, Tensors prior_std, Tensor constants, int64_t rule) {
  const auto numels = numels_of(z);
  check_same_sizes(numels, grad, "grad");
  check_same_sizes(numels, prior_std, "prior_std");
  if (z.empty()) return torch::stable::new_zeros(constants, {1}, ScalarType::Double);
  const auto guard = on_device_of(z[0]);
  Tensor sum = doubles_beside(z[0], 1);
  const Constants k = constants_of(constants, z[0]);
  const Lists<3> lists(z[0], is_wide(z), {Operand{grad, "grad"}, state(z, "z"), state(prior_std, "prior_std")});
  with_compute_type(lists.wide, [&](auto zero) {
    using T = decltype(zero);
    over_lists<Items<T, 4>>(lists, GradientNorm<T>{k, static_cast<Rule>(rule)}, sum);
  });
  return sum;
}

// sum += scale * grad * n, n drawn again: collects dL/dlog_std / std over several draws.
void add_noise_gradient_(Tensors sum, Tensors grad, Tensor seed, Tensor draw, double scale, int64_t offset) {
  if (sum.empty()) return;
  const auto numels = numels_of(sum);
  check_same_sizes(numels, grad, "grad");
  const auto guard = on_device_of(sum[0]);
  const Noise noise = noise_of(seed, draw, kWeightsStream, offset, sum[0]);
  const Lists<2> lists(sum[0], is_wide(sum), {state(sum, "sum"), Operand{grad, "grad"}});
  if (lists.wide) {
    over_lists<Items<double, 4>>(lists, AddNoiseGradient<double>{noise, scale});
  } else if (lists.plain) {
    over_lists<Items<float, 4, true>>(lists, AddNoiseGradient<float>{noise, static_cast<float>(scale)});
  } else {
    over_lists<Items<float, 4>>(lists, AddNoiseGradient<float>{noise, static_cast<float>(scale)});
  }
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CUDA, m) {
  m.impl("variational_step_", TORCH_BOX(&variational_step_));
  m.impl("variational_gradient_norm", TORCH_BOX(&variational_gradient_norm));
  m.impl("add_noise_gradient_", TORCH_BOX(&add_noise_gradient_));
}

}  // namespace vdu
