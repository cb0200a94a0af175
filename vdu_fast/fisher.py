"""The posterior of a model with a single checkpoint: a Laplace approximation on the model's own samples."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from vdu_fast.errors import InputError
from vdu_fast.ops import standard_normal
from vdu_fast.pipelines import Denoiser
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.rng import Stream, randint
from vdu_fast.sampling import sample_images
from vdu_fast.schedule import TimestepWeighting


def fisher_posterior(
    denoiser: Denoiser,
    *,
    draws: int = 512,
    dataset_size: int = 1000,
    prior_precision: float = 1e4,
    sampler_steps: int = 50,
    weighting: TimestepWeighting = "simple",
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> GaussianPosterior:
    """1 / std^2 = dataset_size * F + prior_precision, F the diagonal empirical Fisher information.

    F_i is the mean, over draws of (x_0, t, eps) with x_0 sampled from the model itself, of the squared derivative of
    C_t / 2 ||target - prediction||^2 summed over elements. It needs no data, but it sees only the curvature at one
    point: prefer checkpoints where there are some.

    Args:
        denoiser: the model.
        draws: gradients averaged; x_0 is drawn once for each.
        dataset_size: number of images the model was trained on; scales the whole precision.
        prior_precision: precision of a weight the data say nothing about; bounds std by 1 / sqrt(prior_precision).
        sampler_steps: of the samples.
        weighting: C_t.
        seed: of samples, timesteps and noise.
        progress: called with 1 after every draw.

    Returns:
        A posterior whose mean is the model's weights, labelled "fisher".
    """
    for name, value in (("draws", draws), ("dataset_size", dataset_size), ("prior_precision", prior_precision)):
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"{name} must be a positive number, got {value}.")
    module, schedule = denoiser.module, denoiser.schedule
    images = sample_images(denoiser, draws, steps=sampler_steps, seed=seed).to(denoiser.device, denoiser.dtype)
    weights = schedule.timestep_weights(weighting)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    parameters = [p for p in module.parameters() if p.requires_grad]
    squares = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    training = module.training
    module.eval()
    for draw in range(draws):
        x0 = images[draw : draw + 1]
        t = randint(len(schedule), 1, seed, draw, stream=Stream.FISHER).to(x0.device)
        eps = standard_normal(x0.shape, seed, draw, stream=Stream.FISHER, device=x0.device).to(x0.dtype)
        error = denoiser.predict(schedule.add_noise(x0, eps, t), t) - schedule.target(x0, eps, t)
        loss = 0.5 * float(weights[t.cpu()]) * error.float().square().sum()
        for square, grad in zip(squares, torch.autograd.grad(loss, parameters), strict=True):
            square.addcmul_(grad.float(), grad.float(), value=1 / draws)
        if progress is not None:
            progress(1)
    module.train(training)
    std = {
        name: (dataset_size * square + prior_precision).rsqrt().cpu()
        for name, square in zip(names, squares, strict=True)
    }
    mean = {name: p.detach().float().cpu().clone() for name, p in zip(names, parameters, strict=True)}
    source = {
        "kind": "fisher",
        "draws": str(draws),
        "dataset_size": str(dataset_size),
        "prior_precision": repr(prior_precision),
        "weighting": weighting,
    }
    return GaussianPosterior(std, mean, source)
