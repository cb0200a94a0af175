"""The roofline picture: how near ours come to what this machine's memory and arithmetic allow."""

from __future__ import annotations

import io
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vdu_fast.benchmarks.case import Line
from vdu_fast.checkpoint import write_bytes_atomic

SIDE, ROUNDS = 2048, 5


def peak_arithmetic(device: torch.device) -> float:
    """Float32 operations per second in a product of matrices, the most that this machine shows anywhere."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(ROUNDS + 1):  # the first is a warm-up
        start = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * SIDE**3 / best


def write_roofline(path: Path, lines: Iterable[Line], peak: float, title: str) -> bool:
    """Draw those lines that tell operations per byte, under both roofs; False, and no picture, where none does.

    Args:
        peak: operations per second, see `peak_arithmetic`.
        title: of the picture: what it was measured on.
    """
    points = [line for line in lines if line.get("operations_per_byte") is not None]
    if not points:
        return False
    from matplotlib.figure import Figure

    bandwidth = statistics.median(line["copy_gb_per_second"] for line in points)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    low = min(line["operations_per_byte"] for line in points) / 4
    high = max(*(line["operations_per_byte"] for line in points), peak / 1e9 / bandwidth) * 4
    knee = peak / 1e9 / bandwidth
    axes.plot([low, knee, high], [low * bandwidth, peak / 1e9, peak / 1e9], color="0.35", linewidth=2)
    middle = (low * knee) ** 0.5
    how: dict[str, Any] = {"textcoords": "offset points", "color": "0.35", "fontsize": 9}
    axes.annotate(f"copy, {bandwidth:.0f} GB/s", (middle, middle * bandwidth), (12, -16), **how)
    axes.annotate(f"product of matrices, {peak / 1e9:.0f} Gflop/s", (high, peak / 1e9), (-6, 7), ha="right", **how)
    for number, line in enumerate(points):
        x, y = line["operations_per_byte"], line["gigaoperations_per_second"]
        # That of its own rounds: the memory of a shared machine is not equally fast all day.
        roof = min(x * line["copy_gb_per_second"], peak / 1e9)
        axes.plot(
            x,
            y,
            "o",
            markersize=8,
            color=f"C{number % 10}",
            label=f"{line['question']}, {line['implementation']}: {y / roof:.0%} of its roof",
        )
        axes.plot([x, x], [y, roof], ":", color=f"C{number % 10}", linewidth=1)
    least = min(line["gigaoperations_per_second"] for line in points)
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(least / 3, peak / 1e9 * 2), title=title)
    axes.set_xlabel("operations per byte (as the reference needs them, integer ones among them)")
    axes.set_ylabel("billion operations per second")
    axes.grid(which="both", alpha=0.2)
    axes.legend(loc="lower right", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    write_bytes_atomic(path, buffer.getvalue())
    return True
