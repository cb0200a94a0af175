"""Drawing images deterministically: image i is a function of the seed, i, the sampler and the number of steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vdu_fast.errors import InputError
from vdu_fast.ops import standard_normal
from vdu_fast.pipelines import Denoiser
from vdu_fast.rng import Stream

# Called after every network evaluation with (sample indices, schedule indices [B], x_t, prediction).
StepObserver = Callable[[slice, Tensor, Tensor, Tensor], None]


def sampler_for(denoiser: Denoiser, steps: int) -> Any:
    """A deterministic diffusers scheduler for this model: DDIM with eta = 0, or Euler for flow matching."""
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

    schedule, scheduler = denoiser.schedule, denoiser.scheduler
    if not 1 <= steps <= len(schedule):
        raise InputError(
            f"sampler steps must be between 1 and the model's {len(schedule)} timesteps, got {steps}; change "
            "--sampler_steps."
        )
    if schedule.prediction_type == "velocity":
        given = isinstance(scheduler, FlowMatchEulerDiscreteScheduler)
        sampler: Any = copy.deepcopy(scheduler) if given else FlowMatchEulerDiscreteScheduler(len(schedule))
    elif schedule.alphas_cumprod is None:
        raise InputError(
            "sampling needs a diffusers scheduler or NoiseSchedule.from_alphas_cumprod(...): from signal and noise "
            "alone no sampler follows."
        )
    else:
        sampler = DDIMScheduler.from_config(
            getattr(scheduler, "config", {}),
            num_train_timesteps=len(schedule),
            prediction_type=schedule.prediction_type,
        )
        # diffusers takes what a scheduler was given without keywords for defaults, and from_config drops those.
        sampler.alphas_cumprod = schedule.alphas_cumprod.float()
        if not sampler.config.set_alpha_to_one:
            sampler.final_alpha_cumprod = sampler.alphas_cumprod[0]
    sampler.set_timesteps(steps)
    return sampler


def sample_images(
    denoiser: Denoiser,
    count: int,
    *,
    steps: int = 50,
    seed: int = 0,
    batch_size: int = 250,
    first: int = 0,
    stream: Stream = Stream.SAMPLER,
    observer: StepObserver | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Draw the images numbered first .. first + count - 1.

    Image i starts from the same noise whatever `count`, `first` and `batch_size` are, so runs can be compared image by
    image; batch sizes change the result by float rounding only.

    Args:
        denoiser: the model.
        count: number of images.
        steps: network evaluations per image.
        seed: chooses the starting noise.
        batch_size: images per network call.
        first: number of the first image.
        stream: what the images are for; equal seeds of two streams start from unlike noise.
        observer: sees every (x_t, prediction) on the way.
        progress: called with the number of images finished after each batch.

    Returns:
        float32 [count, C, H, W] on the CPU, clipped to [-1, 1].
    """
    images = torch.empty((count, *denoiser.sample_shape))
    numel = images[0].numel() if count else 0
    # Fewer than a batch are soon drawn without, and would be drawn in vain with.
    compiled = denoiser.execution.compile != "off" and count >= batch_size
    with denoiser.evaluating():
        for start in range(0, count, batch_size):
            rows = slice(start, min(start + batch_size, count))
            # A compiled network is compiled again for every other size, so its last batch is filled up.
            drawn = batch_size if compiled else rows.stop - start
            offset = (first + start) * numel
            x_t = standard_normal((drawn, *denoiser.sample_shape), seed, stream=stream, offset=offset)
            x_t = x_t.to(denoiser.device, denoiser.dtype)
            drawn_images = _denoise(denoiser, steps, x_t, rows, observer, compiled=compiled)
            images[rows] = drawn_images[: rows.stop - start]
            if progress is not None:
                progress(rows.stop - start)
    return images


def decode_noise(denoiser: Denoiser, noise: Tensor, *, steps: int = 50, batch_size: int = 250) -> Tensor:
    """The images that given starting noise leads to, by the sampler of `sample_images`.

    Args:
        noise: x_T, float [N, C, H, W], on any device.
        steps: network evaluations per image.
        batch_size: images per network call.

    Returns:
        float32 [N, C, H, W] on the CPU, clipped to [-1, 1].
    """
    images = torch.empty(noise.shape)
    with denoiser.evaluating():
        for start in range(0, len(noise), batch_size):
            rows = slice(start, min(start + batch_size, len(noise)))
            images[rows] = _denoise(denoiser, steps, noise[rows].to(denoiser.device, denoiser.dtype), rows, None)
    return images


def schedule_index(denoiser: Denoiser, timestep: Tensor) -> Tensor:
    """The schedule index of a sampler's timestep, int64; under flow matching it is a position between two of them."""
    if denoiser.schedule.prediction_type != "velocity":
        return timestep
    # A shift below 1 crowds the last steps at the clean end, where a timestep may round to 0: before the first.
    return (timestep.round().long() - 1).clamp(min=0)


def _denoise(
    denoiser: Denoiser,
    steps: int,
    x_t: Tensor,
    rows: slice,
    observer: StepObserver | None,
    *,
    compiled: bool = False,
) -> Tensor:
    sampler = sampler_for(denoiser, steps)
    for timestep in sampler.timesteps:
        timesteps = schedule_index(denoiser, timestep).to(x_t.device).expand(len(x_t))
        prediction = denoiser.predict(x_t, timesteps, repeated=compiled)
        if observer is not None:
            kept = rows.stop - rows.start
            observer(rows, timesteps[:kept], x_t[:kept], prediction[:kept])
        x_t = sampler.step(prediction, timestep, x_t).prev_sample
    return x_t.float().cpu().clamp_(-1, 1)
