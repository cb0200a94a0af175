"""Training on with the retained data alone, in the hope that the rest is forgotten by itself.

    minimise L(D_r)

The mean squared error of noise prediction over batch and elements. A common baseline, as in Golatkar, Achille, Soatto,
"Eternal Sunshine of the Spotless Net" (CVPR 2020).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.baselines.training import TrainingSettings, denoising_loss, descend, noised_batch


@dataclass(frozen=True)
class FineTuneSettings(TrainingSettings):
    """Settings of fine-tuning, see `TrainingSettings`."""

    learning_rate: float = 6e-4


def _train(run: MethodRun) -> dict[str, Any]:
    size, images = run.settings.batch_size, run.inputs.retained_images()

    def gradient(step: int) -> dict[str, float]:
        batch = noised_batch(run.denoiser, [images], size, step, run.seed)
        loss = denoising_loss(run.denoiser, run.denoiser.predict(batch.x_t, batch.timesteps), batch)
        loss.backward()
        return {"retained_loss": float(loss.detach())}

    return descend(run, gradient, cost=3 * size)


FINE_TUNE = Method(
    name="fine_tune",
    title="fine-tuning",
    paper="Golatkar, Achille, Soatto, Eternal Sunshine of the Spotless Net, CVPR 2020",
    sees="retained data",
    settings=FineTuneSettings,
    train=_train,
)
