"""A Chrome trace of some work by torch.profiler, and the memory of its phases read off that trace."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.profiler import profile, supported_activities

from vdu_fast.phases import PREFIX, PhaseCost

logger = logging.getLogger(__name__)


def chrome_trace(work: Callable[[], object]) -> bytes:
    """Run `work` under torch.profiler; returns the JSON that chrome://tracing and ui.perfetto.dev show."""
    with _native_messages_logged(), profile(activities=supported_activities(), profile_memory=True) as profiler:
        work()
    # torch writes traces to a file and nowhere else.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_bytes()


@contextmanager
def _native_messages_logged() -> Iterator[None]:
    """The profiler's C++ tells stderr when it starts and what it cannot know; neither is for our users."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as caught:
        stderr = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            caught.seek(0)
            logger.debug("torch.profiler: %s", caught.read().decode(errors="replace"))


def memory_of_phases(trace: bytes, outermost: str) -> dict[str, PhaseCost]:
    """`peak` and `rise` of every phase, from the trace's records of the CPU's allocations of tensors.

    Args:
        trace: as `chrome_trace` gives it, of a recorded run.
        outermost: the phase that holds the others; what was allocated when it began counts as nothing.

    Returns:
        By phase; seconds stay 0, because a profiled run is slower than one that is not.
    """
    costs: dict[str, PhaseCost] = {}
    open_phases: list[str] = []
    total = ground = since = 0
    for kind, value in _marks_and_totals(json.loads(trace)["traceEvents"]):
        if kind == "enter":
            ground = total if value == outermost else ground
            open_phases.append(value)
        elif kind == "leave":
            open_phases.pop()
        else:
            total = value
        if kind != "total":
            since = total
        if open_phases:
            cost = costs.setdefault(open_phases[-1], PhaseCost(peak=0, rise=0))
            cost.peak, cost.rise = max(cost.peak or 0, total - ground), max(cost.rise or 0, total - since)
    return costs


def _marks_and_totals(events: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """("enter", phase), ("leave", phase) and ("total", bytes allocated on the CPU) in the order of time."""
    found: list[tuple[float, int, str, Any]] = []
    before: list[tuple[float, int]] = []
    for event in events:
        name = event.get("name", "")
        if name.startswith(PREFIX) and event.get("cat") == "user_annotation":
            began, lasted = event["ts"], event["dur"]
            # Of marks at one time the longer phase is the outer one: entered first, left last.
            found.append((began, -lasted, "enter", name.removeprefix(PREFIX)))
            found.append((began + lasted, lasted, "leave", name.removeprefix(PREFIX)))
        elif name == "[memory]" and event["args"]["Device Type"] == 0:
            args = event["args"]
            found.append((event["ts"], 0, "total", args["Total Allocated"]))
            before.append((event["ts"], args["Total Allocated"] - args["Bytes"]))
    marks = [(kind, value) for _, _, kind, value in sorted(found, key=lambda mark: mark[:2])]
    # The totals are the process's: what was allocated before the trace is in them.
    return [("total", min(before)[1]), *marks] if before else marks
