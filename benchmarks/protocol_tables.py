"""Tables and pictures of a protocol that a comparison has none of: ours by class, the studies, and every run."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from vdu_fast.comparison_report import MEASURES, Mean, heldout_pul
from vdu_fast.figures import AFTER, FAINT, INK, ORACLE, new_figure, png, tidy

Record = Mapping[str, Any]

PUL, RATIO, KEPT = (MEASURES[name] for name in ("pul", "u_fid_ratio", "least_kept"))
TARGETS = "Targets: PUL at least 99 and u-FID at most 1.25 times the oracle's, as means over all classes."


def cell(records: Iterable[Record], read: Callable[[Record], float | None], form: str) -> str:
    """Mean ± standard error of what is read of the records."""
    return _cell([read(record) for record in records], form)


def _cell(values: Iterable[float | None], form: str) -> str:
    mean = Mean.of([value for value in values if value is not None])
    return "" if mean is None else _plus_minus(mean, form)


def _plus_minus(mean: Mean, form: str) -> str:
    return f"{mean.value:{form}}" if mean.error is None else f"{mean.value:{form}} ± {mean.error:{form}}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def classes_markdown(records: Sequence[Record], planned: int | None = None) -> str:
    """Ours on each class, means and standard errors over the seeds, and over the classes of their means.

    Args:
        records: at least one.
        planned: runs that there will be in all; None is as many as there are.
    """
    by_class: dict[str, list[Record]] = {}
    for record in sorted(records, key=lambda record: record["label"]):
        by_class.setdefault(record["class"], []).append(record)
    rows = []
    for name, runs in by_class.items():
        metrics = runs[0]["metrics"]
        worst = min(runs, key=lambda run: run["metrics"]["shares"]["kept_ratio_min"])["metrics"]["shares"]
        after = statistics.fmean(run["metrics"]["counts"]["forgotten_after"] for run in runs)
        rows.append(
            [
                name,
                f"{metrics['counts']['forgotten_before']}, {after:.1f}",
                cell(runs, PUL, ".1f"),
                cell(runs[:1], heldout_pul, ".1f"),
                f"{metrics['u_fid']['before']:.2f}",
                cell(runs, MEASURES["u_fid"], ".2f"),
                f"{metrics['u_fid']['oracle']:.2f}",
                cell(runs, RATIO, ".2f"),
                f"{worst['kept_ratio_min']:.0%} ({worst['kept_ratio_min_class']})",
            ]
        )
    # Of the classes, not of the runs: those of one class share its data.
    puls, ratios = (
        Mean.of(
            [statistics.fmean(value for run in runs if (value := read(run)) is not None) for runs in by_class.values()]
        )
        for read in (PUL, RATIO)
    )
    assert puls is not None
    assert ratios is not None
    least = min(KEPT(record) or 0.0 for record in records)
    rows.append(
        [
            "**mean**",
            "",
            f"**{_plus_minus(puls, '.1f')}**",
            cell([runs[0] for runs in by_class.values()], heldout_pul, ".1f"),
            "",
            "",
            "",
            f"**{_plus_minus(ratios, '.2f')}**",
            f"lowest {least:.0%}",
        ]
    )
    head = [
        "forget", "drawn before, after", "PUL", "real others", "u-FID before", "u-FID after", "oracle",
        "after / oracle", "least kept",
    ]  # fmt: skip
    seeds = len({record["seed"] for record in records})
    counts, sampler = records[0]["metrics"]["counts"], records[0]["metrics"]["sampler"]
    return "\n".join(
        [
            f"{seeds} seeds of each class; {counts['samples']:,} samples of {sampler['steps']} steps of "
            f"{sampler['name']}, seed {sampler['seed']}. Mean ± standard error, over seeds in a line and over classes "
            "in the last one; real others: the PUL of held-out pictures of the other classes, by the classifier's "
            "mistakes; least kept: the worst seed.",
            "",
            table(head, rows),
            "",
            f"{TARGETS} "
            + (
                f"Met: PUL {'yes' if puls.value >= 99 else 'NO'}, u-FID {'yes' if ratios.value <= 1.25 else 'NO'}."
                if planned is None or len(records) == planned
                else f"Not all have run yet: {len(records)} of {planned} runs."
            ),
            "",
        ]
    )


_POSTERIORS = (
    " Posteriors of 2 to 30 checkpoints are of one further training run of the same recipe, and the Fisher one is of "
    "its last model."
)


def studies_markdown(studies: Mapping[str, Sequence[Record]], sequences: Sequence[Mapping[str, Any]]) -> str:
    """What changes with settings, number of forget images and posterior, and over requests in turn."""
    names = list(dict.fromkeys(record["class"] for runs in studies.values() for record in runs))
    rows = [
        [
            name,
            str(len(runs)),
            cell(runs, PUL, ".1f"),
            f"{min(PUL(run) or 0.0 for run in runs):.1f}",
            cell(runs, RATIO, ".2f"),
            cell(runs, KEPT, ".0%"),
        ]
        for name, runs in studies.items()
    ]
    head = ["ours with", "runs", "PUL", "lowest PUL", "u-FID / oracle", "least kept"]
    parts = [
        f"Classes {', '.join(names)}; mean ± standard error over classes and seeds."
        + (_POSTERIORS if any("checkpoint" in name for name in studies) else ""),
        "",
        table(head, rows),
        "",
    ]
    if sequences:
        parts += [_sequence_text(sequences), ""]
    return "\n".join(parts)


def _sequence_text(sequences: Sequence[Mapping[str, Any]]) -> str:
    names = sequences[0]["classes"]
    by_way: dict[str, list[list[Mapping[str, Any]]]] = {}
    for sequence in sequences:
        by_way.setdefault(sequence["way"], []).append(sequence["requests"])
    passed_on, new_banks = by_way.get("passed-on", []), by_way.get("new-banks", [])
    lines = [(f"forget {names[0]}", [requests[0] for requests in passed_on or new_banks])]
    for title, runs in (("bank passed on", passed_on), ("a new bank", new_banks)):
        lines += [(f"forget {names[i]}, {title}", [run[i] for run in runs]) for i in range(1, len(names))]
    lines.append(("all at once", [requests[0] for requests in by_way.get("at-once", [])]))
    rows = [
        [
            title,
            *(_cell([request["pul"].get(name) for request in requests], ".1f") for name in names),
            _cell([request["u_fid"] / request["oracle"] for request in requests], ".2f"),
            str(len(requests)),
        ]
        for title, requests in lines
        if requests
    ]
    head = ["request", *(f"PUL of {name}" for name in names), "u-FID / oracle", "seeds"]
    return (
        "Requests in turn, each on the model that the last one left, with the bank that it passed on "
        "(`--pass_on_bank`) or with one drawn anew; and all at once from the original model, in as many steps "
        f"together; mean ± standard error over the seeds:\n\n{table(head, rows)}"
    )


def studies_png(studies: Mapping[str, Sequence[Record]]) -> bytes:
    """PUL, and u-FID in units of the oracle's, of every study with standard errors."""
    figure = new_figure(9.2, 0.36 * len(studies) + 1.2, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    names, heights = list(studies), range(len(studies))[::-1]
    for axes, read, title, line in ((left, PUL, "PUL, %", None), (right, RATIO, "u-FID / oracle", 1.0)):
        means = [Mean.of([v for run in studies[name] if (v := read(run)) is not None]) for name in names]
        for height, mean in zip(heights, means, strict=True):
            if mean is not None:
                axes.errorbar(mean.value, height, xerr=mean.error, fmt="o", color=AFTER, capsize=2)
        if line is not None:
            axes.axvline(line, color=ORACLE, linestyle="--", linewidth=1.4)
        axes.set_xlabel(title, color=FAINT)
        tidy(axes, "x")
    left.set_yticks(list(heights), names)
    figure.suptitle("Ours, and with one thing changed", x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
    return png(figure)


def runs_csv(runs: Sequence[tuple[str, Record]]) -> str:
    """A row for every run: what was changed, what ran, and all measures of the comparison."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ["study", "method", "class", "seed", "forget_images"]
    writer.writerow([*names, *MEASURES, "device", "threads", "vdu_fast", "torch", "key"])
    for study, record in runs:
        values = [read(record) for read in MEASURES.values()]
        numbers = ["" if value is None else f"{value:.6g}" for value in values]
        what = [study, record["method"], record["class"], record["seed"], record["forget_images"]]
        versions = [record["versions"].get(name, "") for name in ("vdu_fast", "torch")]
        writer.writerow([*what, *numbers, record["device"], record["threads"], *versions, record["key"]])
    return text.getvalue()
