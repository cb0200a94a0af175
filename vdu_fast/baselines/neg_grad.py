"""Gradient ascent on the forget data, alone or held by descent on the retained data.

Golatkar, Achille, Soatto, "Eternal Sunshine of the Spotless Net" (CVPR 2020) use ascent as a baseline; the form with
the retained term is the NegGrad+ of Kurmanji et al., "Towards Unbounded Machine Unlearning" (NeurIPS 2023):

    NegGrad    minimise -L(D_f)
    NegGrad+   minimise -L(D_f) + a L(D_r)

L is the mean squared error of noise prediction over batch and elements. It has no upper bound, so that the number of
steps decides how much is left of the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.baselines.training import TrainingSettings, denoising_loss, descend, noised_batch


@dataclass(frozen=True)
class NegGradSettings(TrainingSettings):
    """Settings of NegGrad, see `TrainingSettings`."""

    steps: int | None = 50
    learning_rate: float = 3e-5


@dataclass(frozen=True)
class NegGradPlusSettings(TrainingSettings):
    """Settings of NegGrad+.

    Attributes:
        retained_weight: a.
    """

    learning_rate: float = 3e-4
    retained_weight: float = 2.0


def _ascend(run: MethodRun) -> dict[str, Any]:
    size, images = run.settings.batch_size, run.inputs.forget_images()

    def gradient(step: int) -> dict[str, float]:
        batch = noised_batch(run.denoiser, [images], size, step, run.seed)
        loss = denoising_loss(run.denoiser, run.denoiser.predict(batch.x_t, batch.timesteps), batch)
        (-loss).backward()
        return {"forget_loss": float(loss.detach())}

    return descend(run, gradient, cost=3 * size)


def _ascend_and_descend(run: MethodRun) -> dict[str, Any]:
    size, sets = run.settings.batch_size, [run.inputs.forget_images(), run.inputs.retained_images()]

    def gradient(step: int) -> dict[str, float]:
        batch = noised_batch(run.denoiser, sets, size, step, run.seed)
        prediction = run.denoiser.predict(batch.x_t, batch.timesteps)
        forget = denoising_loss(run.denoiser, prediction[:size], batch[:size])
        retained = denoising_loss(run.denoiser, prediction[size:], batch[size:])
        (run.settings.retained_weight * retained - forget).backward()
        return {"forget_loss": float(forget.detach()), "retained_loss": float(retained.detach())}

    return descend(run, gradient, cost=3 * 2 * size)


NEG_GRAD = Method(
    name="neg_grad",
    title="NegGrad",
    paper="Golatkar, Achille, Soatto, Eternal Sunshine of the Spotless Net, CVPR 2020",
    sees="forget data",
    settings=NegGradSettings,
    train=_ascend,
)
NEG_GRAD_PLUS = Method(
    name="neg_grad_plus",
    title="NegGrad+",
    paper="Kurmanji, Triantafillou, Hayes, Triantafillou, Towards Unbounded Machine Unlearning, NeurIPS 2023",
    sees="forget + retained data",
    settings=NegGradPlusSettings,
    train=_ascend_and_descend,
)
