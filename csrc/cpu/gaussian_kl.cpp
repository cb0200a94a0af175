#include "op.h"

namespace vdu {

namespace {

// Bits of `needs`: which gradients are asked for. The others come back empty.
enum Needs : int64_t { kMean = 1, kLogStd = 2, kPriorMean = 4, kPriorStd = 8 };

Tensor gradient_like(const Tensor& like, bool needed) {
  return needed ? torch::stable::empty_like(like) : torch::stable::new_empty(like, {0});
}

Operand gradient_operand(const Tensor& gradient, bool needed) {
  return needed ? operand(gradient, "gradient", Access::write) : Operand{};
}

}  // namespace

// KL(N(mean, exp(log_std)^2) || N(prior_mean, prior_std^2)), the sum over elements.
Tensor gaussian_kl(Tensor mean, Tensor log_std, Tensor prior_mean, Tensor prior_std) {
  Tensors all{mean, log_std, prior_mean, prior_std};
  for (Tensor& tensor : all) {
    check_same_shape(mean, tensor, "every argument");
    tensor = torch::stable::contiguous(tensor);
  }
  const auto total = with_compute_type(is_wide(mean), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 4> elements(isa(), starts_of({mean.numel()}),
                                {operand(all[0], "mean"), operand(all[1], "log_std"), operand(all[2], "prior_mean"),
                                 operand(all[3], "prior_std")});
    return sum_chunks<1>(chunks_of(elements.numel()), [&](int64_t chunk) {
      double sum = 0;
      elements.for_each_block(
          chunk, [&](const auto& p, int64_t, int64_t count) { sum += blocks.kl(p[0], p[1], p[2], p[3], count); });
      return std::array<double, 1>{sum};
    });
  });
  return sum_like(total[0], mean);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_backward(Tensor grad, Tensor mean, Tensor log_std,
                                                                Tensor prior_mean, Tensor prior_std, int64_t needs) {
  Tensors all{mean, log_std, prior_mean, prior_std};
  for (Tensor& tensor : all) tensor = torch::stable::contiguous(tensor);
  const std::array<bool, 4> wanted{(needs & kMean) != 0, (needs & kLogStd) != 0, (needs & kPriorMean) != 0,
                                   (needs & kPriorStd) != 0};
  Tensors out;
  for (size_t k = 0; k < 4; ++k) out.push_back(gradient_like(all[k], wanted[k]));
  const double scale = value_of(grad);
  with_compute_type(is_wide(mean), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 8> elements(
        isa(), starts_of({mean.numel()}),
        {operand(all[0], "mean"), operand(all[1], "log_std"), operand(all[2], "prior_mean"),
         operand(all[3], "prior_std"), gradient_operand(out[0], wanted[0]), gradient_operand(out[1], wanted[1]),
         gradient_operand(out[2], wanted[2]), gradient_operand(out[3], wanted[3])});
    for_each_chunk(chunks_of(elements.numel()), [&](int64_t chunk) {
      elements.for_each_block(chunk, [&](const auto& p, int64_t, int64_t) {
        blocks.kl_backward(static_cast<T>(scale), p[0], p[1], p[2], p[3], {p[4], p[5], p[6], p[7]});
      });
    });
  });
  return {out[0], out[1], out[2], out[3]};
}

// sum (mean - prior_mean)^2 / (2 prior_std^2)
Tensor quadratic_penalty(Tensor mean, Tensor prior_mean, Tensor prior_std) {
  Tensors all{mean, prior_mean, prior_std};
  for (Tensor& tensor : all) {
    check_same_shape(mean, tensor, "every argument");
    tensor = torch::stable::contiguous(tensor);
  }
  const auto total = with_compute_type(is_wide(mean), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 3> elements(isa(), starts_of({mean.numel()}),
                                {operand(all[0], "mean"), operand(all[1], "prior_mean"), operand(all[2], "prior_std")});
    return sum_chunks<1>(chunks_of(elements.numel()), [&](int64_t chunk) {
      double sum = 0;
      elements.for_each_block(
          chunk, [&](const auto& p, int64_t, int64_t count) { sum += blocks.penalty(p[0], p[1], p[2], count); });
      return std::array<double, 1>{sum};
    });
  });
  return sum_like(total[0], mean);
}

std::tuple<Tensor, Tensor, Tensor> quadratic_penalty_backward(Tensor grad, Tensor mean, Tensor prior_mean,
                                                              Tensor prior_std, int64_t needs) {
  Tensors all{mean, prior_mean, prior_std};
  for (Tensor& tensor : all) tensor = torch::stable::contiguous(tensor);
  const std::array<bool, 3> wanted{(needs & kMean) != 0, (needs & kPriorMean) != 0, (needs & kPriorStd) != 0};
  Tensors out;
  for (size_t k = 0; k < 3; ++k) out.push_back(gradient_like(all[k], wanted[k]));
  const double scale = value_of(grad);
  with_compute_type(is_wide(mean), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 6> elements(isa(), starts_of({mean.numel()}),
                                {operand(all[0], "mean"), operand(all[1], "prior_mean"), operand(all[2], "prior_std"),
                                 gradient_operand(out[0], wanted[0]), gradient_operand(out[1], wanted[1]),
                                 gradient_operand(out[2], wanted[2])});
    for_each_chunk(chunks_of(elements.numel()), [&](int64_t chunk) {
      elements.for_each_block(chunk, [&](const auto& p, int64_t, int64_t) {
        blocks.penalty_backward(static_cast<T>(scale), p[0], p[1], p[2], {p[3], nullptr, p[4], p[5]});
      });
    });
  });
  return {out[0], out[1], out[2]};
}

// The KL, and the gradients of loss + kl_weight KL in mean and log_std, from the loss's gradient at the sample of
// (seed, step).
Tensor variational_gradients_(Tensor d_mean, Tensor d_log_std, Tensor grad, Tensor mean, Tensor log_std,
                              Tensor prior_mean, Tensor prior_std, Tensor seed, Tensor step, double kl_weight,
                              int64_t offset) {
  check_same_shape(grad, d_mean, "d_mean");
  check_same_shape(grad, d_log_std, "d_log_std");
  Tensors all{grad, mean, log_std, prior_mean, prior_std};
  for (Tensor& tensor : all) {
    check_same_shape(grad, tensor, "every argument");
    tensor = torch::stable::contiguous(tensor);
  }
  const Draw draw = draw_of(seed, step, kWeightsStream);
  const auto total = with_compute_type(is_wide(mean), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 7> elements(
        isa(), starts_of({mean.numel()}),
        {operand(all[0], "grad"), operand(all[1], "mean"), operand(all[2], "log_std"), operand(all[3], "prior_mean"),
         operand(all[4], "prior_std"), operand(d_mean, "d_mean", Access::write),
         operand(d_log_std, "d_log_std", Access::write)});
    return sum_chunks<1>(chunks_of(elements.numel()), [&](int64_t chunk) {
      alignas(64) T n[kBlock];
      double sum = 0;
      elements.for_each_block(chunk, [&](const auto& p, int64_t first, int64_t count) {
        blocks.normals(draw, static_cast<uint64_t>(offset + first), n);
        sum += blocks.gradients(p[0], p[1], p[2], p[3], p[4], n, static_cast<T>(kl_weight), p[5], p[6], count);
      });
      return std::array<double, 1>{sum};
    });
  });
  return sum_like(total[0], mean);
}

std::tuple<Tensor, Tensor, Tensor> variational_gradients(Tensor grad, Tensor mean, Tensor log_std, Tensor prior_mean,
                                                         Tensor prior_std, Tensor seed, Tensor step, double kl_weight,
                                                         int64_t offset) {
  mean = torch::stable::contiguous(mean);
  log_std = torch::stable::contiguous(log_std);
  Tensor d_mean = torch::stable::empty_like(mean), d_log_std = torch::stable::empty_like(log_std);
  Tensor kl = variational_gradients_(d_mean, d_log_std, grad, mean, log_std, prior_mean, prior_std, seed, step,
                                     kl_weight, offset);
  return {kl, d_mean, d_log_std};
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CPU, m) {
  m.impl("gaussian_kl", TORCH_BOX(&gaussian_kl));
  m.impl("gaussian_kl_backward", TORCH_BOX(&gaussian_kl_backward));
  m.impl("quadratic_penalty", TORCH_BOX(&quadratic_penalty));
  m.impl("quadratic_penalty_backward", TORCH_BOX(&quadratic_penalty_backward));
  m.impl("variational_gradients", TORCH_BOX(&variational_gradients));
  m.impl("variational_gradients_", TORCH_BOX(&variational_gradients_));
}

}  // namespace vdu
