#include "../core/noise_prediction.h"
#include "samples.h"

namespace vdu {

namespace {

// The target signal x_0 + noise n of every sample. Without x_0 it is the noise, without coefficients it is x_0.
struct Target {
  Tensors x0;
  std::vector<double> signal, noise;
  bool noisy;

  Target(const Batch& batch, const Tensor& prediction, const std::optional<Tensor>& given,
         const std::optional<Tensor>& signals, const std::optional<Tensor>& noises)
      : signal(per_sample(signals, batch.samples, given.has_value() ? 1 : 0, "signal")),
        noise(per_sample(noises, batch.samples, given.has_value() ? 0 : 1, "noise")),
        noisy(noises.has_value() || !given.has_value()) {
    if (!given.has_value()) return;
    check_same_shape(prediction, *given, "target");
    x0.push_back(torch::stable::contiguous(*given));
  }

  // prediction - target for one element of sample b; x0 is null where none was given.
  template <typename T>
  T difference(T prediction, const T* x0, T n, size_t b) const {
    const T aim = static_cast<T>(signal[b]), scale = static_cast<T>(noise[b]);
    if (x0 == nullptr) return portable::prediction_difference<false, true>(prediction, T(0), n, aim, scale);
    return noisy ? portable::prediction_difference<true, true>(prediction, *x0, n, aim, scale)
                 : portable::prediction_difference<true, false>(prediction, *x0, n, aim, scale);
  }
};

}  // namespace

// Sum of (target - prediction)^2 over the elements of every sample, [B], in float32 or more.
Tensor noise_prediction_error(Tensor prediction, std::optional<Tensor> x0, std::optional<Tensor> signal,
                              std::optional<Tensor> noise, Tensor seed, Tensor step) {
  prediction = torch::stable::contiguous(prediction);
  const Batch batch(prediction);
  const Target target(batch, prediction, x0, signal, noise);
  const Draw draw = draw_of(seed, step, kImageNoiseStream);
  const Operand predicted = operand(prediction, "prediction"), aim = operand(target.x0, "target");
  const int64_t chunks = batch.samples * batch.chunks;
  std::vector<double> partial(static_cast<size_t>(chunks));
  with_compute_type(is_wide(prediction), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    if (batch.small()) {  // one chunk a sample
      for_each_pack<T, 2>(batch, {predicted, aim}, [&](const Stream<T, 2>& elements, int64_t b) {
        alignas(64) T n[kBlock] = {};
        elements.for_each_block(0, [&](const auto& p, int64_t first, int64_t count) {
          if (target.noisy) blocks.normals(draw, static_cast<uint64_t>(b * batch.elements + first), n);
          for_each_sample(batch, first, count, [&](int64_t sample, int64_t from, int64_t end) {
            const auto at = static_cast<size_t>(b + sample);
            for (int64_t i = from; i < end; ++i) {
              const T d = target.difference(p[0][i], p[1] == nullptr ? nullptr : p[1] + i, n[i], at);
              partial[at] += static_cast<double>(d * d);
            }
          });
        });
      });
      return;
    }
    for_each_chunk_of_samples(batch, [&](int64_t chunk) {
      const int64_t b = chunk / batch.chunks, start = b * batch.elements;
      const auto at = static_cast<size_t>(b);
      const Stream<T, 2> elements(isa(), {0, batch.elements},
                                  {sample_of(predicted, b, batch.elements), sample_of(aim, b, batch.elements)});
      alignas(64) T n[kBlock];
      double sum = 0;
      elements.for_each_block(chunk % batch.chunks, [&](const auto& p, int64_t first, int64_t count) {
        if (target.noisy) blocks.normals(draw, static_cast<uint64_t>(start + first), n);
        sum += blocks.squared_error(p[0], p[1], target.noisy ? n : nullptr, static_cast<T>(target.signal[at]),
                                    static_cast<T>(target.noise[at]), count);
      });
      partial[static_cast<size_t>(chunk)] = sum;
    });
  });
  Tensor wide = torch::stable::empty({batch.samples}, ScalarType::Double);
  auto* sums = static_cast<double*>(wide.mutable_data_ptr());
  for (int64_t b = 0; b < batch.samples; ++b) {
    sums[b] = 0;
    for (int64_t c = 0; c < batch.chunks; ++c) sums[b] += partial[static_cast<size_t>(b * batch.chunks + c)];
  }
  return torch::stable::to(wide, sum_dtype(prediction));
}

// The gradient in the prediction, 2 grad (prediction - target), with the noise drawn again. Samples whose gradient is 0
// (a hinge has let go of them) cost nothing but the zeros.
Tensor noise_prediction_error_backward(Tensor grad, Tensor prediction, std::optional<Tensor> x0,
                                       std::optional<Tensor> signal, std::optional<Tensor> noise, Tensor seed,
                                       Tensor step) {
  prediction = torch::stable::contiguous(prediction);
  const Batch batch(prediction);
  const Target target(batch, prediction, x0, signal, noise);
  const auto grads = per_sample(grad, batch.samples, "grad");
  Tensor out = torch::stable::empty_like(prediction);
  const Draw draw = draw_of(seed, step, kImageNoiseStream);
  const Operand predicted = operand(prediction, "prediction"), aim = operand(target.x0, "target"),
                to = operand(out, "out", Access::write);
  with_compute_type(is_wide(prediction), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    if (batch.small()) {
      for_each_pack<T, 3>(batch, {to, predicted, aim}, [&](const Stream<T, 3>& elements, int64_t b) {
        alignas(64) T n[kBlock] = {};
        elements.for_each_block(0, [&](const auto& p, int64_t first, int64_t count) {
          if (target.noisy) blocks.normals(draw, static_cast<uint64_t>(b * batch.elements + first), n);
          for_each_sample(batch, first, count, [&](int64_t sample, int64_t from, int64_t end) {
            const auto at = static_cast<size_t>(b + sample);
            const T scale = static_cast<T>(2 * grads[at]);
            for (int64_t i = from; i < end; ++i) {
              const T d = target.difference(p[1][i], p[2] == nullptr ? nullptr : p[2] + i, n[i], at);
              p[0][i] = scale == T(0) ? T(0) : scale * d;
            }
          });
        });
      });
      return;
    }
    for_each_chunk_of_samples(batch, [&](int64_t chunk) {
      const int64_t b = chunk / batch.chunks, start = b * batch.elements;
      const auto at = static_cast<size_t>(b);
      const Stream<T, 3> elements(isa(), {0, batch.elements},
                                  {sample_of(to, b, batch.elements), sample_of(predicted, b, batch.elements),
                                   sample_of(aim, b, batch.elements)});
      alignas(64) T n[kBlock];
      elements.for_each_block(chunk % batch.chunks, [&](const auto& p, int64_t first, int64_t) {
        if (grads[at] == 0) {
          std::fill(p[0], p[0] + kBlock, T(0));
          return;
        }
        if (target.noisy) blocks.normals(draw, static_cast<uint64_t>(start + first), n);
        blocks.squared_error_backward(p[1], p[2], target.noisy ? n : nullptr, static_cast<T>(target.signal[at]),
                                      static_cast<T>(target.noise[at]), static_cast<T>(2 * grads[at]), p[0]);
      });
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CPU, m) {
  m.impl("noise_prediction_error", TORCH_BOX(&noise_prediction_error));
  m.impl("noise_prediction_error_backward", TORCH_BOX(&noise_prediction_error_backward));
}

}  // namespace vdu
