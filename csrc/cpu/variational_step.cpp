#include "../core/variational.h"
#include "op.h"

namespace vdu {

namespace {

std::array<double, portable::kStepConstants> constants_of(const Tensor& constants) {
  VDU_CHECK(constants.is_cpu() && constants.scalar_type() == ScalarType::Double && constants.is_contiguous() &&
                constants.numel() == portable::kStepConstants,
            "constants must be a float64 tensor of 13 elements on the CPU");
  std::array<double, portable::kStepConstants> values;
  const auto* data = static_cast<const double*>(constants.const_data_ptr());
  std::copy(data, data + values.size(), values.begin());
  return values;
}

constexpr size_t kNoiseScale = portable::kStepConstants - 1;

}  // namespace

// After backward, one pass: form the gradients of z (and log_std) from that of the weights, add the divergence's, apply
// the rule, write z (and log_std), and write the weights of the next draw into theta in its own dtype.
//
// Returns [2] in float64: the KL of the new distribution, and the squared norm of the gradient before clipping.
// Absent state is an empty list: first and second (moments that the rule has no use for), log_std, std_first and
// std_second (std not learned), noise_grad (drawn again from `draw`, where std is learned).
Tensor variational_step_(Tensors theta, Tensors grad, Tensors center, Tensors prior_std, Tensors z, Tensors first,
                         Tensors second, Tensors log_std, Tensors std_first, Tensors std_second, Tensors noise_grad,
                         Tensor constants, Tensor seed, Tensor draw, Tensor next_draw, int64_t rule, int64_t offset) {
  const auto numels =
      check_step(theta, grad, center, prior_std, z, first, second, log_std, std_first, std_second, noise_grad, rule);
  const auto k = constants_of(constants);
  const Draw now = draw_of(seed, draw, kWeightsStream), next = draw_of(seed, next_draw, kWeightsStream);
  const bool learned = !log_std.empty(), noisy = k[kNoiseScale] != 0;
  const auto sums = with_compute_type(is_wide(z), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 11> elements(
        isa(), starts_of(numels),
        {operand(theta, "theta", Access::write), operand(grad, "grad"), operand(center, "center"),
         operand(prior_std, "prior_std"), operand(z, "z", Access::update), operand(first, "first", Access::update),
         operand(second, "second", Access::update), operand(log_std, "log_std", Access::update),
         operand(std_first, "std_first", Access::update), operand(std_second, "std_second", Access::update),
         operand(noise_grad, "noise_grad")});
    return sum_chunks<2>(chunks_of(elements.numel()), [&](int64_t chunk) {
      alignas(64) T n[kBlock];
      std::array<double, 2> sum{};
      elements.for_each_block(chunk, [&](const auto& p, int64_t at, int64_t count) {
        const auto index = static_cast<uint64_t>(offset + at);
        StepBlock<T> state{p[1], p[3], p[4], p[5], p[6], p[7], p[8], p[9], p[10]};
        if (learned && p[10] == nullptr) {
          blocks.normals(now, index, n);
          for (int64_t i = 0; i < kBlock; ++i) n[i] = p[1][i] * n[i];
          state.noise_grad = n;
        }
        const StepSums added = blocks.step(static_cast<int32_t>(rule), k.data(), state, count);
        sum[0] += added.kl;
        sum[1] += added.squared_gradient;
        if (noisy) blocks.normals(next, index, n);
        blocks.whitened(p[2], p[3], p[4], p[7], noisy ? n : nullptr, static_cast<T>(k[kNoiseScale]), p[0]);
      });
      return sum;
    });
  });
  return doubles(sums);
}

// The squared norm [1], float64, that variational_step_ would report, without moving anything: for clipping.
Tensor variational_gradient_norm(Tensors grad, Tensors z, Tensors prior_std, Tensor constants, int64_t rule) {
  const auto numels = numels_of(z);
  check_same_sizes(numels, grad, "grad");
  check_same_sizes(numels, prior_std, "prior_std");
  VDU_CHECK(rule >= 0 && rule <= 3, "rule must be 0 to 3");
  const auto k = constants_of(constants);
  const auto sums = with_compute_type(is_wide(z), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 3> elements(isa(), starts_of(numels),
                                {operand(grad, "grad"), operand(z, "z"), operand(prior_std, "prior_std")});
    return sum_chunks<1>(chunks_of(elements.numel()), [&](int64_t chunk) {
      double sum = 0;
      elements.for_each_block(chunk, [&](const auto& p, int64_t, int64_t count) {
        sum += blocks.squared_gradient(static_cast<int32_t>(rule), k.data(), p[0], p[1], p[2], count);
      });
      return std::array<double, 1>{sum};
    });
  });
  return doubles(sums);
}

// sum += scale * grad * n, n drawn again: collects dL/dlog_std / std over several draws.
void add_noise_gradient_(Tensors sum, Tensors grad, Tensor seed, Tensor draw, double scale, int64_t offset) {
  const auto numels = numels_of(sum);
  check_same_sizes(numels, grad, "grad");
  const Draw now = draw_of(seed, draw, kWeightsStream);
  with_compute_type(is_wide(sum), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 2> elements(isa(), starts_of(numels), {operand(sum, "sum", Access::update), operand(grad, "grad")});
    for_each_chunk(chunks_of(elements.numel()), [&](int64_t chunk) {
      alignas(64) T n[kBlock];
      elements.for_each_block(chunk, [&](const auto& p, int64_t first, int64_t) {
        blocks.normals(now, static_cast<uint64_t>(offset + first), n);
        blocks.add_noise_gradient(p[1], n, static_cast<T>(scale), p[0]);
      });
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CPU, m) {
  m.impl("variational_step_", TORCH_BOX(&variational_step_));
  m.impl("variational_gradient_norm", TORCH_BOX(&variational_gradient_norm));
  m.impl("add_noise_gradient_", TORCH_BOX(&add_noise_gradient_));
}

}  // namespace vdu
