"""How well a network predicts, image by image and timestep by timestep, and whether that gives training images away."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vdu_fast import rng
from vdu_fast.pipelines import Denoiser


def even_timesteps(count: int, total: int) -> Tensor:
    """The middles of `count` equal parts of range(total), int64 [count]; fewer where there are not as many."""
    middles = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.unique((middles * total).long())


def noise_prediction_errors(
    denoiser: Denoiser, images: Tensor, *, timesteps: Tensor, seed: int, batch_size: int = 250
) -> Tensor:
    """Squared error of the network for every image at every timestep, on noise fixed by the seed.

    Args:
        images: float32 [N, C, H, W] in [-1, 1]; image i gets the same noise whatever else is in the set.
        timesteps: schedule indices, int64 [K].

    Returns:
        Mean of (prediction - target)^2 over C, H and W, float64 [K, N] on the CPU; the target is the model's own kind
        (eps, x_0, v, ...).
    """
    errors = torch.empty(len(timesteps), len(images), dtype=torch.float64)
    with denoiser.evaluating():
        for index, timestep in enumerate(timesteps.tolist()):
            eps = rng.standard_normal(images.shape, seed, index, stream=rng.Stream.PROBE)
            for start in range(0, len(images), batch_size):
                rows = slice(start, start + batch_size)
                x0, noise = (part[rows].to(denoiser.device, denoiser.dtype) for part in (images, eps))
                t = torch.full((len(x0),), timestep, dtype=torch.int64, device=denoiser.device)
                prediction = denoiser.predict(denoiser.schedule.add_noise(x0, noise, t), t)
                error = prediction.double() - denoiser.schedule.target(x0, noise, t).double()
                errors[index, rows] = error.square().flatten(1).mean(dim=1).cpu()
    return errors


def membership_auc(members: Tensor, others: Tensor) -> list[float]:
    """How well the errors at one timestep tell images that were trained on from others of their kind.

    A model predicts better on what it was trained on, so that a low error speaks for membership (Carlini et al.,
    "Extracting Training Data from Diffusion Models", 2023; Duan et al., "Are Diffusion Models Vulnerable to Membership
    Inference Attacks?", ICML 2023).

    Args:
        members: errors on training images, [K, N].
        others: errors on images that were not trained on, [K, M].

    Returns:
        K areas under the ROC curve: 0.5 where the errors tell nothing, 1 where all members have lower errors, 0 where
        all have higher ones.
    """
    from sklearn.metrics import roc_auc_score

    truth = [1] * members.shape[1] + [0] * others.shape[1]
    return [float(roc_auc_score(truth, -torch.cat(pair))) for pair in zip(members, others, strict=True)]


def auc_spread(members: int, others: int) -> float:
    """Standard deviation of an AUC of so many images of each kind when the errors tell nothing (Mann and Whitney)."""
    return math.sqrt((members + others + 1) / (12 * members * others))
