"""Selective amnesia: continual learning turned round, with a surrogate in the place of what is forgotten.

Heng, Soh, "Selective Amnesia: A Continual Learning Approach to Forgetting in Deep Generative Models" (NeurIPS 2023):

    minimise  S(D_f) + g L(replay) + l sum_i F_i (theta_i - theta*_i)^2

S trains the network to see uniform noise images where it saw forget images (the paper's surrogate, which bounds the
likelihood of D_f from above), `replay` are images that the original model drew itself, and F is the Fisher information
of the original model on them: F_i = mean over images of (d/d theta_i of the loss summed over timesteps)^2.

The paper is about conditional models, where the forgotten condition gets the noise images and the other conditions are
replayed. Without a condition, S relabels each noised forget image as a noise image (`training.relabelled_loss`), and
the replayed images are those that look unlike the forget images to vdu_fast's own filter, which we lend it. S and L are
means over batch and elements. F is of the loss summed over elements, and the penalty is divided by their number, so
that its size beside L does not depend on the size of the images.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.baselines.training import (
    TrainingSettings,
    denoising_loss,
    descend,
    flat,
    noised_batch,
    relabelled_loss,
    trained_parameters,
    uniform,
)
from vdu_fast.filters import positive_unlabelled_filter
from vdu_fast.ops import standard_normal
from vdu_fast.rng import Stream
from vdu_fast.sampling import sample_images


@dataclass(frozen=True)
class SelectiveAmnesiaSettings(TrainingSettings):
    """Settings of selective amnesia.

    Attributes:
        replay_weight: g.
        fisher_weight: l.
        replay_samples: images drawn for replay, of `sampler_steps` network evaluations each.
        sampler_steps: of these images.
        fisher_images: images that F is averaged over.
        fisher_timesteps: timesteps, evenly spaced, that its loss is summed over.
    """

    learning_rate: float = 1e-3
    replay_weight: float = 10.0
    fisher_weight: float = 1.0
    replay_samples: int = 1000
    sampler_steps: int = 50
    fisher_images: int = 100
    fisher_timesteps: int = 10


def fisher_information(run: MethodRun, images: Tensor) -> Tensor:
    """F of every trained weight end to end, [P]: the mean over the images of the squared gradient."""
    denoiser, settings = run.denoiser, run.settings
    parameters = trained_parameters(denoiser)
    count = min(settings.fisher_images, len(images))
    middles = (torch.arange(settings.fisher_timesteps) * 2 + 1) * len(denoiser.schedule)
    timesteps = (middles // (2 * settings.fisher_timesteps)).to(denoiser.device)
    fisher = torch.zeros(sum(p.numel() for p in parameters), device=denoiser.device)
    for number, image in enumerate(images[:count]):
        x0 = image.to(denoiser.device, denoiser.dtype).expand(len(timesteps), *image.shape)
        eps = standard_normal(x0.shape, run.seed, number, stream=Stream.FISHER, device=x0.device).to(x0.dtype)
        prediction = denoiser.predict(denoiser.schedule.add_noise(x0, eps, timesteps), timesteps)
        loss = (prediction - denoiser.schedule.target(x0, eps, timesteps)).square().sum()
        fisher += flat(torch.autograd.grad(loss, parameters)).square() / count
    return fisher


def own_samples(run: MethodRun) -> Tensor:
    """Images that the original model draws, without those that the filter takes for forget images."""
    settings, denoiser = run.settings, run.denoiser
    images = sample_images(
        denoiser, settings.replay_samples, steps=settings.sampler_steps, seed=run.seed, stream=Stream.BANK
    )
    return images[positive_unlabelled_filter(denoiser, images, run.inputs.forget_images()).keep]


def _train(run: MethodRun) -> dict[str, Any]:
    settings, size, elements = run.settings, run.settings.batch_size, math.prod(run.denoiser.sample_shape)
    replay = own_samples(run)
    fisher = fisher_information(run, replay)
    parameters = trained_parameters(run.denoiser)
    start = flat([p.detach() for p in parameters])
    sets = [run.inputs.forget_images(), replay]

    def gradient(step: int) -> dict[str, float]:
        batch = noised_batch(run.denoiser, sets, size, step, run.seed)
        prediction = run.denoiser.predict(batch.x_t, batch.timesteps)
        noise_images = uniform(batch.x0[:size].shape, run.seed, step, low=-1.0, high=1.0).to(batch.x0)
        surrogate = relabelled_loss(run.denoiser, prediction[:size], batch[:size], noise_images)
        replayed = denoising_loss(run.denoiser, prediction[size:], batch[size:])
        penalty = (fisher * (flat(parameters) - start).square()).sum() / elements
        (surrogate + settings.replay_weight * replayed + settings.fisher_weight * penalty).backward()
        losses = {"surrogate_loss": surrogate, "replay_loss": replayed, "fisher_penalty": penalty}
        return {name: float(loss.detach()) for name, loss in losses.items()}

    return descend(run, gradient, cost=3 * 2 * size) | {"replayed_images": len(replay)}


SELECTIVE_AMNESIA = Method(
    name="selective_amnesia",
    title="Selective Amnesia",
    paper="Heng, Soh, Selective Amnesia, NeurIPS 2023",
    sees="forget data + own samples",
    settings=SelectiveAmnesiaSettings,
    train=_train,
)
