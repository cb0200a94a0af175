#include "../core/noise_prediction.h"
#include "op.cuh"

namespace vdu {

namespace {

enum : int { kPrediction, kX0, kOut };

template <typename T>
struct Coefficients {
  T signal, noise, scale;
};

// The target signal x_0 + noise n of every sample. Without x_0 it is the noise, without coefficients it is x_0.
struct Target {
  Noise image_noise;
  Reals signal, noise;
  bool with_x0, with_noise;

  template <typename T>
  __device__ __forceinline__ Coefficients<T> coefficients(int64_t sample) const {
    const T s = signal.data == nullptr ? T(with_x0 ? 1 : 0) : signal.get<T>(sample);
    const T n = noise.data == nullptr ? T(with_x0 ? 0 : 1) : noise.get<T>(sample);
    return {s, n, T(1)};
  }

  // prediction - target
  template <int kItem, typename T, typename Place>
  __device__ __forceinline__ void difference(const NoiseKey& key, const Coefficients<T>& k, const Place& place,
                                             T (&out)[kItem]) const {
    using portable::prediction_difference;
    T x0[kItem], n[kItem];
    if (with_x0) {
      place.load(kPrediction, out, kX0, x0);
    } else {
      place.load(kPrediction, out);
    }
    if (with_noise) place.draw(key, image_noise.offset, n);
    if (!with_noise) {
      VDU_LANES out[i] = prediction_difference<true, false>(out[i], x0[i], T(0), k.signal, k.noise);
    } else if (!with_x0) {
      VDU_LANES out[i] = prediction_difference<false, true>(out[i], T(0), n[i], k.signal, k.noise);
    } else {
      VDU_LANES out[i] = prediction_difference<true, true>(out[i], x0[i], n[i], k.signal, k.noise);
    }
  }
};

template <typename T>
struct NoisePredictionError {
  static constexpr int kSums = 1, kTogether = 2;
  Target target;

  __device__ NoiseKey prepare() const { return target.image_noise.key(); }

  __device__ int64_t first_normal() const { return target.image_noise.offset; }

  __device__ Coefficients<T> coefficients(int64_t sample) const { return target.coefficients<T>(sample); }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Coefficients<T>& k, const Place& place,
                                       double* sums) const {
    T terms[kItem];
    target.difference(key, k, place, terms);
    VDU_LANES terms[i] = terms[i] * terms[i];
    add_terms(sums[0], terms, place);
  }
};

template <typename T>
struct NoisePredictionErrorBackward {
  static constexpr int kSums = 0, kTogether = 2;
  Target target;
  Reals grad;

  __device__ NoiseKey prepare() const { return target.image_noise.key(); }

  __device__ int64_t first_normal() const { return target.image_noise.offset; }

  __device__ Coefficients<T> coefficients(int64_t sample) const {
    Coefficients<T> k = target.coefficients<T>(sample);
    k.scale = static_cast<T>(2 * grad.get<double>(sample));
    return k;
  }

  // A sample whose gradient is 0 (a hinge has let go of it) costs nothing but the zeros.
  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Coefficients<T>& k, const Place& place,
                                       double*) const {
    T out[kItem] = {};
    if (k.scale != T(0)) {
      target.difference(key, k, place, out);
      VDU_LANES out[i] = k.scale * out[i];
    }
    place.store(kOut, out);
  }
};

// The target's tensors as the kernels read them; they live until the launch.
struct Aim {
  Tensors x0;
  std::optional<Tensor> signal, noise;
  Target target;

  Aim(const Tensor& prediction, int64_t samples, const std::optional<Tensor>& given,
      const std::optional<Tensor>& signals, const std::optional<Tensor>& noises, const Tensor& seed,
      const Tensor& step) {
    if (given.has_value()) {
      check_same_shape(prediction, *given, "target");
      x0.push_back(torch::stable::contiguous(*given));
    }
    if (signals.has_value()) signal = reals_beside(*signals, samples, "signal", prediction);
    if (noises.has_value()) noise = reals_beside(*noises, samples, "noise", prediction);
    target = {noise_of(seed, step, kImageNoiseStream, 0, prediction), reals_of(signal), reals_of(noise),
              given.has_value(), noises.has_value() || !given.has_value()};
  }
};

}  // namespace

// Sum of (target - prediction)^2 over the elements of every sample, [B], in float32 or more.
Tensor noise_prediction_error(Tensor prediction, std::optional<Tensor> x0, std::optional<Tensor> signal,
                              std::optional<Tensor> noise, Tensor seed, Tensor step) {
  const auto guard = on_device_of(prediction);
  prediction = torch::stable::contiguous(prediction);
  const int64_t samples = samples_of(prediction);
  const Aim aim(prediction, samples, x0, signal, noise, seed, step);
  Tensor errors = torch::stable::new_empty(prediction, {samples}, sum_dtype(prediction));
  const Lists<2, 1> lists(prediction, is_wide(prediction),
                          {Operand{{prediction}, "prediction"}, Operand{aim.x0, "target"}});
  with_items(lists, [&](auto items) {
    using T = typename decltype(items)::Type;
    over_batch<decltype(items)>(lists, samples, NoisePredictionError<T>{aim.target}, errors);
  });
  return errors;
}

// The gradient in the prediction, 2 grad (prediction - target), with the noise drawn again.
Tensor noise_prediction_error_backward(Tensor grad, Tensor prediction, std::optional<Tensor> x0,
                                       std::optional<Tensor> signal, std::optional<Tensor> noise, Tensor seed,
                                       Tensor step) {
  const auto guard = on_device_of(prediction);
  prediction = torch::stable::contiguous(prediction);
  const int64_t samples = samples_of(prediction);
  const Aim aim(prediction, samples, x0, signal, noise, seed, step);
  grad = reals_beside(grad, samples, "grad", prediction);
  Tensor out = torch::stable::empty_like(prediction);
  const Lists<3, 1> lists(prediction, is_wide(prediction),
                          {Operand{{prediction}, "prediction"}, Operand{aim.x0, "target"}, Operand{{out}, "out"}});
  with_items(lists, [&](auto items) {
    using T = typename decltype(items)::Type;
    over_batch<decltype(items)>(lists, samples, NoisePredictionErrorBackward<T>{aim.target, reals_of(grad)});
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CUDA, m) {
  m.impl("noise_prediction_error", TORCH_BOX(&noise_prediction_error));
  m.impl("noise_prediction_error_backward", TORCH_BOX(&noise_prediction_error_backward));
}

}  // namespace vdu
