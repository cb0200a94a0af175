"""A profile as tables for the terminal, and as profile.json, profile.csv, profile.png and trace.json."""

from __future__ import annotations

import csv
import dataclasses
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdu_fast.checkpoint import write_bytes_atomic, write_json_atomic
from vdu_fast.profiling.measuring import STEP
from vdu_fast.profiling.record import Profile, duration, size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console

LABELS = {
    "data": "batch and noise",
    "weights": "weights drawn",
    "forward": "network forward",
    "loss": "losses",
    "backward": "network backward",
    "accumulate": "gradients collected",
    "update": "regularizer + update",
    "check": "check / check_every",
    STEP: "rest of the step",
    "bank": "replay bank",
    "filter": "filter of the bank",
    "start": "first measurements",
    "steps": "steps",
    "checks": "checks",
    "saves": "saves of the state",
}
# Okabe and Ito's colours, which people with any common colour vision tell apart.
_TIME, _MEMORY, _RUN = "#0072B2", "#CC79A7", "#009E73"
_INK, _FAINT = "#1D2530", "#5C6773"


def describe(profile: Profile) -> tuple[str, str]:
    """What was profiled, and on what: two lines."""
    settings, machine = profile.settings, profile.machine
    batch = f"{settings['batch_size']} forget images"
    if replayed := profile.samples - settings["batch_size"]:
        batch += f" + {replayed} replayed states"
    if profile.passes > 1:
        batch += f", {profile.passes} times"
    shape = " x ".join(map(str, profile.sample_shape))
    where = machine["device_name"] if machine["device"] == "cpu" else f"{machine['device_name']} ({machine['device']})"
    threads = f", {machine['threads']} of {machine['cores']} cores" if machine["device"] == "cpu" else ""
    return (
        f"{profile.parameters:,} parameters, pictures {shape}, batch {batch}",
        f"{where}{threads}, {settings['precision']}, backend {machine['backend']}, torch {machine['torch']}",
    )


def record(profile: Profile, advice: Sequence[str]) -> dict[str, Any]:
    """What profile.json holds: everything but the trace."""
    fields = dataclasses.asdict(profile)
    del fields["trace"]
    return fields | {"total": profile.total, "advice": list(advice)}


def save_profile(profile: Profile, folder: Path, advice: Sequence[str]) -> None:
    """Write profile.json, profile.csv, profile.png and trace.json into the folder, each atomically."""
    write_json_atomic(folder / "profile.json", record(profile, advice))
    write_bytes_atomic(folder / "profile.csv", _csv(profile).encode())
    draw(profile).savefig(picture := io.BytesIO(), format="png", facecolor="white")
    write_bytes_atomic(folder / "profile.png", picture.getvalue())
    write_bytes_atomic(folder / "trace.json", profile.trace)


def _csv(profile: Profile) -> str:
    """One row per phase of a step and per part of the run; seconds and bytes, empty where there is nothing to say."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["of", "name", "seconds", "low", "high", "share", "peak_bytes", "rise_bytes", "estimate", "basis"])
    for row in profile.phases:
        writer.writerow(["step", row.name, row.seconds, row.low, row.high, row.share, row.peak, row.rise, False, ""])
    for part in profile.parts:
        share = part.seconds / profile.total
        writer.writerow(["run", part.name, part.seconds, "", "", share, "", "", part.estimate, part.basis])
    return text.getvalue()


def print_profile(profile: Profile, advice: Sequence[str], console: Console) -> None:
    """The step, the run, the memory and the advice."""
    _say(console, "\n".join(describe(profile)) + "\n")
    _print_step(profile, console)
    _print_run(profile, console)
    held = ", ".join(f"{name} {size(count)}" for name, count in profile.held.items())
    _say(console, f"Held all the time: {held}.\nMemory of the phases: {profile.memory_from}.\n")
    for text in advice:
        _say(console, f"- {text}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, pad_edge=False, padding=(0, 3, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column in ("", "measured") else "right", no_wrap=column == "")
    return table


def _print_step(profile: Profile, console: Console) -> None:
    table = _table("One step", "", "time", "spread", "share", "memory", "at most")
    for row in profile.phases:
        memory = ["" if count is None else size(count) for count in (row.rise, row.peak)]
        spread = f"± {(row.high - row.low) / 2 / row.seconds:.0%}" if row.seconds > 0 else ""
        table.add_row(LABELS[row.name], duration(row.seconds), spread, f"{row.share:.1%}", *memory)
    console.print(table)
    _say(
        console,
        "Spread: half the distance of the quartiles. Memory: what the phase takes; at most: all that is taken while it "
        "runs.\nRegularizer, update and the next weights are one pass, and cannot be told apart.",
    )
    _say(
        console,
        f"A step without a check took {duration(profile.step)} while nobody recorded, the bare network "
        f"{duration(profile.network * profile.passes)}: unlearning adds {profile.overhead:.1%}.\n",
    )


def _print_run(profile: Profile, console: Console) -> None:
    table = _table("The whole run", "", "time", "share", "measured")
    for part in profile.parts:
        about = "about " if part.estimate else ""
        table.add_row(
            LABELS[part.name], about + duration(part.seconds), f"{part.seconds / profile.total:.1%}", part.basis
        )
    table.add_row("in all", f"about {duration(profile.total)}", "", "")
    console.print(table)
    _say(console, "Not in it: loading the model, compiling it, writing the new one.\n")


def draw(profile: Profile) -> Figure:
    """Bars: the phases of a step by time and by memory, and the parts of the run by time."""
    # No pyplot: its global state would leak between pictures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    heights = [len(profile.phases), len(profile.parts)]
    figure = Figure(figsize=(11, 2.6 + 0.36 * sum(heights)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=heights, width_ratios=[3, 2], hspace=0.1)
    figure.suptitle("\n".join(describe(profile)), fontsize=10, color=_INK, x=0.01, ha="left")
    times, memory, run = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[0, 1], grid[1, :]))
    phases = profile.phases
    seconds, labels = [row.seconds for row in phases], [LABELS[row.name] for row in phases]
    _bars(times, labels, seconds, _TIME, _with_shares([row.share for row in phases]))
    times.set_title(f"one step: {duration(sum(seconds))}", fontsize=10, loc="left")
    if any(row.peak is None for row in phases):
        memory.set_axis_off()
        memory.text(0, 0.5, f"memory: {profile.memory_from}", fontsize=9, color=_FAINT)
    else:
        _bars(memory, labels, [row.peak or 0 for row in phases], _MEMORY, lambda _, value: size(int(value)))
        memory.set_title("tensors at most, above those always held", fontsize=10, loc="left")
        memory.set_yticklabels([])
    shares = [part.seconds / profile.total for part in profile.parts]
    names = [LABELS[part.name] + (" (estimate)" if part.estimate else "") for part in profile.parts]
    _bars(run, names, [part.seconds for part in profile.parts], _RUN, _with_shares(shares))
    run.set_title(
        f"the whole run of {profile.settings['steps']} steps: about {duration(profile.total)}", fontsize=10, loc="left"
    )
    return figure


def _with_shares(shares: Sequence[float]) -> Callable[[int, float], str]:
    return lambda index, value: f"{duration(value)}, {shares[index]:.1%}"


def _bars(
    axes: Axes, labels: Sequence[str], values: Sequence[float], color: str, text: Callable[[int, float], str]
) -> None:
    """Horizontal bars from the top down, each with its figure at its end, which spares the axis its ticks."""
    places = range(len(values))
    bars = axes.barh(places, values, color=color, height=0.68)
    axes.bar_label(bars, [text(i, value) for i, value in enumerate(values)], padding=4, fontsize=9, color=_INK)
    axes.set_yticks(places, labels, fontsize=9)
    axes.invert_yaxis()
    # Room for the text behind the longest bar.
    axes.set_xlim(0, 1.35 * (max(values) or 1))
    axes.xaxis.set_visible(False)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.spines["left"].set_color("#C4CBD2")
    axes.tick_params(axis="y", length=0, colors=_INK)
