"""The Gaussian posterior p(theta | D) ~ N(mean, diag std^2) of a trained network, and the ways to estimate it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from vdu_fast import ops
from vdu_fast.checkpoint import load_state, load_tensors, save_tensors
from vdu_fast.errors import InputError
from vdu_fast.modules import PREFIXES, unwrapped

logger = logging.getLogger(__name__)

# Checkpoints of one trajectory lie much closer together than their own length; independent runs do not.
SEPARATE_RUNS_DISTANCE = 0.7


@dataclass
class GaussianPosterior:
    """A diagonal Gaussian over the parameters of a network.

    Attributes:
        std: standard deviation of every parameter, by parameter name; float32, positive.
        mean: mean of every parameter, or None for "the weights of the model it is used with".
        source: how it was estimated, as string metadata (kind, count of checkpoints, shrinkage, ...).
    """

    std: dict[str, Tensor]
    mean: dict[str, Tensor] | None = None
    source: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_checkpoints(
        cls,
        checkpoints: Iterable[Path | str | Mapping[str, Tensor]],
        *,
        shrink: float | None = None,
        floor: float = 1e-6,
    ) -> GaussianPosterior:
        """Mean and variance over checkpoints, with one of them in memory at a time.

        Args:
            checkpoints: at least two state dicts, .safetensors files or save_pretrained folders, of one trajectory.
            shrink, floor: see `RunningMoments.posterior`.

        Raises:
            InputError: fewer than two checkpoints, NaN in one, keys or shapes that differ, or no variance.
        """
        moments = RunningMoments()
        for number, checkpoint in enumerate(checkpoints):
            named = isinstance(checkpoint, str | Path)
            state = load_state(checkpoint) if named else checkpoint  # type: ignore[arg-type]
            moments.update(state, label=str(checkpoint) if named else f"checkpoint {number}")  # type: ignore[arg-type]
        return moments.posterior(shrink=shrink, floor=floor)

    @classmethod
    def constant(cls, module: nn.Module, std: float) -> GaussianPosterior:
        """The same standard deviation for every parameter: no metric at all. For comparison only."""
        if not (math.isfinite(std) and std > 0):
            raise InputError(f"std must be a positive number, got {std}.")
        return cls(
            {name: torch.full(p.shape, std) for name, p in unwrapped(module).named_parameters()},
            source={"kind": "constant", "std": repr(std)},
        )

    def save(self, path: Path | str, *, std_dtype: torch.dtype = torch.float32) -> None:
        """Write a safetensors file, atomically; `std_dtype` may be a shorter float to save space."""
        tensors = {f"std.{name}": tensor.to(std_dtype) for name, tensor in self.std.items()}
        tensors |= {f"mean.{name}": tensor for name, tensor in (self.mean or {}).items()}
        save_tensors(path, tensors, {"format": "vdu_fast.posterior.1", **self.source})

    @classmethod
    def load(cls, path: Path | str) -> GaussianPosterior:
        """Read what `save` wrote; InputError when the file is something else."""
        tensors, metadata = load_tensors(path)
        if metadata.pop("format", None) != "vdu_fast.posterior.1":
            raise InputError(
                f"--posterior {path} is not a posterior file. Make one with `vdu-fast posterior --checkpoints ... "
                "--output FILE`, or with `--fisher --model DIR` where there is but one checkpoint."
            )
        std = {name[4:]: t.float() for name, t in tensors.items() if name.startswith("std.")}
        mean = {name[5:]: t.float() for name, t in tensors.items() if name.startswith("mean.")}
        return cls(std, mean or None, metadata)

    def check_fits(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise InputError unless every parameter has a finite, positive std of its shape (and a mean, if any)."""
        missing = [name for name in parameters if name not in self.std]
        if missing:
            raise InputError(
                f"posterior: {len(missing)} of the model's {len(parameters)} trainable parameters are absent from it "
                f"(first: {missing[0]}). {self._remedy(missing, parameters)}"
            )
        for name, parameter in parameters.items():
            for kind, tensors in (("std", self.std), ("mean", self.mean)):
                if tensors is None:
                    continue
                if name not in tensors or tensors[name].shape != parameter.shape:
                    came = tuple(tensors[name].shape) if name in tensors else "nothing"
                    raise InputError(
                        f"posterior: {kind} of {name} has shape {came}, the model's has {tuple(parameter.shape)}. "
                        "It belongs to another model: estimate it from this model's checkpoints."
                    )
                if not tensors[name].isfinite().all():
                    raise InputError(f"posterior: {kind} of {name} holds NaN or infinity; estimate it again.")
            if not (self.std[name] > 0).all():
                raise InputError(f"posterior: std of {name} has zeros; estimate it again with a positive floor.")

    def _remedy(self, missing: Sequence[str], parameters: Mapping[str, Tensor]) -> str:
        """What may be wrong where parameters have no std, and what to do about it."""
        if len(missing) == len(parameters):
            for prefix in PREFIXES:
                if all(f"{prefix}{name}" in self.std for name in parameters):
                    return (
                        f"Its names begin with {prefix!r}, from checkpoints of a wrapped model: save the state_dict of "
                        f"model.{prefix.rstrip('.')}, or strip the prefix, and estimate it again."
                    )
            return "It belongs to another model: estimate it from this model's checkpoints."
        return (
            "Either they never changed between its checkpoints: freeze them (requires_grad_(False)), or name only the "
            "others (--trainable). Or it belongs to another model: estimate it from this model's checkpoints."
        )


class RunningMoments:
    """Streaming mean and sum of squared deviations of state dicts (Welford 1962), in float32."""

    def __init__(self) -> None:
        self.count = 0
        self.mean: dict[str, Tensor] = {}
        self.squares: dict[str, Tensor] = {}
        self._apart = 0.0

    def update(self, state: Mapping[str, Tensor], *, label: str = "checkpoint") -> None:
        """Take one more state dict into account; integer tensors (counters) are ignored."""
        values = {name: t.detach() for name, t in state.items() if t.is_floating_point()}
        self._check(values, label)
        self.count += 1
        if self.count == 1:
            self.mean = {name: t.float().clone() for name, t in values.items()}
            self.squares = {name: torch.zeros_like(t) for name, t in self.mean.items()}
            return
        distance = length = 0.0
        for name, t in values.items():
            apart, long = ops.welford_update_(self.mean[name], self.squares[name], t, self.count).tolist()
            distance, length = distance + apart, length + long
        self._apart = max(self._apart, math.sqrt(distance / max(length, 1e-30)))

    def _check(self, values: Mapping[str, Tensor], label: str) -> None:
        for name, t in values.items():
            if not t.isfinite().all():
                raise InputError(f"{label}: {name} holds NaN or infinity; leave this checkpoint out.")
        if not self.count:
            return
        if different := sorted(set(values) ^ set(self.mean)):
            raise InputError(
                f"{label} has other parameters than the first checkpoint ({len(different)} differ, first: "
                f"{different[0]}); all checkpoints must be of one model."
            )
        for name, t in values.items():
            if t.shape != self.mean[name].shape:
                raise InputError(
                    f"{label}: {name} has shape {tuple(t.shape)}, the first checkpoint's has "
                    f"{tuple(self.mean[name].shape)}; all checkpoints must be of one model."
                )

    def posterior(self, *, shrink: float | None = None, floor: float = 1e-6) -> GaussianPosterior:
        """The posterior with shrunk variances, of the tensors that moved.

        Constant buffers and frozen weights have no variance; they are left out with a logged warning.

        A variance from K checkpoints has a relative standard deviation of sqrt(2 / (K - 1)), so per tensor

            std^2 = (1 - shrink) s^2 + shrink mean(s^2),      s^2 the sample variance,      std >= floor.

        Args:
            shrink: in [0, 1]; None is 1 / K.
            floor: smallest standard deviation, in units of the parameters; above 1e-4 it is known to hurt.

        Raises:
            InputError: fewer than two checkpoints, or none that differs from the others.
        """
        if self.count < 2:
            raise InputError(
                f"a variance needs at least two checkpoints, got {self.count}. With a single one use the diagonal "
                "Fisher information: `vdu-fast posterior --fisher --model DIR --output FILE`."
            )
        shrink = 1 / self.count if shrink is None else shrink
        if not 0 <= shrink <= 1:
            raise InputError(f"shrink must be in [0, 1], got {shrink}.")
        if not (math.isfinite(floor) and floor > 0):
            raise InputError(f"floor must be a positive number, got {floor}.")
        moving = {name: squares for name, squares in self.squares.items() if squares.any()}
        still = [name for name in self.squares if name not in moving]
        if not moving:
            raise InputError("the checkpoints are all equal, so they hold no variance: give different training steps.")
        if still:
            logger.warning(
                "%d of %d tensors never change between the checkpoints (first: %s). They are left out: unlearning "
                "with this posterior cannot move them.",
                len(still),
                len(self.squares),
                still[0],
            )
        if self._apart > SEPARATE_RUNS_DISTANCE:
            logger.warning(
                "the checkpoints are %.0f%% of their own length apart: they look like independent runs, whose mean is "
                "no model. Use late checkpoints of one run.",
                100 * self._apart,
            )
        std = {}
        for name, squares in moving.items():
            variance = squares / (self.count - 1)
            std[name] = variance.mul(1 - shrink).add_(variance.mean() * shrink).sqrt_().clamp_(min=floor)
        source = {"kind": "checkpoints", "count": str(self.count), "shrink": repr(shrink), "floor": repr(floor)}
        # Copies: the running mean is updated in place, and a posterior must not move once it is given out.
        return GaussianPosterior(std, {name: self.mean[name].clone() for name in moving}, source)


class PosteriorRecorder:
    """Collects the posterior while a training loop runs: call `step()` after every optimizer step.

    Record while the learning rate is still constant. Annealing shrinks the fluctuations tenfold, and what unlearning
    needs is the shape of the valley, not how still the weights lie at the end. Take the mean from the annealed
    network: `recorder.posterior(mean=model)`.

    Args:
        module: the network that is trained; parameters that do not require a gradient are left out.
        every: record at every `every`-th call of `step`, counting from `start`.
        start: calls to skip first, while training is far from its end.
    """

    def __init__(self, module: nn.Module, *, every: int = 100, start: int = 0) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1, got {every}.")
        self.module, self.every, self.start = unwrapped(module), every, start
        self.calls = 0
        self.moments = RunningMoments()

    def step(self) -> bool:
        """Count one training step; record the weights when one is due, and say whether it was."""
        self.calls += 1
        due = self.calls > self.start and (self.calls - self.start) % self.every == 0
        if due:
            trained = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
            self.moments.update(trained, label=f"training step {self.calls}")
        return due

    def posterior(
        self, *, mean: nn.Module | None = None, shrink: float | None = None, floor: float = 1e-6
    ) -> GaussianPosterior:
        """The posterior so far; `mean` replaces the recorded mean by the weights of that network."""
        result = self.moments.posterior(shrink=shrink, floor=floor)
        if mean is not None:
            result.mean = {name: p.detach().float().cpu().clone() for name, p in unwrapped(mean).named_parameters()}
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """Everything needed to go on after a restart, as flat tensors."""
        state = {f"mean.{name}": t for name, t in self.moments.mean.items()}
        state |= {f"squares.{name}": t for name, t in self.moments.squares.items()}
        state["counts"] = torch.tensor([self.calls, self.moments.count])
        state["apart"] = torch.tensor(self.moments._apart, dtype=torch.float64)
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        device = next(self.module.parameters()).device  # a state read from a file lies on the CPU
        self.calls, self.moments.count = (int(v) for v in state["counts"])
        self.moments._apart = float(state["apart"])
        self.moments.mean = {n[5:]: t.to(device, copy=True) for n, t in state.items() if n.startswith("mean.")}
        self.moments.squares = {n[8:]: t.to(device, copy=True) for n, t in state.items() if n.startswith("squares.")}


def check_enough(paths: Sequence[Path | str]) -> None:
    """InputError when there are too few checkpoint paths, before any is read."""
    if len(paths) < 2:
        raise InputError(
            f"--checkpoints got {len(paths)} file(s); a variance needs at least two. With a single one use the "
            "diagonal Fisher information: `vdu-fast posterior --fisher --model DIR --output FILE`."
        )
