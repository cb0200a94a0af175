"""Samples of the original model in a file: every later evaluation of a change to that model need not draw them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor

from vdu_fast.checkpoint import fingerprint, load_tensors, save_tensors
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.pipelines import Denoiser

FORMAT = "vdu_fast.samples.1"


def save_samples(path: Path | str, images: Tensor, denoiser: Denoiser, config: EvaluationConfig) -> None:
    """Write the samples numbered 0, 1, ... of a model as safetensors, atomically.

    Args:
        images: float32 [N, C, H, W].
    """
    save_tensors(path, {"images": images}, _made_from(denoiser, config))


def load_samples(path: Path | str, denoiser: Denoiser, config: EvaluationConfig) -> Tensor:
    """Read what `save_samples` wrote, float32 [N, C, H, W].

    Raises:
        InputError: the file is something else, or its samples are not those that this model draws with these settings.
    """
    tensors, metadata = load_tensors(path)
    wanted = _made_from(denoiser, config)
    if metadata.get("format") != FORMAT or "images" not in tensors:
        raise InputError(
            f"--original_samples {path} holds no samples; name another file to have them drawn and written there."
        )
    for name, value in wanted.items():
        if metadata.get(name) != value:
            raise InputError(
                f"--original_samples {path} was drawn with {name} {metadata.get(name)}, and {value} is asked for now. "
                "Name another file to have the samples drawn and written there."
            )
    return tensors["images"].to(torch.float32)


def _made_from(denoiser: Denoiser, config: EvaluationConfig) -> dict[str, str]:
    """What decides the samples, but for rounding."""
    return {
        "format": FORMAT,
        "model": fingerprint(denoiser.module),
        "scheduler": _digest(denoiser),
        "sampler_steps": str(config.sampler_steps),
        "seed": str(config.seed),
        "precision": config.precision,
    }


def _digest(denoiser: Denoiser) -> str:
    """Of what decides the sampler's arithmetic: the scheduler's settings and the noise levels."""
    config, alphas = getattr(denoiser.scheduler, "config", {}), denoiser.schedule.alphas_cumprod
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True, default=str).encode())
    digest.update(denoiser.schedule.prediction_type.encode())
    if alphas is not None:
        digest.update(alphas.double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
