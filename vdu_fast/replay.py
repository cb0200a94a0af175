"""The replay bank: what the model drew before unlearning, and what it predicted on the way.

Sampling the old model passes through states x_t at which it made predictions; both are kept, so that the function-space
term needs neither real data nor a copy of the old network. A bank belongs to one model and serves every request.

What is most like the forgotten loses most when it goes, and is a small part of what the model draws. So a share of
every batch is drawn from the quarter of the images that the filter found most like it.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from vdu_fast.checkpoint import fingerprint_tensors, load_tensors, save_tensors
from vdu_fast.errors import InputError
from vdu_fast.memory import available_memory
from vdu_fast.pipelines import Denoiser
from vdu_fast.rng import Stream, batch_indices, randint, random_words
from vdu_fast.sampling import sample_images

logger = logging.getLogger(__name__)

# The part of a bank that a focused batch takes its share from.
NEAREST = 0.25


@dataclass
class ReplayBank:
    """N trajectories of the old model, S states of each.

    Attributes:
        images: float32 [N, C, H, W], the finished samples.
        x_t: float [N, S, C, H, W], states on the way.
        timesteps: int64 [N, S], their schedule indices.
        predictions: float [N, S, C, H, W], what the old model predicted there.
        made_from: fingerprint of the model that it serves, of the one that drew it if that is another, and the
            sampler's settings.
        likeness: float [N], how much an image looks like what must go; of one request, and not saved. None: unknown;
            -inf: never near.
    """

    images: Tensor
    x_t: Tensor
    timesteps: Tensor
    predictions: Tensor
    made_from: dict[str, str]
    likeness: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def keep(self, mask: Tensor) -> ReplayBank:
        """The bank with only the trajectories where `mask`, bool [N], is true."""
        return replace(
            self,
            images=self.images[mask],
            x_t=self.x_t[mask],
            timesteps=self.timesteps[mask],
            predictions=self.predictions[mask],
            made_from=dict(self.made_from),
            likeness=None if self.likeness is None else self.likeness[mask],
        )

    @cached_property
    def nearest(self) -> Tensor:
        """Numbers of the trajectories that end most like what must go, a quarter of all; needs `likeness`."""
        assert self.likeness is not None
        return self.likeness.topk(math.ceil(NEAREST * int(self.likeness.isfinite().sum()))).indices

    def batch(self, size: int, step: int, seed: int, *, focus: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """States, timesteps and old predictions of minibatch `step`.

        Args:
            size: how many.
            step, seed: a batch is a function of these.
            focus: share of the batch, in [0, 1], that comes from `nearest`; the rest comes from all. Of both, every
                trajectory comes once before any comes again.
        """
        near = round(focus * size) if self.likeness is not None else 0
        rows = batch_indices(len(self), size - near, step, seed, stream=Stream.REPLAY_BATCH)
        if near:
            chosen = batch_indices(len(self.nearest), near, step, seed, stream=Stream.REPLAY_FOCUS)
            rows = torch.cat((rows, self.nearest[chosen]))
        state = randint(self.x_t.shape[1], size, seed, step, stream=Stream.REPLAY_NOISE)
        return self.x_t[rows, state], self.timesteps[rows, state], self.predictions[rows, state]

    @property
    def passed_on(self) -> bool:
        """Whether it serves another model than the one that drew it."""
        return "drawn_by" in self.made_from

    def of_model(self, denoiser: Denoiser) -> ReplayBank:
        """This bank for another model, which is to keep the same as the one that drew it."""
        drawn_by = self.made_from.get("drawn_by", self.made_from["model"])
        return replace(self, made_from=self.made_from | {"model": _weights(denoiser), "drawn_by": drawn_by})

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, atomically."""
        tensors = {name: getattr(self, name) for name in ("images", "x_t", "timesteps", "predictions")}
        save_tensors(path, tensors, {"format": "vdu_fast.replay.1", "made_from": json.dumps(self.made_from)})

    @classmethod
    def load(cls, path: Path | str) -> ReplayBank:
        """Read what `save` wrote; InputError when the file is something else."""
        tensors, metadata = load_tensors(path)
        if metadata.get("format") != "vdu_fast.replay.1":
            raise InputError(f"--bank {path} is not a replay bank; remove it or name another file to have one made.")
        return cls(**tensors, made_from=json.loads(metadata["made_from"]))

    def check_fits(self, denoiser: Denoiser, path: Path | str = "the bank") -> None:
        """InputError unless this bank was drawn from exactly this model, or passed on to it."""
        if self.made_from["model"] == _weights(denoiser):
            return
        if self.passed_on:
            raise InputError(
                f"{path} was passed on by a request, and serves only the model that this request has made: give that "
                "model, or name another file to have a new bank made."
            )
        raise InputError(
            f"{path} was drawn from a model with other weights. A bank serves only the model it was made from: "
            "name another file to have a new one made."
        )


def _weights(denoiser: Denoiser) -> str:
    """Fingerprint of a model, which is the same when it comes back from the disk in float32."""
    state = denoiser.module.state_dict()
    return fingerprint_tensors({k: v.float() if v.is_floating_point() else v for k, v in state.items()})


def bank_bytes(sample_shape: tuple[int, ...], count: int, states: int) -> int:
    """Memory of a bank of `count` trajectories: the image, and float32 x_t and prediction of every kept state."""
    return 4 * count * (1 + 2 * states) * math.prod(sample_shape)


def check_memory(sample_shape: tuple[int, ...], count: int, states: int, *, guided: bool = False) -> None:
    """InputError when a bank is larger than the memory that is free, a warning when filtering it may need more.

    Filtering copies what it keeps, so that for a while there can be two; guiding has other predictions in hand as well.
    """
    needed, free, most = bank_bytes(sample_shape, count, states), available_memory(), 2.5 if guided else 2
    if free is None or most * needed <= free:
        return
    text = (
        f"a replay bank of {count} images {tuple(sample_shape)} with {states} states each takes "
        f"{needed / 2**30:.1f} GiB of memory, up to {most:g} times that while it is filtered, and "
        f"{free / 2**30:.1f} GiB are free. Lower --replay_samples (now {count}) or --replay_states "
        f"(now {states}), which it grows with."
    )
    if needed > free:
        raise InputError(text)
    logger.warning(text)


def build_bank(
    denoiser: Denoiser,
    count: int,
    *,
    sampler_steps: int = 50,
    states: int = 10,
    seed: int = 0,
    batch_size: int = 250,
    first: int = 0,
    progress: Callable[[int], None] | None = None,
) -> ReplayBank:
    """Sample the model `count` times and keep `states` random states of each trajectory.

    Args:
        denoiser: the model before unlearning.
        count: number of trajectories.
        sampler_steps: network evaluations per trajectory.
        states: how many of these are kept, one at random from each of `states` equal stretches of the trajectory.
        seed, batch_size, first, progress: see `sample_images`.
    """
    if not 1 <= states <= sampler_steps:
        raise InputError(f"replay_states must be between 1 and the {sampler_steps} sampler steps, got {states}.")
    shape = denoiser.sample_shape
    x_t = torch.empty((count, states, *shape))
    predictions = torch.empty_like(x_t)
    timesteps = torch.empty((count, states), dtype=torch.int64)
    chosen = _chosen_steps(count, sampler_steps, states, seed, first)
    seen: dict[int, int] = {}

    def keep(rows: slice, t: Tensor, state: Tensor, prediction: Tensor) -> None:
        now = seen.get(rows.start, 0)
        seen[rows.start] = now + 1
        inside, slot = (chosen[rows] == now).nonzero(as_tuple=True)
        x_t[rows.start + inside, slot] = state.cpu().float()[inside]
        predictions[rows.start + inside, slot] = prediction.cpu().float()[inside]
        timesteps[rows.start + inside, slot] = t.cpu()[inside]

    images = sample_images(
        denoiser,
        count,
        steps=sampler_steps,
        seed=seed,
        batch_size=batch_size,
        first=first,
        stream=Stream.BANK,
        observer=keep,
        progress=progress,
    )
    made_from = {
        "model": _weights(denoiser),
        "sampler_steps": str(sampler_steps),
        "states": str(states),
        "seed": str(seed),
    }
    return ReplayBank(images, x_t, timesteps, predictions, made_from)


def _chosen_steps(count: int, sampler_steps: int, states: int, seed: int, first: int) -> Tensor:
    """Which sampler steps are kept: int64 [count, states], one per stretch of the trajectory."""
    edges = torch.arange(states + 1) * sampler_steps // states
    words = random_words(count * states, seed, 0, stream=Stream.REPLAY_NOISE, offset=first * states)
    return edges[:-1] + (words.reshape(count, states) * (edges[1:] - edges[:-1]) >> 32)
