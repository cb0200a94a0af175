"""What a profile holds, and how its times and sizes are written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PhaseRow:
    """One phase of a step.

    Attributes:
        name: as `vdu_fast.phases` marks it; "step" is the rest, in no phase of its own.
        seconds, low, high: per step, the median and the quartiles over the measured steps. A check is spread over the
            check_every steps that it is made once in.
        share: of the step.
        peak, rise: bytes, see `vdu_fast.phases.PhaseCost`; None where nothing tells.
    """

    name: str
    seconds: float
    low: float
    high: float
    share: float
    peak: int | None
    rise: int | None


@dataclass(frozen=True)
class RunPart:
    """One part of the whole run.

    Attributes:
        name: "bank", "filter", "start", "steps", "checks" or "saves".
        seconds: of the user's whole run.
        estimate: whether `seconds` is more than was measured, and so an extrapolation.
        basis: what was measured, in words.
    """

    name: str
    seconds: float
    estimate: bool
    basis: str


@dataclass(frozen=True)
class Profile:
    """What `profile` found. Times in seconds, memory in bytes.

    Attributes:
        phases: of one step, in the order they come in.
        parts: of the whole run.
        step: one step without a check, while nobody records: the marks wait for an accelerator, this does not.
        network: forward and backward of the bare network for as many samples as a step has, and nothing else.
        overhead: what a step takes beyond the bare network, as a share of that; the median over pairs of neighbours.
        check: one measurement on the fixed batches.
        probe: forward and backward again, the fastest of a few each: "batch" as it is, "doubled" with twice the batch,
            "bfloat16", "channels_last"; all but the first are absent where they make no sense, or would not fit.
        samples: that pass through the network in one pass of a step: forget images and replayed states.
        passes: of one step through the network.
        parameters, trainable: how many weights the network has, and how many of them may change.
        sample_shape: (C, H, W) of a picture.
        held: what lies in memory all the time.
        memory_from: where the phases' memory figures come from.
        machine: device, device_name, threads, cores, backend, torch, and whether the device computes in bfloat16.
        settings: of the run.
        trace: JSON of torch.profiler, of a step without a check and one with a check.
    """

    phases: list[PhaseRow]
    parts: list[RunPart]
    step: float
    network: float
    overhead: float
    check: float
    probe: dict[str, float]
    samples: int
    passes: int
    parameters: int
    trainable: int
    sample_shape: tuple[int, int, int]
    held: dict[str, int]
    memory_from: str
    machine: dict[str, Any]
    settings: dict[str, Any]
    trace: bytes

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(part.seconds for part in self.parts)

    def seconds_of(self, name: str) -> float:
        """Of a phase in one step; 0 where there is no such phase."""
        return sum(row.seconds for row in self.phases if row.name == name)

    def part(self, name: str) -> RunPart | None:
        """A part of the run, or None where the run has none such."""
        return next((part for part in self.parts if part.name == name), None)


def duration(seconds: float) -> str:
    """A time for people, with three digits."""
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} µs"
    if seconds < 0.9995:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 99.95:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 5997 else f"{seconds / 3600:,.1f} h"


def size(count: int) -> str:
    """Bytes for people, with three digits."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 999.5 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{value:.3g} {units[0]}"
