"""The loop that the baselines share: noised batches that are functions of (seed, step), and Adam until the budget ends.

Every loss is a mean over batch, channels and pixels of squared errors in the network's own prediction, so that a weight
between two terms means the same in all methods. As in vdu_fast's own default the learning rate is constant over the
first half of the steps and falls linearly to zero over the second, and as in DDPM training gradients are clipped to
norm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vdu_fast.baselines.method import MethodRun
from vdu_fast.errors import InputError
from vdu_fast.ops import standard_normal
from vdu_fast.pipelines import Denoiser
from vdu_fast.rng import Stream, batch_indices, randint, random_words
from vdu_fast.schedule import NoiseSchedule

MAX_GRADIENT_NORM = 1.0
ANNEAL = 0.5

# Two sets of images in one step must not be shuffled alike.
_ORDERS = (Stream.BATCH, Stream.REPLAY_BATCH)


@dataclass(frozen=True)
class TrainingSettings:
    """Settings that all trained baselines have.

    Attributes:
        learning_rate: of Adam.
        batch_size: images of each kind (forgotten, retained) per step.
        steps: at most; None is as many as the budget pays for.
    """

    learning_rate: float = 1e-4
    batch_size: int = 64
    steps: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise InputError(f"learning_rate must be 0 or a positive number, got {self.learning_rate}.")
        if self.batch_size < 1 or (self.steps is not None and self.steps < 1):
            raise InputError(f"batch_size and steps must be at least 1, got {self.batch_size} and {self.steps}.")


@dataclass(frozen=True)
class Noised:
    """A batch on the way: images x0, eps and x_t, all [B, C, H, W], and timesteps int64 [B]."""

    x0: Tensor
    eps: Tensor
    x_t: Tensor
    timesteps: Tensor

    def __getitem__(self, rows: slice) -> Noised:
        return Noised(self.x0[rows], self.eps[rows], self.x_t[rows], self.timesteps[rows])


def noised_batch(denoiser: Denoiser, sets: Sequence[Tensor], size: int, step: int, seed: int) -> Noised:
    """`size` images of each of at most two sets, one set after the other, with noise and timesteps of (seed, step)."""
    rows = [batch_indices(len(images), size, step, seed, stream=_ORDERS[i]) for i, images in enumerate(sets)]
    x0 = torch.cat([images[index] for images, index in zip(sets, rows, strict=True)])
    x0 = x0.to(denoiser.device, denoiser.dtype)
    timesteps = randint(len(denoiser.schedule), len(x0), seed, step, stream=Stream.TIMESTEPS).to(x0.device)
    eps = standard_normal(x0.shape, seed, step, stream=Stream.IMAGE_NOISE, device=x0.device).to(x0.dtype)
    return Noised(x0, eps, denoiser.schedule.add_noise(x0, eps, timesteps), timesteps)


def uniform(shape: torch.Size, seed: int, step: int, *, low: float, high: float) -> Tensor:
    """Uniform draws in [low, high) of (seed, step), float32 of the given shape."""
    words = random_words(math.prod(shape), seed, step, stream=Stream.REPLAY_NOISE)
    return (low + words.double() * ((high - low) / 2**32)).float().reshape(shape)


def denoising_loss(denoiser: Denoiser, prediction: Tensor, batch: Noised) -> Tensor:
    """Mean squared error of the prediction against what was mixed in: the loss of DDPM training, a scalar."""
    target = denoiser.schedule.target(batch.x0, batch.eps, batch.timesteps)
    return (prediction - target).square().mean()


def relabelled_loss(denoiser: Denoiser, prediction: Tensor, batch: Noised, other: Tensor) -> Tensor:
    """Mean squared error against what the network should predict if x_t showed `other` instead of x_0, a scalar.

    An unconditional network knows an image by x_t alone, so there is no condition to exchange: it is x_t that is given
    another origin. With x_0' = other, eps' = (x_t - signal x_0') / noise is the noise that leads from there to the very
    same x_t, and the target is that of (x_0', eps'). It grows without bound where there is little noise, so the error
    counts there as one in x_0: its square is weighted by min(1, 1 / r_t^2), r_t the change of a prediction with x_0 at
    fixed x_t (signal / noise for epsilon).

    Args:
        prediction: of the network at batch.x_t.
        other: the other origin of each, [B, C, H, W].
    """
    schedule = denoiser.schedule
    signal, noise = schedule.coefficients(batch.timesteps, batch.x_t)
    target = schedule.target(other, (batch.x_t - signal * other) / noise, batch.timesteps)
    weight = _sensitivity(schedule, signal, noise).pow(-2).clamp(max=1)
    return (weight * (prediction - target).square()).mean()


def _sensitivity(schedule: NoiseSchedule, signal: Tensor, noise: Tensor) -> Tensor:
    """|d prediction / d x_0| at fixed x_t = signal x_0 + noise eps."""
    if schedule.prediction_type == "sample":
        return torch.ones_like(signal)
    if schedule.prediction_type == "epsilon":
        return signal / noise
    if schedule.prediction_type == "velocity":
        return signal / noise + 1
    return signal.square() / noise + noise


def trained_parameters(denoiser: Denoiser) -> list[Tensor]:
    """The parameters that the baselines change: all that require a gradient."""
    return [parameter for parameter in denoiser.module.parameters() if parameter.requires_grad]


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """Gradients of all parameters end to end, [P]."""
    return torch.cat([gradient.flatten() for gradient in gradients])


def number_of_steps(run: MethodRun, *, cost: int, first: int | None = None) -> int:
    """Steps that settings and budget allow, at `cost` network evaluations each; the first may cost something else.

    Raises:
        InputError: the budget does not pay for one, or neither says when to stop.
    """
    first = cost if first is None else first
    payable, steps = run.counter.times(1), run.settings.steps
    if payable is None:
        if steps is None:
            raise InputError("steps: without a budget something must say when to stop. Give steps, or a budget.")
        return steps
    if payable < first:
        raise InputError(
            f"budget: {run.counter.limit} network evaluations, {run.counter.spent} of them spent, do not pay for one "
            f"step of {first}. Raise the budget, or lower batch_size."
        )
    affordable = 1 + (payable - first) // cost
    return affordable if steps is None else min(steps, affordable)


def descend(run: MethodRun, gradient: Callable[[int], dict[str, float]], *, cost: int) -> dict[str, Any]:
    """Adam on the parameters of the run's model until steps or budget are used up.

    Args:
        gradient: given the step, leaves gradients in the parameters and returns the losses it measured.
        cost: network evaluations of one step.

    Returns:
        `steps` done, `stopped_because`, and `losses` of about twenty steps.

    Raises:
        InputError: see `number_of_steps`.
    """
    settings: TrainingSettings = run.settings
    parameters, total = trained_parameters(run.denoiser), number_of_steps(run, cost=cost)
    optimizer = torch.optim.Adam(parameters, lr=settings.learning_rate)
    losses: list[dict[str, float]] = []
    reason, done = f"all {total} steps done" if total == settings.steps else "the budget is used up", 0
    while done < total:
        optimizer.zero_grad()
        measured = gradient(done)
        norm = float(nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM))
        if not all(map(math.isfinite, (*measured.values(), norm))):
            reason = f"the loss or its gradient was not finite at step {done + 1}"
            break
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * min(1.0, (total - done) / (ANNEAL * total))
        optimizer.step()
        if done % max(1, total // 20) == 0:
            losses.append({"step": done + 1, **measured})
        done += 1
        run.progress(done, total)
    optimizer.zero_grad()
    return {"steps": done, "stopped_because": reason, "losses": losses}
