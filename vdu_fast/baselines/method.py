"""What a method is, what it may see, and how one is run and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from torch import Tensor

from vdu_fast.baselines.budget import EvaluationCounter
from vdu_fast.errors import InputError
from vdu_fast.pipelines import Denoiser
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.pretrain import PretrainConfig

Sees = Literal["forget data", "forget data + own samples", "forget + retained data", "retained data"]

# Called with (steps done, steps in all).
MethodProgress = Callable[[int, int], None]


@dataclass(frozen=True)
class MethodInputs:
    """What there is to unlearn from; `run_method` hands a method no more of it than the method `sees`.

    Attributes:
        forget: images of what must go, float32 [N, C, H, W] in [-1, 1].
        retained: images of everything else, float32 [M, C, H, W] in [-1, 1].
        posterior: over the weights of the model, for the variational methods.
        pretraining: how the model was trained, for retraining it.
    """

    forget: Tensor | None
    retained: Tensor | None = None
    posterior: GaussianPosterior | None = None
    pretraining: PretrainConfig | None = None

    def forget_images(self) -> Tensor:
        """The forget images; InputError where there are none."""
        return _given(self.forget, "forget")

    def retained_images(self) -> Tensor:
        """The retained images; InputError where there are none."""
        return _given(self.retained, "retained")


def _given(images: Tensor | None, name: str) -> Tensor:
    if images is None or not len(images):
        raise InputError(f"{name}: this method needs {name} images, and there are none. Give some.")
    return images


@dataclass(frozen=True)
class MethodRun:
    """One run under way, as the method sees it.

    Attributes:
        denoiser: the model, changed in place.
        inputs: the data, without what the method may not see.
        settings: of the type that the method names.
        counter: says how many steps can still be paid.
        seed: of everything random.
        progress: called after each step.
    """

    denoiser: Denoiser
    inputs: MethodInputs
    settings: Any
    counter: EvaluationCounter
    seed: int
    progress: MethodProgress


@dataclass(frozen=True)
class Method:
    """A method by its name.

    Attributes:
        name: in files and on the command line.
        title: in tables.
        paper: what it is taken from.
        sees: which data it is handed.
        settings: dataclass of its settings; the defaults are what did best in benchmarks/tune_methods.py.
        train: changes the model of a run, and returns what is worth recording, ready for JSON.
        limited: whether the common budget binds it; retraining is what the others try to spare.
    """

    name: str
    title: str
    paper: str
    sees: Sees
    settings: Callable[..., Any]
    train: Callable[[MethodRun], dict[str, Any]]
    limited: bool = True


def run_method(
    method: Method,
    denoiser: Denoiser,
    inputs: MethodInputs,
    *,
    budget: int | None,
    seed: int = 0,
    settings: Any = None,
    progress: MethodProgress | None = None,
) -> dict[str, Any]:
    """Unlearn with one method, in place.

    Args:
        denoiser: the model; its weights are changed.
        inputs: all data there are; what the method does not see is withheld from it.
        budget: network evaluations that may be spent (see `budget`); None is no limit.
        seed: of batches, timesteps, noise and samples; the same one gives the same weights.
        settings: None takes the method's defaults.
        progress: called with (steps done, steps in all).

    Returns:
        Name, settings, what it saw, evaluations and seconds spent, and what the method itself recorded.

    Raises:
        InputError: data that the method needs are missing, or the budget does not pay for one step.
    """
    settings = settings if settings is not None else method.settings()
    inputs = replace(
        inputs,
        forget=inputs.forget if "forget" in method.sees else None,
        retained=inputs.retained if "retained" in method.sees else None,
    )
    module, training, began = denoiser.module, denoiser.module.training, time.perf_counter()
    with EvaluationCounter(module, budget if method.limited else None) as counter:
        # Dropout would draw from a generator that is no function of the seed.
        module.eval()
        try:
            run = MethodRun(denoiser, inputs, settings, counter, seed, progress or (lambda done, total: None))
            details = method.train(run)
        finally:
            module.train(training)
    return {
        "method": method.name,
        "title": method.title,
        "sees": method.sees,
        "settings": asdict(settings),
        "seed": seed,
        "evaluations": details.pop("evaluations", counter.spent),
        "budget": budget if method.limited else None,
        "seconds": time.perf_counter() - began,
        **details,
    }
