"""What a question is: our op against its fair baselines, in one process, with a budget. And the registry of them."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# The calls of a question, by name.
Calls = dict[str, Callable[[], object]]
# A line of the results: the question, an implementation and what was measured of it.
Line = dict[str, Any]


@dataclass(frozen=True)
class Budget:
    """What the first of ours is held to.

    Nothing is faster than its bytes. So what moves them at 90% of a copy's bandwidth keeps its ratio and its part,
    whatever they are: the baselines have as good a memory as ours.

    Attributes:
        ratios: least ratio to the fastest baseline whose name begins so; "" is any baseline.
        bandwidth: least share of the bandwidth of a copy in the same run.
        part: most of the time of the first baseline.
        seconds: most of the time itself.
    """

    ratios: dict[str, float] = field(default_factory=dict)
    bandwidth: float | None = None
    part: float | None = None
    seconds: float | None = None


AT_THE_LIMIT = 0.9


@dataclass
class Case:
    """A question that calls answer, which are timed in turns.

    Attributes:
        baselines, ours: functions without arguments, by name; the first of ours is the one with the budget.
        units: how many `unit` one call works on.
        bytes: what one call of ours has to read and write, to set its time beside that of a copy in the same run.
        operations: arithmetic operations of one call of ours, as its reference needs them; 0 leaves it out of the
            roofline.
        budget: on the device that the question was made for.
        repeats: rounds.
        per_backend: on a GPU, time the first of ours under every backend; False times all of ours, as a user would.
        columns: what else is known of an implementation, by its name: columns of its line.
    """

    baselines: Calls
    ours: Calls
    units: int
    unit: str = "parameter"
    bytes: int = 0
    operations: int = 0
    budget: Budget = field(default_factory=Budget)
    repeats: int = 7
    per_backend: bool = True
    columns: dict[str, Line] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """Where and on how much the questions are asked.

    Attributes:
        device: of the tensors.
        shapes: of the parameters in the questions about ops.
        quick: whether the answers are wanted in seconds.
    """

    device: torch.device
    shapes: Sequence[torch.Size]
    quick: bool = False

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes)


@dataclass(frozen=True)
class Question:
    """An entry of the registry.

    Attributes:
        make: builds the case, or measures by itself and gives finished lines.
        group: "ops", "step", "loop" or "machine".
        devices: device types that it can be asked on.
        needs: modules without which it cannot be asked.
        quick: whether `vdu-fast benchmark --quick` asks it.
    """

    name: str
    make: Callable[[Setting], Case | list[Line]]
    group: str
    devices: tuple[str, ...] = ("cpu", "cuda")
    needs: tuple[str, ...] = ()
    quick: bool = False

    def absence(self, setting: Setting) -> str | None:
        """Why it cannot be asked here, or None."""
        if setting.device.type not in self.devices:
            return f"it is about {' and '.join(self.devices)}"
        missing = [name for name in self.needs if importlib.util.find_spec(name) is None]
        return f"it needs {', '.join(missing)}, which is not installed" if missing else None


QUESTIONS: dict[str, Question] = {}
# In this order they are asked.
FILES = (
    "standard_normal", "sample_weights", "gradients", "mean_only_step", "mean_field_step", "noised_images",
    "outside_optimizers", "bayesian_layer", "overhead", "scaling", "loop_options", "evaluation_sampling", "peak_memory",
    "import_time",
)  # fmt: skip


def question(name: str, *, group: str, **options: Any) -> Callable[[Callable[[Setting], Case | list[Line]]], Any]:
    """Register the decorated function as the maker of a question."""

    def register(make: Callable[[Setting], Case | list[Line]]) -> Callable[[Setting], Case | list[Line]]:
        QUESTIONS[name] = Question(name, make, group, **options)
        return make

    return register


def load_questions() -> dict[str, Question]:
    """The registry, with every file of `cases/` imported."""
    for name in FILES:
        importlib.import_module(f"vdu_fast.benchmarks.cases.{name}")
    return QUESTIONS


class WrongResult(RuntimeError):
    """A fast result differs from the one it is compared with; its time is then nobody's business."""


def check_close(name: str, got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    """WrongResult unless the largest difference is below `tolerance` of the largest value."""
    error = float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if not error < tolerance:
        raise WrongResult(f"{name} is wrong by {error:.1e} of its largest value")
