"""Which of the measured settings to take."""

from __future__ import annotations

from collections.abc import Sequence

from vdu_fast.sweeping.grid import Point


def choose(points: Sequence[Point], least_forgotten: float) -> tuple[Point, bool]:
    """The point that keeps most among those that forget enough, and whether there is one.

    Where none forgets enough it is the one that forgets most. What the measurements cannot tell apart is decided by the
    smaller distance, then by the fewer steps.

    Args:
        points: at least one.
        least_forgotten: estimated PUL in percent.
    """
    enough = [point for point in points if point.pul >= least_forgotten]
    if enough:
        return min(enough, key=lambda point: (point.ratio, point.steps)), True
    return min(points, key=lambda point: (-point.pul, point.ratio, point.steps)), False


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points of which no other forgets as much and keeps more, by rising PUL."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.pul, point.ratio)):
        if not best or point.ratio < best[-1].ratio:
            best.append(point)
    return best[::-1]
