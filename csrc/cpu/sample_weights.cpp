#include "op.h"

namespace vdu {

// out = mean + exp(log_std) n over lists of tensors; `out` may have another dtype.
void sample_weights_(Tensors out, Tensors mean, Tensors log_std, Tensor seed, Tensor step, int64_t offset) {
  const auto numels = numels_of(out);
  check_same_sizes(numels, mean, "mean");
  check_same_sizes(numels, log_std, "log_std");
  const Draw draw = draw_of(seed, step, kWeightsStream);
  with_compute_type(is_wide(mean), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 3> elements(
        isa(), starts_of(numels),
        {operand(out, "out", Access::write), operand(mean, "mean"), operand(log_std, "log_std")});
    for_each_chunk(chunks_of(elements.numel()), [&](int64_t chunk) {
      alignas(64) T n[kBlock];
      elements.for_each_block(chunk, [&](const auto& p, int64_t first, int64_t) {
        blocks.normals(draw, static_cast<uint64_t>(offset + first), n);
        blocks.sample(p[1], p[2], n, p[0]);
      });
    });
  });
}

Tensor sample_weights(Tensor mean, Tensor log_std, Tensor seed, Tensor step, int64_t offset) {
  check_same_shape(mean, log_std, "log_std");
  mean = torch::stable::contiguous(mean);
  Tensor out = torch::stable::empty_like(mean);
  sample_weights_({out}, {mean}, {torch::stable::contiguous(log_std)}, seed, step, offset);
  return out;
}

// The gradient in log_std: grad exp(log_std) n, with the noise drawn again. That in mean is grad itself.
Tensor sample_weights_backward(Tensor grad, Tensor log_std, Tensor seed, Tensor step, int64_t offset) {
  check_same_shape(log_std, grad, "grad");
  grad = torch::stable::contiguous(grad);
  log_std = torch::stable::contiguous(log_std);
  Tensor out = torch::stable::empty_like(log_std);
  const Draw draw = draw_of(seed, step, kWeightsStream);
  with_compute_type(is_wide(log_std), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 3> elements(
        isa(), starts_of({out.numel()}),
        {operand(out, "out", Access::write), operand(grad, "grad"), operand(log_std, "log_std")});
    for_each_chunk(chunks_of(elements.numel()), [&](int64_t chunk) {
      alignas(64) T n[kBlock];
      elements.for_each_block(chunk, [&](const auto& p, int64_t first, int64_t) {
        blocks.normals(draw, static_cast<uint64_t>(offset + first), n);
        blocks.sample_backward(p[1], p[2], n, p[0]);
      });
    });
  });
  return out;
}

// out = center + prior_std z + std n, where std = exp(log_std), or noise_scale prior_std if log_std is empty. With
// noise_scale 0 no noise is drawn: the mean.
void sample_whitened_weights_(Tensors out, Tensors center, Tensors prior_std, Tensors z, Tensors log_std, Tensor seed,
                              Tensor step, double noise_scale, int64_t offset) {
  const auto numels = numels_of(out);
  check_same_sizes(numels, center, "center");
  check_same_sizes(numels, prior_std, "prior_std");
  check_same_sizes(numels, z, "z");
  check_same_sizes(numels, log_std, "log_std", true);
  const Draw draw = draw_of(seed, step, kWeightsStream);
  const bool noisy = noise_scale != 0;
  with_compute_type(is_wide(z), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 5> elements(isa(), starts_of(numels),
                                {operand(out, "out", Access::write), operand(center, "center"),
                                 operand(prior_std, "prior_std"), operand(z, "z"), operand(log_std, "log_std")});
    for_each_chunk(chunks_of(elements.numel()), [&](int64_t chunk) {
      alignas(64) T n[kBlock];
      elements.for_each_block(chunk, [&](const auto& p, int64_t first, int64_t) {
        if (noisy) blocks.normals(draw, static_cast<uint64_t>(offset + first), n);
        blocks.whitened(p[1], p[2], p[3], p[4], noisy ? n : nullptr, static_cast<T>(noise_scale), p[0]);
      });
    });
  });
}

Tensor sample_whitened_weights(Tensor center, Tensor prior_std, Tensor z, Tensor seed, Tensor step, double noise_scale,
                               int64_t offset) {
  check_same_shape(center, prior_std, "prior_std");
  check_same_shape(center, z, "z");
  z = torch::stable::contiguous(z);
  Tensor out = torch::stable::empty_like(z);
  sample_whitened_weights_({out}, {torch::stable::contiguous(center)}, {torch::stable::contiguous(prior_std)}, {z}, {},
                           seed, step, noise_scale, offset);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CPU, m) {
  m.impl("sample_weights", TORCH_BOX(&sample_weights));
  m.impl("sample_weights_", TORCH_BOX(&sample_weights_));
  m.impl("sample_weights_backward", TORCH_BOX(&sample_weights_backward));
  m.impl("sample_whitened_weights", TORCH_BOX(&sample_whitened_weights));
  m.impl("sample_whitened_weights_", TORCH_BOX(&sample_whitened_weights_));
}

}  // namespace vdu
