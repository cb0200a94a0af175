"""The hot paths in plain torch: the definition that every faster implementation is held to.

All functions work in the dtype of their inputs, float64 included, and are differentiable in their float tensors.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vdu_fast.rng import Seed, Stream, standard_normal

Reduction = Literal["mean", "sum", "none"]


def sample_weights(mean: Tensor, log_std: Tensor, seed: Seed, step: Seed = 0, *, offset: int = 0) -> Tensor:
    """theta = mean + exp(log_std) n with n ~ N(0, 1) of stream WEIGHTS (Kingma and Welling 2014, eq. 4)."""
    n = standard_normal(
        mean.shape, seed, step, stream=Stream.WEIGHTS, offset=offset, dtype=mean.dtype, device=mean.device
    )
    return mean + log_std.exp() * n


def add_noise(x0: Tensor, timesteps: Tensor, alphas_cumprod: Tensor, seed: Seed, step: Seed = 0) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with eps of stream IMAGE_NOISE (Ho et al. 2020, eq. 4)."""
    eps = image_noise(x0, seed, step)
    abar = alphas_cumprod.to(x0.device)[timesteps].reshape((-1,) + (1,) * (x0.ndim - 1))
    return abar.sqrt().to(x0.dtype) * x0 + (1 - abar).sqrt().to(x0.dtype) * eps


def image_noise(like: Tensor, seed: Seed, step: Seed = 0) -> Tensor:
    """The eps that `add_noise` adds to, and `noise_prediction_loss` compares with, a batch of this shape."""
    return standard_normal(like.shape, seed, step, stream=Stream.IMAGE_NOISE, dtype=like.dtype, device=like.device)


def noise_prediction_loss(
    prediction: Tensor,
    seed: Seed,
    step: Seed = 0,
    *,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    target: Tensor | None = None,
) -> Tensor:
    """Weighted squared error between a prediction [B, ...] and the noise of (seed, step), or a given target.

    Args:
        weight: [B], multiplies the error of each sample (C_t, for instance).
        reduction: "none" gives the sum over each sample's elements, [B]; "sum" adds these over the batch; "mean"
            divides that by the number of elements of `prediction`.
        target: compared with instead of regenerated noise.
    """
    target = image_noise(prediction, seed, step) if target is None else target
    squared = (target - prediction).square()
    per_sample = squared.flatten(1).sum(dim=1) if squared.ndim > 1 else squared
    if weight is not None:
        per_sample = per_sample * weight.to(per_sample)
    if reduction == "none":
        return per_sample
    return per_sample.sum() if reduction == "sum" else per_sample.sum() / prediction.numel()


def gaussian_kl(mean: Tensor, log_std: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """KL(N(mean, exp(log_std)^2) || N(prior_mean, prior_std^2)), summed over all elements: a scalar."""
    ratio = log_std - prior_std.log()
    scaled = (mean - prior_mean) / prior_std
    return (0.5 * torch.exp(2 * ratio) + 0.5 * scaled.square() - ratio - 0.5).sum()


def quadratic_penalty(mean: Tensor, prior_mean: Tensor, prior_std: Tensor) -> Tensor:
    """sum (mean - prior_mean)^2 / (2 prior_std^2), the KL of two Gaussians with equal variances: a scalar."""
    return 0.5 * ((mean - prior_mean) / prior_std).square().sum()
