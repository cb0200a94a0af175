"""What one request is: its checked inputs, and who is told how it goes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vdu_fast.config import UnlearnConfig
from vdu_fast.data import ImageSet, check_fits
from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser, denoiser_of, pick_device
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.unlearning_run import check_run

logger = logging.getLogger(__name__)

OnStep = Callable[[dict[str, Any]], None]
OnSample = Callable[[int], None]


@dataclass
class Observers:
    """Callbacks of a run; each may be None.

    Attributes:
        on_step: called after each step with its record and `images_per_second`, forget and replayed images together.
        on_sample: called with the number of new replay trajectories.
        on_message: called with one line about what was decided.
    """

    on_step: OnStep | None = None
    on_sample: OnSample | None = None
    on_message: Callable[[str], None] | None = None

    def say(self, message: str) -> None:
        logger.info(message)
        if self.on_message is not None:
            self.on_message(message)


@dataclass
class Job:
    """The checked inputs of one call."""

    model: Any
    denoiser: Denoiser
    images: Tensor
    posterior: GaussianPosterior
    config: UnlearnConfig
    observers: Observers
    output: Path | None
    seconds: dict[str, float] = field(default_factory=dict)


def check_inputs(
    model: Any,
    forget_images: Tensor | ImageSet,
    posterior: GaussianPosterior | str | Path,
    config: UnlearnConfig,
    scheduler: Any,
    observers: Observers,
) -> Job:
    images = forget_images.images if isinstance(forget_images, ImageSet) else forget_images
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"forget_images must be a float tensor [N, C, H, W] with N >= 1, got {shape}.")
    if not images.isfinite().all() or images.abs().max() > 1.001:
        raise InputError("forget_images must lie in [-1, 1]; scale 8-bit images by x / 127.5 - 1.")
    if isinstance(model, nn.Module):
        if scheduler is None:
            raise InputError("a bare module needs scheduler=..., the diffusers scheduler it was trained with.")
        denoiser = Denoiser(model, scheduler, tuple(images.shape[1:]))  # type: ignore[arg-type]
    else:
        denoiser = denoiser_of(model)
    channels, height, width = denoiser.sample_shape
    named = forget_images if isinstance(forget_images, ImageSet) else ImageSet(images, None, (), "forget_images")
    check_fits(named, sample_size=(height, width), channels=channels, argument="forget")
    if not isinstance(posterior, GaussianPosterior):
        posterior = GaussianPosterior.load(posterior)
    check_run(denoiser, posterior, config)
    for name, parameter in denoiser.module.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"the model's {name} holds NaN or infinity; give an intact model.")
    denoiser.module.to(pick_device(config.device, denoiser.module))
    denoiser.execution = config.execution
    return Job(model, denoiser, images.float(), posterior, config, observers, None)
