"""What a sweep leaves for people and for `unlearn`: a table, a picture, and the settings it chose."""

from __future__ import annotations

import csv
import io
import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdu_fast.checkpoint import write_bytes_atomic, write_json_atomic
from vdu_fast.config import UnlearnConfig
from vdu_fast.figures import AFTER, FAINT, FLOOR, FORGOTTEN, INK, ORACLE, new_figure, png, tidy
from vdu_fast.report import plain, software_versions
from vdu_fast.sweeping.choice import frontier
from vdu_fast.sweeping.grid import SWEPT, Point, SweepConfig
from vdu_fast.sweeping.sweeper import SweepResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILES = ("sweep.csv", "sweep.json", "curve.png", "settings.yaml")
# Beside the colour the shape tells the lines apart.
_STYLES = (("o", AFTER), ("s", "#E69F00"), ("^", ORACLE), ("D", FLOOR), ("v", "#56B4E9"), ("P", "#7B4FA3"))


def write_sweep(output: Path, result: SweepResult, grid: SweepConfig) -> None:
    """Write sweep.csv, sweep.json, curve.png and settings.yaml, each atomically."""
    write_bytes_atomic(output / "sweep.csv", table_csv(result).encode())
    record = {
        "chosen": asdict(result.chosen),
        "reached": result.reached,
        "bank": str(result.bank),
        "grid": asdict(grid),
        "settings": asdict(result.config),
        "points": [asdict(point) for point in result.points],
        "failed": result.failed,
        "versions": software_versions(),
    }
    write_json_atomic(output / "sweep.json", plain(record))
    write_bytes_atomic(output / "curve.png", png(draw_curve(result, grid)))
    write_bytes_atomic(output / "settings.yaml", settings_yaml(result).encode())


def table_csv(result: SweepResult) -> str:
    """One line per measurement, with a last column that marks the chosen one."""
    text = io.StringIO()
    names = [field.name for field in fields(Point)]
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*names, "chosen"])
    for point in result.points:
        values = [getattr(point, name) for name in names]
        cells = [f"{value:.6g}" if isinstance(value, float) else value for value in values]
        writer.writerow([*cells, int(point == result.chosen)])
    return text.getvalue()


def settings_yaml(result: SweepResult) -> str:
    """What `vdu-fast unlearn --config` takes: the settings that were chosen, and those given that are no defaults."""
    chosen, default = asdict(result.config), asdict(UnlearnConfig())
    values = {name: chosen[name] for name in SWEPT}
    values |= {name: value for name, value in chosen.items() if name not in SWEPT and value != default[name]}
    head = (
        f"# Found by vdu-fast sweep: estimated PUL {result.chosen.pul:.1f}, kept distance {result.chosen.ratio:.2f} x "
        "that of the original model's own samples.\n"
    )
    return head + "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def unlearn_command(files: dict[str, str | int | None], output: Path, result: SweepResult) -> str:
    """The command that unlearns with the chosen settings; `files` are flags of `vdu-fast unlearn` and their values."""
    words = ["vdu-fast", "unlearn", "--config", str(output / "settings.yaml")]
    for name, value in (files | {"bank": str(result.bank)}).items():
        words += [] if value is None else [f"--{name}", str(value)]
    return f"{shlex.join(words)} --output DIR"


def draw_curve(result: SweepResult, grid: SweepConfig) -> Figure:
    """Estimated PUL against the kept distance; for each lambda a line along what its other settings do best."""
    figure = new_figure(8.4, 4.8, layout="constrained")
    axes = figure.add_subplot()
    for number, weight in enumerate(sorted({point.replay_weight for point in result.points})):
        points = [point for point in result.points if point.replay_weight == weight]
        _draw_line(axes, points, f"lambda {weight:g}", *_STYLES[number % len(_STYLES)])
    axes.axhline(1.0, color=FAINT, linestyle="--", linewidth=1.2, label="original's own kept samples", zorder=1)
    axes.axvline(
        grid.least_forgotten, color=FORGOTTEN, linestyle=":", linewidth=1.4, zorder=1,
        label=f"asked for: at least {grid.least_forgotten:g}",
    )  # fmt: skip
    best = result.chosen
    axes.plot(
        best.pul, best.ratio, marker="o", markersize=17, markerfacecolor="none", markeredgecolor=INK,
        markeredgewidth=1.8, linestyle="none", zorder=5,
        label="chosen: " + textwrap.fill(f"{best.setting.describe()}; {best.steps} steps", 30),
    )  # fmt: skip
    axes.set_yscale("log")
    ratios = [point.ratio for point in result.points]
    crowded = max(ratios) > 5 * min(ratios)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_minor_formatter(lambda value, _: "" if crowded else f"{value:g}")
    axes.set_xlabel("estimated PUL: forgotten, % (right is better)", color=FAINT)
    axes.set_ylabel("kept distance, x the original's own (lower is better)", color=FAINT)
    tidy(axes, "both")
    axes.tick_params(which="minor", colors=FAINT, labelsize=9)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.8)
    figure.suptitle(
        "What each setting forgot, and what it cost", x=0.01, ha="left", fontsize=11, weight="bold", color=INK
    )
    return figure


def _draw_line(axes: Axes, points: Sequence[Point], label: str, marker: str, colour: str) -> None:
    best = frontier(points)
    rest = [point for point in points if point not in best]
    how: dict[str, Any] = {"marker": marker, "color": colour, "markersize": 6.5}
    axes.plot([p.pul for p in rest], [p.ratio for p in rest], linestyle="none", alpha=0.35, zorder=2, **how)
    axes.plot([p.pul for p in best], [p.ratio for p in best], linewidth=1.6, label=label, zorder=3, **how)
