"""Variational diffusion unlearning as its paper has it.

Panda, Varun M S, Jain, Maharana, Prathosh A.P., "Variational Diffusion Unlearning" (arXiv 2510.04058, TMLR 2026):

    minimise  -(1 - gamma) L(D_f) + gamma KL(q || p(theta | D)) / P,    q of fixed variance, P the number of weights

by Adam on the weights: `unlearn` with its function-space term, its hinge and its whitened coordinates turned off. L is
the mean squared error over batch and elements. The paper's own settings are not public.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vdu_fast.baselines.budget import evaluations_of_unlearn
from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.baselines.ours import unlearn_within
from vdu_fast.baselines.training import ANNEAL, MAX_GRADIENT_NORM, TrainingSettings, number_of_steps
from vdu_fast.config import UnlearnConfig


@dataclass(frozen=True)
class VduSettings(TrainingSettings):
    """Settings of VDU.

    Attributes:
        gamma: weight of the KL term, in [0, 1).
    """

    steps: int | None = 50
    learning_rate: float = 3e-5
    gamma: float = 0.9


def _train(run: MethodRun) -> dict[str, Any]:
    settings: VduSettings = run.settings
    images = len(run.inputs.forget_images())
    common: dict[str, Any] = {
        "optimizer": "adam",
        "saturation": "none",
        "replay_weight": 0.0,
        "learning_rate": settings.learning_rate,
        "batch_size": settings.batch_size,
        "gamma": settings.gamma,
        "check_size": settings.batch_size,
        "anneal": ANNEAL,
        "max_gradient_norm": MAX_GRADIENT_NORM,
    }
    # One check, at the end: nothing depends on it.
    one = evaluations_of_unlearn(UnlearnConfig(steps=1, check_every=1, **common), images)
    steps = number_of_steps(run, cost=3 * settings.batch_size, first=one)
    return unlearn_within(run, UnlearnConfig(steps=steps, check_every=steps, **common))


VDU = Method(
    name="vdu",
    title="VDU (as published)",
    paper="Panda, Varun M S, Jain, Maharana, Prathosh A.P., Variational Diffusion Unlearning, TMLR 2026",
    sees="forget data",
    settings=VduSettings,
    train=_train,
)
