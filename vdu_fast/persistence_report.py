"""What became of the questions of `persistence`, in tables, in words and as a picture, from records in JSON's types."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vdu_fast.figures import BEFORE, FAINT, INK, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

# Of the measures of a comparison, those that are empty where it was made without persistence.
PERSISTENCE_MEASURES = ("half_life", "half_life_unrelated", "inversion", "membership")
# Relearning on images of a class can end with nothing else being drawn, which would flatten the curves to compare.
_MOST_SHOWN = 1.5


def of_persistence(record: Record, *path: str) -> Any:
    """A value of a run's persistence by the names that lead to it; None where it was not measured."""
    value = record.get("persistence")
    for name in path:
        value = value.get(name) if value is not None else None
    return value


def half_life_or_limit(record: Record, kind: str) -> float | None:
    """Steps until half is back, or all the steps that were made where it is not: the mean is then a lower bound."""
    relearning = of_persistence(record, "relearning")
    if relearning is None:
        return None
    life = relearning[kind]["half_life"]
    return relearning["steps"][-1] if life is None else life


def describe_columns(record: Record) -> str:
    """What the columns of `PERSISTENCE_MEASURES` mean, with the settings that this run was measured under."""
    relearning, settings = of_persistence(record, "relearning"), of_persistence(record, "settings")
    steps, membership = relearning["steps"][-1], of_persistence(record, "membership")
    chance = f" Chance alone moves an AUC by {membership['spread']:.2f}, and the furthest more." if membership else ""
    return (
        f"Half back after: steps of Adam ({settings['relearn_learning_rate']:g}) on {relearning['forget']['images']} "
        f"images of the class until half of the original count is back in {relearning['samples']} samples; by itself "
        f"after: the same on {relearning['unrelated']['images']} images of other classes; {steps} stands for that many "
        "or more. From its noise: share of the class's images that the model draws from the noise that the original "
        "model's sampler, run backwards, leads to. Membership: AUC of the prediction error between training and "
        f"held-out images of the class, the furthest from 0.5 over {settings['membership_timesteps']} timesteps."
        f"{chance}"
    )


def persistence_rows(found: Mapping[str, Any] | None) -> Iterator[tuple[str, str, str]]:
    """What `measure_persistence` found, as measure, value and what is beside it."""
    if found is None:
        return
    relearning, shares = found["relearning"], found["inversion"]
    of = f"of {relearning['before']} in {relearning['samples']} samples"
    for kind, title in (("forget", "half is back"), ("unrelated", "by itself")):
        life, counts = relearning[kind]["half_life"], relearning[kind]["counts"]
        when = f"after {life:.0f} steps" if life is not None else f"not in {relearning['steps'][-1]} steps"
        row = f"{counts[0]} -> {counts[-1]} {of}, trained on with {relearning[kind]['images']} {kind} images"
        yield title, when, row
    yield "drawn from its noise", f"{shares['after']:.0%}", f"original model {shares['before']:.0%}"
    if "membership" in found:
        before, after = (found["membership"][side]["worst"] for side in ("before", "after"))
        yield "membership, worst AUC", f"{after:.2f}", f"original model {before:.2f}, 0.5 tells nothing"


def draw_persistence(records: Sequence[Record], styles: Mapping[str, tuple[str, str]]) -> Figure:
    """How much of the original count is drawn after training on with images of the class, and with others.

    A line per method, the mean over those of its runs that were asked. The steps that were counted at are evenly
    spaced on the axis.

    Args:
        records: of a comparison with persistence.
        styles: marker and colour by method.
    """
    figure = new_figure(10.4, 4.4, layout="constrained")
    panels = {"forget": "trained on with images of the class", "unrelated": "trained on with images of other classes"}
    for axes, (kind, title) in zip(figure.subplots(1, 2, sharey=True), panels.items(), strict=True):
        for method, style in styles.items():
            asked = (record for record in records if of_persistence(record) is not None)
            runs = [record for record in asked if record["method"] == method]
            if runs:
                _draw_curve(axes, runs, kind, style)
        axes.axhline(0.5, color=BEFORE, linestyle=":", linewidth=1.4, zorder=1)
        axes.text(1.0, 0.51, "half", color=FAINT, fontsize=9, ha="right", transform=axes.get_yaxis_transform())
        axes.set_ylim(-0.04, _MOST_SHOWN)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlabel("steps", color=FAINT)
        axes.set_title(title, fontsize=10, loc="left", color=FAINT)
        tidy(axes, "both")
    figure.axes[0].set_ylabel("samples of the class, original model = 100%", color=FAINT)
    handles, titles = figure.axes[0].get_legend_handles_labels()
    note = "filled: saw no retained data\nhollow: saw retained data"
    look: dict[str, Any] = {"frameon": False, "fontsize": 9, "title_fontsize": 9, "alignment": "left"}
    figure.legend(handles, titles, loc="outside right upper", title=note, **look)
    figure.suptitle("Does it stay forgotten?", x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
    return figure


def _draw_curve(axes: Axes, runs: Sequence[Record], kind: str, style: tuple[str, str]) -> None:
    found = [of_persistence(run, "relearning") for run in runs]
    shares = zip(*([count / f["before"] for count in f[kind]["counts"]] for f in found), strict=True)
    (marker, colour), steps = style, found[0]["steps"]
    axes.plot(
        range(len(steps)), [statistics.fmean(share) for share in shares], label=runs[0]["title"],
        color=colour, linewidth=1.5, marker=marker, markersize=13 if marker == "*" else 6,
        markerfacecolor="none" if "retained" in runs[0]["sees"] else colour,
    )  # fmt: skip
    axes.set_xticks(range(len(steps)), [str(step) for step in steps])
