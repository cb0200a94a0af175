"""Times of a question's calls, taken in turns, so that what slows the machine down slows all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

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


def seconds_in_all(call: Callable[[], object]) -> float:
    """What one call takes that waits for the device in between: host and device together."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(case: Case, device: torch.device, *, copied: int = COPIED) -> tuple[Times, dict[str, str]]:
    """Seconds of every call and of a copy of `copied` float32 numbers, in `case.repeats` rounds after a warm-up.

    Returns:
        The times by name, and why a baseline is not among them, by name: compilers may fail in any way. A failure of
        ours is raised.
    """
    source, target = (torch.zeros(copied, device=device) for _ in range(2))
    source.normal_()
    on_gpu = device.type == "cuda"
    clock = seconds_on_gpu if on_gpu and case.per_backend else seconds_in_all if on_gpu else seconds_on_cpu
    ours = _under_every_backend(case.ours) if on_gpu and case.per_backend else _as_it_is(case.ours)
    timed = {**_as_it_is(case.baselines), **ours, **_as_it_is({COPY: lambda: target.copy_(source)})}
    failed: dict[str, str] = {}
    for name, (backend, call) in list(timed.items()):
        try:
            with backend():
                for _ in range(3 if on_gpu else 1):
                    clock(call)
        except Exception as error:
            if name not in case.baselines:
                raise
            failed[name] = f"{type(error).__name__}: {str(error).strip()[:200]}"
            del timed[name]
    times: Times = {name: [] for name in timed}
    for _ in range(case.repeats):
        for name, (backend, call) in timed.items():
            with backend():  # outside of what is timed
                times[name].append(clock(call))
    return times, failed


# A context to be in, and what is timed in it.
_Timed = dict[str, tuple[Callable[[], AbstractContextManager[object]], Callable[[], object]]]


def _as_it_is(calls: Calls) -> _Timed:
    return {name: (nullcontext, call) for name, call in calls.items()}


def _under_every_backend(calls: Calls) -> _Timed:
    """The first of ours, under every backend that the GPU has; the reference where it has none."""
    first = next(iter(calls.values()))
    here = [name for name in GPU_BACKENDS if _native.ABSENCES[name] is None]
    return {name: (partial(_native.use_backend, name), first) for name in here} or _as_it_is(calls)
