"""Noised images and the error of a prediction against their noise, over 3 x 32 x 32 images.

Ours draw the noise where they need it, twice in a training step; the baselines draw it once and keep it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vdu_fast import ops
from vdu_fast.benchmarks.case import Budget, Case, Setting, check_close, question

IMAGE = (3, 32, 32)
PIXELS = 3 * 32 * 32


@dataclass
class _Images:
    """As many images as there are parameters in the other questions: x_0, predictions [N, 3, 32, 32], coefficients."""

    x0: Tensor
    prediction: Tensor
    signal: Tensor
    noise: Tensor

    @classmethod
    def make(cls, setting: Setting) -> _Images:
        count = max(1, setting.numel // PIXELS)
        generator = torch.Generator(setting.device).manual_seed(0)
        how = {"generator": generator, "device": setting.device}
        images = [torch.randn(count, *IMAGE, **how) for _ in range(2)]  # type: ignore[call-overload]
        return cls(*images, *(torch.rand(count, **how) for _ in range(2)))  # type: ignore[call-overload]

    def eps(self) -> Tensor:
        """The noise that our ops draw."""
        return ops.standard_normal(self.x0.shape, 1, 2, stream=1, device=self.x0.device)


def mixed(x0: Tensor, signal: Tensor, eps: Tensor, noise: Tensor) -> Tensor:
    return signal.view(-1, 1, 1, 1) * x0 + noise.view(-1, 1, 1, 1) * eps


def squared_error(prediction: Tensor, eps: Tensor) -> Tensor:
    return (prediction - eps).square().flatten(1).sum(1)


@question("add_noise", group="ops")
def add_noise(setting: Setting) -> Case:
    i = _Images.make(setting)

    def eager() -> Tensor:
        return mixed(i.x0, i.signal, torch.randn_like(i.x0), i.noise)

    def ours() -> Tensor:
        return ops.mix_noise(i.x0, i.signal, i.noise, 1, 2)

    check_close("mix_noise", ours(), mixed(i.x0, i.signal, i.eps(), i.noise))
    return Case(
        {"eager": eager, "compile": torch.compile(eager)},
        {"vdu_fast": ours},
        i.x0.numel(),
        unit="pixel",
        bytes=8 * i.x0.numel(),
        budget=Budget({"compile": 1.3}) if setting.device.type == "cuda" else Budget(),
    )


@question("noise_prediction_loss", group="ops")
def noise_prediction_loss(setting: Setting) -> Case:
    """Held to no ratio: the noise that the baseline reads must have been drawn and stored before."""
    i = _Images.make(setting)
    eps = torch.randn_like(i.prediction)

    def eager() -> Tensor:
        return squared_error(i.prediction, eps)

    def ours() -> Tensor:
        return ops.noise_prediction_loss(i.prediction, 1, 2, reduction="none")

    check_close("noise_prediction_loss", ours(), squared_error(i.prediction, i.eps()))
    return Case(
        {"eager, stored noise": eager, "compile, stored noise": torch.compile(eager)},
        {"vdu_fast": ours},
        eps.numel(),
        unit="pixel",
        bytes=4 * eps.numel(),
    )


@question("add_noise + noise_prediction_loss", group="ops", quick=True)
def both(setting: Setting) -> Case:
    i = _Images.make(setting)

    def noised() -> tuple[Tensor, Tensor]:
        eps = torch.randn_like(i.x0)
        return mixed(i.x0, i.signal, eps, i.noise), eps

    def ours() -> tuple[Tensor, Tensor]:
        x_t = ops.mix_noise(i.x0, i.signal, i.noise, 1, 2)
        return x_t, ops.noise_prediction_loss(i.prediction, 1, 2, reduction="none")

    compiled_noised, compiled_error = torch.compile(noised), torch.compile(squared_error)
    return Case(
        {
            "eager": lambda: squared_error(i.prediction, noised()[1]),
            "compile": lambda: compiled_error(i.prediction, compiled_noised()[1]),
        },
        {"vdu_fast": ours},
        i.x0.numel(),
        unit="pixel",
        bytes=12 * i.x0.numel(),
        budget=Budget({"compile": 1.3}) if setting.device.type == "cuda" else Budget(),
    )
