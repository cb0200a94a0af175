"""The table and the picture of a comparison, from the records of its runs."""

from __future__ import annotations

import csv
import io
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdu_fast.checkpoint import write_bytes_atomic
from vdu_fast.figures import AFTER, BEFORE, FAINT, FLOOR, INK, ORACLE, new_figure, png, tidy
from vdu_fast.persistence_report import (
    PERSISTENCE_MEASURES,
    describe_columns,
    draw_persistence,
    half_life_or_limit,
    of_persistence,
)
from vdu_fast.report import digits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

OURS = "ours"
# What a method is asked about; None where a run could not measure it.
MEASURES: dict[str, Callable[[Record], float | None]] = {
    "pul": lambda r: r["metrics"]["pul"],
    "u_fid": lambda r: r["metrics"]["u_fid"].get("after"),
    "u_fid_ratio": lambda r: _ratio(r["metrics"]["u_fid"]),
    "kid": lambda r: r["metrics"]["kid"].get("after"),
    "precision": lambda r: r["metrics"]["precision"].get("after"),
    "recall": lambda r: r["metrics"]["recall"].get("after"),
    "density": lambda r: r["metrics"]["density"].get("after"),
    "coverage": lambda r: r["metrics"]["coverage"].get("after"),
    "least_kept": lambda r: r["metrics"]["shares"].get("kept_ratio_min"),
    "forget_loss_ratio": lambda r: r["metrics"].get("forget_loss", {}).get("ratio"),
    "retained_loss_ratio": lambda r: r["metrics"].get("retained_loss", {}).get("ratio"),
    "half_life": lambda r: half_life_or_limit(r, "forget"),
    "half_life_unrelated": lambda r: half_life_or_limit(r, "unrelated"),
    "inversion": lambda r: of_persistence(r, "inversion", "after"),
    "membership": lambda r: of_persistence(r, "membership", "after", "worst"),
    "evaluations": lambda r: r["evaluations"],
    "seconds": lambda r: r["seconds"],
}
# What methods are tested on against ours, and how a value enters the difference.
TESTED: dict[str, Callable[[float], float]] = {"pul": float, "u_fid": lambda value: math.log(max(value, 1e-12))}
_NO_SPREAD = 1e-9
# What the original model, the oracle and real held-out images have of it.
REFERENCES = {"original model": "before", "oracle": "oracle", "real held-out": "floor"}


def heldout_pul(record: Record) -> float | None:
    """PUL of a model that draws held-out pictures of the other classes; None of a run from before it was measured."""
    return record["metrics"].get("pul_heldout")


def _ratio(u_fid: Mapping[str, float]) -> float | None:
    return u_fid["after"] / u_fid["oracle"] if u_fid.get("oracle") and "after" in u_fid else None


@dataclass(frozen=True)
class Mean:
    """Mean over runs and its standard error, None where one run has none."""

    value: float
    error: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean | None:
        """None of no values."""
        if not values:
            return None
        error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
        return cls(statistics.fmean(values), error)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        method, title, sees: of the method, or a reference's name and "".
        runs: how many are averaged.
        means: by measure; None where no run measured it.
        p_values: by tested measure, against ours, Holm-corrected; None where there is nothing to test.
    """

    method: str
    title: str
    sees: str
    runs: int
    means: Mapping[str, Mean | None]
    p_values: Mapping[str, float | None]


def summarize(records: Sequence[Record]) -> list[Row]:
    """One row per method in the order of the records, then one per reference."""
    by_method: dict[str, list[Record]] = {}
    for record in records:
        by_method.setdefault(record["method"], []).append(record)
    p_values = {measure: significance(by_method, measure) for measure in TESTED}
    rows = [
        Row(
            method,
            runs[0]["title"],
            runs[0]["sees"],
            len(runs),
            {measure: _mean(runs, read) for measure, read in MEASURES.items()},
            {measure: values.get(method) for measure, values in p_values.items()},
        )
        for method, runs in by_method.items()
    ]
    return rows + [_reference(title, side, records) for title, side in REFERENCES.items()]


def _mean(records: Sequence[Record], read: Callable[[Record], float | None]) -> Mean | None:
    return Mean.of([value for record in records if (value := read(record)) is not None])


def _reference(title: str, side: str, records: Sequence[Record]) -> Row:
    """A row of what the methods are held against, which is the same for all runs of a class."""
    one_per_class = list({record["label"]: record for record in records}.values())
    means = {
        name: Mean.of([r["metrics"][name][side] for r in one_per_class if side in r["metrics"][name]])
        for name in ("u_fid", "kid", "precision", "recall", "density", "coverage")
    }
    if side == "before":
        means["pul"] = Mean(0.0, None)
        means["inversion"] = _mean(one_per_class, lambda r: of_persistence(r, "inversion", "before"))
        means["membership"] = _mean(one_per_class, lambda r: of_persistence(r, "membership", "before", "worst"))
    if side == "floor":
        means["pul"] = _mean(one_per_class, heldout_pul)
    return Row(side, title, "", len(one_per_class), {name: means.get(name) for name in MEASURES}, {})


def significance(by_method: Mapping[str, Sequence[Record]], measure: str) -> dict[str, float]:
    """Holm-corrected p-values of two-sided paired t-tests of every method against ours.

    A pair is two runs of one class and seed; PUL enters as it is, u-FID by its logarithm. Methods with fewer than two
    pairs are left out.
    """
    from scipy.stats import ttest_1samp

    def values(method: str) -> dict[tuple[int, int], float]:
        read = MEASURES[measure]
        found = {(r["label"], r["seed"]): read(r) for r in by_method[method]}
        return {pair: TESTED[measure](value) for pair, value in found.items() if value is not None}

    if OURS not in by_method:
        return {}
    ours, raw = values(OURS), {}
    for method in by_method:
        theirs = values(method) if method != OURS else {}
        differences = [theirs[pair] - ours[pair] for pair in ours.keys() & theirs.keys()]
        if len(differences) < 2:
            continue
        if max(differences) - min(differences) < _NO_SPREAD:  # the statistic is 0 / 0, or infinite
            raw[method] = 1.0 if abs(differences[0]) < _NO_SPREAD else 0.0
        else:
            raw[method] = float(ttest_1samp(differences, 0.0).pvalue)
    return holm(raw)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down correction (1979) of p-values by name."""
    corrected, worst = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        worst = max(worst, min(1.0, (len(p_values) - rank) * p))
        corrected[name] = worst
    return corrected


def table_csv(rows: Sequence[Row]) -> str:
    """One line per row: means and standard errors of every measure, then p-values; empty where there is none."""
    names = [f"{measure}_{part}" for measure in MEASURES for part in ("mean", "standard_error")]
    header = ["method", "title", "sees", "runs", *names, *(f"p_{measure}" for measure in TESTED)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row in rows:
        means = [row.means[measure] for measure in MEASURES]
        cells = [part for mean in means for part in ((None, None) if mean is None else (mean.value, mean.error))]
        p_values = [row.p_values.get(measure) for measure in TESTED]
        numbers = ["" if value is None else f"{value:.6g}" for value in (*cells, *p_values)]
        writer.writerow([row.method, row.title, row.sees, row.runs, *numbers])
    return text.getvalue()


# Heading, and the format of a mean and of its error, which follows the size of the mean.
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "pul": ("PUL", lambda mean: ".1f"),
    "u_fid": ("u-FID", lambda mean: ".1f" if mean >= 10 else ".2f"),
    "u_fid_ratio": ("u-FID / oracle", lambda mean: ".1f" if mean >= 10 else ".2f"),
    "kid": ("KID", lambda mean: ".1f" if mean >= 10 else ".3f"),
    "recall": ("recall", lambda mean: ".2f"),
    "least_kept": ("least kept", lambda mean: ".0%"),
    "forget_loss_ratio": ("forget loss x", lambda mean: ".1f" if mean >= 10 else ".2f"),
    "retained_loss_ratio": ("retained loss x", lambda mean: ".1f" if mean >= 10 else ".2f"),
    "half_life": ("half back after", lambda mean: ".0f"),
    "half_life_unrelated": ("by itself after", lambda mean: ".0f"),
    "inversion": ("from its noise", lambda mean: ".0%"),
    "membership": ("membership", lambda mean: ".2f"),
    "evaluations": ("evaluations", lambda mean: ",.0f"),
    "seconds": ("seconds", lambda mean: ".0f"),
}


def table_markdown(rows: Sequence[Row], records: Sequence[Record]) -> str:
    """The table for people, with what it was measured on above it and what its columns mean below."""
    metrics = records[0]["metrics"]
    classes = dict.fromkeys(str(record["class"]) for record in records)
    seeds = {record["seed"] for record in records}
    head = (
        f"Classes {', '.join(classes)}; {len(seeds)} seed{'s' if len(seeds) > 1 else ''}; "
        f"{metrics['counts']['samples']:,} samples of {metrics['sampler']['steps']} steps of "
        f"{metrics['sampler']['name']}, seed {metrics['sampler']['seed']}. Mean ± standard error over classes and "
        "seeds."
    )
    asked = of_persistence(records[0]) is not None
    columns = {name: column for name, column in _COLUMNS.items() if asked or name not in PERSISTENCE_MEASURES}
    names = ["method", "sees", *(title for title, _ in columns.values()), "p (PUL)", "p (u-FID)"]
    lines = [head, "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [_cell(row.means[measure], form) for measure, (_, form) in columns.items()]
        p_values = ["" if (p := row.p_values.get(m)) is None else f"{p:.2g}" for m in TESTED]
        title = f"**{row.title}**" if row.method == OURS else row.title
        lines.append(f"| {' | '.join([title, row.sees, *cells, *p_values])} |")
    legend = [_LEGEND, "", describe_columns(records[0])] if asked else [_LEGEND]
    if len({row.runs for row in rows if row.sees}) > 1:
        runs = ", ".join(f"{row.title} {row.runs}" for row in rows if row.sees)
        legend = [
            f"**Not all have as many runs, so that means are over unlike classes or seeds.** Runs: {runs}.",
            "",
            *legend,
        ]
    return "\n".join([*lines, "", *legend, ""])


_LEGEND = (
    "PUL: share of the forgotten class that is no longer drawn, in percent. u-FID and KID: distance of all samples "
    "from real images without the class (lower is better); recall: share of those images that something drawn is like. "
    "Least kept: share of the samples in the class that kept least of it, after / before. Losses: after / before, on "
    "held-out images. Evaluations: images through the network for unlearning, three where they also pass backward. p: "
    "paired t-test against ours over classes and seeds, Holm-corrected; u-FID by its logarithm. Runs of one class "
    "share model and data, so that they are not independent."
)


def _cell(mean: Mean | None, form: Callable[[float], str]) -> str:
    if mean is None:
        return ""
    value = format(mean.value, form(mean.value))
    return value if mean.error is None else f"{value} ± {format(mean.error, form(mean.value))}"


def write_comparison(output: Path, records: Sequence[Record]) -> list[Row]:
    """Write table.csv, table.md and tradeoff.png, and persistence.png where it was asked for, each atomically.

    Returns:
        The rows of the table.
    """
    rows = summarize(records)
    write_bytes_atomic(output / "table.csv", table_csv(rows).encode())
    write_bytes_atomic(output / "table.md", table_markdown(rows, records).encode())
    write_bytes_atomic(output / "tradeoff.png", png(draw_methods(rows)))
    if of_persistence(records[0]) is not None:
        write_bytes_atomic(output / "persistence.png", png(draw_persistence(records, _styles(rows))))
    else:
        # One left by an earlier comparison would be read as this one's.
        (output / "persistence.png").unlink(missing_ok=True)
    return rows


# Beside the colour the shape tells methods apart, for print and for those who see few colours.
_STYLES = (
    ("s", "#E69F00"), ("D", "#D55E00"), ("v", "#56B4E9"), ("^", "#CC79A7"), ("<", "#8C6D1F"), (">", "#7B4FA3"),
    ("P", "#4D4D4D"), ("X", "#A6761D"), ("h", "#1B9E77"), ("d", "#666666"),
)  # fmt: skip
_LINES = (
    ("before", "original model", BEFORE, ":"),
    ("oracle", "oracle", ORACLE, "--"),
    ("floor", "real held-out", FLOOR, "-."),
)


def draw_methods(rows: Sequence[Row]) -> Figure:
    """PUL against u-FID on a logarithmic axis, a point per method with standard errors; the lower right is best."""
    figure = new_figure(9.2, 5.0, layout="constrained")
    axes = figure.add_subplot()
    methods = [row for row in rows if row.sees and row.means["pul"] and row.means["u_fid"]]
    styles = _styles(rows)
    for row in methods:
        _draw_method(axes, row, styles[row.method])
    named = {row.method: row for row in rows}
    for side, title, colour, dashes in _LINES:
        if (mean := named[side].means["u_fid"]) is not None:
            label = f"{title}: u-FID {digits(mean.value)}"
            axes.axhline(mean.value, color=colour, linestyle=dashes, linewidth=1.4, label=label, zorder=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    lowest = min([pul.value for row in methods if (pul := row.means["pul"]) is not None], default=0.0)
    axes.set_xlim(min(lowest - 6, 80), 102)
    axes.set_xlabel("PUL: forgotten, % (right is better)", color=FAINT)
    axes.set_ylabel("u-FID (lower is better)", color=FAINT)
    tidy(axes, "both")
    title = "filled: saw no retained data\nhollow: saw retained data"
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title=title, title_fontsize=9, alignment="left")
    figure.suptitle("Forgetting against quality", x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
    return figure


def styles_of(methods: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Marker and colour of every method, the same in all pictures of these."""
    styles = dict(zip(methods, itertools.cycle(_STYLES)))
    return {name: {OURS: ("*", AFTER), "retrain": ("o", INK)}.get(name, style) for name, style in styles.items()}


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    return styles_of(row.method for row in rows if row.sees)


def _draw_method(axes: Axes, row: Row, style: tuple[str, str]) -> None:
    pul, u_fid = row.means["pul"], row.means["u_fid"]
    assert pul is not None
    assert u_fid is not None
    marker, colour = style
    # Ours is large, and behind those that come as close.
    size, order = (18.0, 3) if row.method == OURS else (7.0, 4)
    axes.errorbar(
        pul.value, u_fid.value, xerr=pul.error, yerr=u_fid.error, fmt=marker, color=colour, markersize=size,
        markerfacecolor="none" if "retained" in row.sees else colour, markeredgewidth=1.5, elinewidth=1.0, capsize=2,
        zorder=order, label=f"{row.title}: PUL {pul.value:.1f}, u-FID {digits(u_fid.value)}",
    )  # fmt: skip
