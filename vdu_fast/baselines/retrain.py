"""Training from scratch on the retained data: what unlearning stands in for, and the reference where it is affordable.

The recipe is that of `vdu-fast pretrain` with the settings that the original model was trained with. The budget does
not bind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from vdu_fast.baselines.budget import EvaluationCounter
from vdu_fast.baselines.method import Method, MethodRun
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.pretrain import Pretraining


@dataclass(frozen=True)
class RetrainSettings:
    """Retraining has the settings of the original training; see `MethodInputs.pretraining`."""


def _train(run: MethodRun) -> dict[str, Any]:
    if run.inputs.pretraining is None:
        raise InputError(
            "retrain: nothing says how the model was trained: there is no pretrain.json, as `vdu-fast pretrain` "
            "writes it, in the model's folder. Leave retrain out, or give a model trained with `vdu-fast pretrain`."
        )
    images = ImageSet(run.inputs.retained_images(), None, (), "the retained images")
    config = replace(run.inputs.pretraining, seed=run.seed, device=str(run.denoiser.device))
    training = Pretraining(images, config)
    module = run.denoiser.module
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    if {name: tensor.shape for name, tensor in training.unet.state_dict().items()} != expected:
        raise InputError(
            "retrain: the network that pretrain.json describes is not that of the model. Leave retrain out, or give "
            "the folder that `vdu-fast pretrain` wrote."
        )
    with EvaluationCounter(training.unet, None) as counter:
        while training.step < training.total:
            training.train_step()
            run.progress(training.step, training.total)
    module.load_state_dict(training.averaged_unet().state_dict())
    return {
        "steps": training.step,
        "stopped_because": f"all {training.step} steps done (exempt from the budget)",
        "pretraining_seed": config.seed,
        "evaluations": counter.spent,
    }


RETRAIN = Method(
    name="retrain",
    title="retraining",
    paper="the original recipe on the retained data alone",
    sees="retained data",
    settings=RetrainSettings,
    train=_train,
    limited=False,
)
