"""Measurements on an unlearning run: its steps by phase, its network alone, and the network under other settings."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from vdu_fast.machine import free_memory, has_bfloat16
from vdu_fast.phases import PhaseCost, PhaseRecorder, phase, synchronize
from vdu_fast.unlearning_run import UnlearningRun

T = TypeVar("T")
# Called with what is being done, how much of it is done, and how much there is.
Report = Callable[[str, int, int], None]

# The phase around a whole step; what is in no phase inside it is left to it.
STEP = "step"
# Repetitions of what is no more than a hint.
PROBES = 5
# Of the free memory, what a larger batch may be expected to take for it to be tried.
SAFE_SHARE = 0.8


def timed(device: torch.device, work: Callable[[], T]) -> tuple[T, float]:
    """What the work gives, and the seconds until the device has done it."""
    synchronize(device)
    began = time.perf_counter()
    result = work()
    synchronize(device)
    return result, time.perf_counter() - began


def recorded_step(run: UnlearningRun, recorder: PhaseRecorder, *, check: bool = False) -> dict[str, PhaseCost]:
    """The phases of one step, with a check in it or without."""
    given = run.config
    if check:
        run.config = replace(given, check_every=1)
    try:
        with recorder.recording(), phase(STEP):
            run.step()
    finally:
        run.config = given
    return recorder.take()


def alternating_steps(
    run: UnlearningRun, recorder: PhaseRecorder, steps: int, report: Report
) -> tuple[list[dict[str, PhaseCost]], list[float], list[float]]:
    """Recorded steps, seconds of steps that nobody records, and of the bare network, in turn: noise hits all alike."""
    device, batch = run.denoiser.device, _batch(run, 1)
    marked, plain, network = [], [], []
    _forward_backward(run, *batch)
    for done in range(steps):
        marked.append(recorded_step(run, recorder))
        plain.append(timed(device, run.step)[1])
        network.append(timed(device, partial(_forward_backward, run, *batch))[1])
        report("taking steps", done + 1, steps)
    return marked, plain, network


def repairing_step(run: UnlearningRun) -> float:
    """Seconds of a step in which the run does not forget any more."""
    given = run.config
    run.config = replace(given, forget_share=1e-20)  # all steps but the first
    try:
        return statistics.median(timed(run.denoiser.device, run.step)[1] for _ in range(PROBES))
    finally:
        run.config = given


def samples_of(run: UnlearningRun) -> int:
    """Samples in one pass through the network."""
    return run.config.batch_size + (run.config.replay_batch_size if run.bank is not None else 0)


def _batch(run: UnlearningRun, times: int) -> tuple[Tensor, Tensor]:
    """x_t and timesteps of as many samples as a pass has, or several times as many."""
    size, total = times * samples_of(run), len(run.denoiser.schedule)
    x_t = run.images[torch.arange(size) % len(run.images)].to(run.denoiser.device)
    return x_t, (torch.arange(size) * total // size).to(run.denoiser.device)


def _forward_backward(run: UnlearningRun, x_t: Tensor, timesteps: Tensor) -> None:
    """The network and nothing of unlearning, with the simplest loss that there is."""
    run.denoiser.predict(x_t, timesteps, repeated=True).float().square().mean().backward()


def probe(run: UnlearningRun, peak: int, report: Report) -> dict[str, float]:
    """Forward and backward as they are, and with one thing changed, in turn; the fastest of each.

    A compiled network is left as it is: compiling it for each of the others takes longer than the rest of a profile.
    """
    denoiser, device = run.denoiser, run.denoiser.device
    given, free = denoiser.execution, free_memory(device)
    kinds = {"batch": (1, given)}
    if given.compile == "off":
        if free is None or 2 * peak < SAFE_SHARE * free:
            kinds["doubled"] = (2, given)
        if not given.channels_last:
            kinds["channels_last"] = (1, replace(given, channels_last=True))
        if given.precision == "float32" and denoiser.dtype == torch.float32 and has_bfloat16(device):
            kinds["bfloat16"] = (1, replace(given, precision="bfloat16"))
    batches = {times: _batch(run, times) for times in {times for times, _ in kinds.values()}}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for done in range(PROBES + 1):
        for kind, (times, denoiser.execution) in kinds.items():
            seconds[kind].append(timed(device, partial(_forward_backward, run, *batches[times]))[1])
        report("trying other settings", done + 1, PROBES + 1)
    denoiser.execution = given
    # The first of each is its warm-up.
    return {kind: min(values[1:]) for kind, values in seconds.items()}


def highest(steps: Sequence[Mapping[str, PhaseCost]]) -> dict[str, PhaseCost]:
    """By phase, the most memory that any step needed."""
    found: dict[str, PhaseCost] = {}
    for costs in steps:
        for name, cost in costs.items():
            best = found.setdefault(name, PhaseCost(peak=0, rise=0))
            best.peak, best.rise = max(best.peak or 0, cost.peak or 0), max(best.rise or 0, cost.rise or 0)
    return found
