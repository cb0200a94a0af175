"""Marks of what a run is doing at the moment, which cost next to nothing until somebody records them.

with phase("data"):        # or @phase("data") on a function
    ...

recorder = PhaseRecorder(device)
with recorder.recording():
    ...
recorder.take()            # {"data": PhaseCost(...)}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ContextDecorator, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.profiler import record_function

# What a trace calls the range of a phase: this and the phase's name.
PREFIX = "vdu_fast::"


class MemoryMeter(Protocol):
    """What a device says about its allocated bytes: as they are now, and at their highest since it was last asked."""

    def now(self) -> int: ...

    def peak(self) -> int: ...


@dataclass
class PhaseCost:
    """What one phase took since the last `take`, without the phases inside it.

    Attributes:
        seconds: wall time.
        peak: allocated bytes of the device while it ran, at their highest, above those when the outermost phase began;
            None where no meter was given.
        rise: the most by which they rose while it ran.
    """

    seconds: float = 0.0
    peak: int | None = None
    rise: int | None = None


class PhaseRecorder:
    """Measures the phases of one thread; each is also a range `vdu_fast::<name>` of torch.profiler.

    Args:
        device: an accelerator is waited for at every mark, so that its work counts where it was asked for. What ran
            side by side then runs one after the other: compare the sum with a run that nobody records.
        meter: of the device's memory.
        clock: seconds.
    """

    def __init__(
        self,
        device: torch.device | None = None,
        *,
        meter: MemoryMeter | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._device, self._meter, self._clock = device, meter, clock
        self._open: list[tuple[str, record_function]] = []
        self._costs: dict[str, PhaseCost] = {}
        self._since, self._held, self._ground = 0.0, 0, 0

    def take(self) -> dict[str, PhaseCost]:
        """The costs by name, in the order of the first marks; counting starts anew."""
        costs, self._costs = self._costs, {}
        return costs

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record the phases of this thread while the block runs; an outer recorder sees nothing of it."""
        token = _active.set(self)
        try:
            yield
        finally:
            _active.reset(token)

    def enter(self, name: str) -> None:
        self._charge()
        shown = record_function(PREFIX + name)
        shown.__enter__()
        self._open.append((name, shown))

    def leave(self) -> None:
        self._charge()
        self._open.pop()[1].__exit__(None, None, None)

    def _charge(self) -> None:
        """Put what went by since the last mark on the innermost open phase."""
        if self._device is not None:
            synchronize(self._device)
        now = self._clock()
        if self._open:
            cost = self._costs.setdefault(self._open[-1][0], PhaseCost())
            cost.seconds += now - self._since
            if self._meter is not None:
                peak = self._meter.peak()
                cost.peak = max(cost.peak or 0, peak - self._ground)
                cost.rise = max(cost.rise or 0, peak - self._held)
        if self._meter is not None:
            if not self._open:
                self._meter.peak()  # of what came before
                self._ground = self._meter.now()
            self._held = self._meter.now()
        # Again, so that what the meter took is on nobody's bill.
        self._since = self._clock()


_active: ContextVar[PhaseRecorder | None] = ContextVar("vdu_fast_phases", default=None)


class phase(ContextDecorator):
    """Mark a block, or every call of a function, as one phase of the run; without a recorder nothing happens."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._recorder: PhaseRecorder | None = None

    def _recreate_cm(self) -> phase:
        # A decorated function may be entered again before it is left.
        return phase(self.name)

    def __enter__(self) -> None:
        self._recorder = recorder = _active.get()
        if recorder is not None:
            recorder.enter(self.name)

    def __exit__(self, *_: object) -> None:
        if self._recorder is not None:
            self._recorder.leave()


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was asked for; the CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
