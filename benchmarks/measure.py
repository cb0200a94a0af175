"""Times of a question's calls, taken in turns, so that what slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from vdu_fast import _native
from vdu_fast.benchmarks.case import Calls, Case

COPY = "copy"
# float32 numbers in the copy that bandwidths are compared with: many times any cache.
COPIED = 36_000_000
# Clock cycles of a GPU: about the time that the host takes to launch a question's calls.
PAUSE = 3_000_000
GPU_BACKENDS = ("cuda", "triton")

Times = dict[str, list[float]]


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, over the median."""
    if len(times) < 2:
        return 0.0
    low, _, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / statistics.median(times)


def seconds_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_on_gpu(call: Callable[[], object]) -> float:
    """What one call takes on the device, without what the host needs to launch it."""
    torch.cuda._sleep(PAUSE)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def measure(case: Case, device: torch.device, *, copied: int = COPIED) -> tuple[Times, dict[str, str]]:
    """Seconds of every call and of a copy of `copied` float32 numbers, in `case.repeats` rounds after a warm-up.

    Returns:
        The times by name, and why a baseline is not among them, by name: compilers may fail in any way. A failure of
        ours is raised.
    """
    clock = seconds_on_gpu if device.type == "cuda" else seconds_on_cpu
    source, target = (torch.zeros(copied, device=device) for _ in range(2))
    source.normal_()
    ours = _under_every_backend(case.ours) if device.type == "cuda" else case.ours
    calls: Calls = {**case.baselines, **ours, COPY: lambda: target.copy_(source)}
    failed: dict[str, str] = {}
    for name, call in list(calls.items()):
        try:
            for _ in range(3 if device.type == "cuda" else 1):
                clock(call)
        except Exception as error:
            if name not in case.baselines:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            del calls[name]
    times: Times = {name: [] for name in calls}
    for _ in range(case.repeats):
        for name, call in calls.items():
            times[name].append(clock(call))
    return times, failed


def _under_every_backend(calls: Calls) -> Calls:
    """The first of ours, under every backend that the GPU has."""

    def under(backend: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with _native.use_backend(backend):
                call()

        return run

    first = next(iter(calls.values()))
    return {name: under(name, first) for name in GPU_BACKENDS if _native.ABSENCES[name] is None}
