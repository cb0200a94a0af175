"""vdu_fast's own `unlearn`, behind the interface of the baselines."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from vdu_fast.baselines.budget import evaluations_of_unlearn
from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError
from vdu_fast.job import Observers
from vdu_fast.unlearner import unlearn


def unlearn_within(run: MethodRun, config: UnlearnConfig) -> dict[str, Any]:
    """`unlearn` with the run's data, seed and device; its record without the settings.

    Raises:
        InputError: there is no posterior, or the settings need more than the budget.
    """
    images = run.inputs.forget_images()
    if run.inputs.posterior is None:
        raise InputError("posterior: this method needs the posterior of the model. Give one (--posterior FILE).")
    needed, payable = evaluations_of_unlearn(config, len(images)), run.counter.times(1)
    if payable is not None and needed > payable:
        raise InputError(
            f"budget: {payable} network evaluations, and these settings need {needed}. Raise it, or lower steps or "
            "replay_samples."
        )
    config = UnlearnConfig(**(asdict(config) | {"seed": run.seed, "device": str(run.denoiser.device)}))
    result = unlearn(
        run.denoiser.module,
        images,
        posterior=run.inputs.posterior,
        config=config,
        scheduler=run.denoiser.scheduler,
        observers=Observers(on_step=lambda record: run.progress(int(record["step"]), config.steps)),
    )
    losses = result.history[:: max(1, len(result.history) // 20)]
    return {"steps": result.steps, "stopped_because": result.stopped_because, "losses": losses}


def _train(run: MethodRun) -> dict[str, Any]:
    return unlearn_within(run, run.settings)


OURS = Method(
    name="ours",
    title="vdu_fast (ours)",
    paper="this project, after Panda et al., Variational Diffusion Unlearning, TMLR 2026",
    sees="forget data + own samples",
    settings=UnlearnConfig,
    train=_train,
)
