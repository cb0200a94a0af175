"""The numbers of an evaluation as metrics.json, four pictures, a page for people, and a table for the terminal."""

from __future__ import annotations

import base64
import dataclasses
import importlib.metadata
import math
import platform
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from vdu_fast.checkpoint import write_bytes_atomic, write_json_atomic
from vdu_fast.evaluation import Evaluation
from vdu_fast.figures import AFTER, BEFORE, FAINT, FLOOR, FORGOTTEN, INK, ORACLE, new_figure, png, tidy
from vdu_fast.persistence_report import persistence_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

# What the verdict calls good. They are goals, not properties of the method, and the page says so.
GOOD_PUL = 95.0
GOOD_U_FID = 1.5  # times the oracle's
GOOD_KEPT = 0.6  # of its share, for the class that kept least

_PAIRS_PER_ROW, _CELL, _FRAME = 8, 56, 4
_MOST_FORGOTTEN, _MOST_OTHERS = 24, 40


def write_report(
    output: Path,
    *,
    evaluation: Evaluation,
    settings: Mapping[str, Any],
    seed: int,
    seconds: Mapping[str, float],
    history: Sequence[Mapping[str, Any]] | None = None,
    versions: Mapping[str, str] | None = None,
    title: str = "Unlearning report",
) -> dict[str, Any]:
    """Writes metrics.json, samples.png, shares.png, losses.png, tradeoff.png and report.html, each atomically.

    Args:
        output: folder, created when missing.
        settings: of the unlearning run; nested dictionaries and dataclasses are fine.
        seed: of the unlearning run (that of the evaluation's samples is in its metrics).
        seconds: wall-clock times; `unlearn` (with its bank and filter) and `total` have a place on the page.
        history: one dictionary per step, with `step` and any of `loss`, `forget_ratio`, `forget_loss`, `penalty` and
            `replay_loss`. Without it there is no losses.png, and the page says why.
        versions: of the software; None looks them up.
        title: heading of the page.

    Returns:
        What metrics.json holds.
    """
    metrics: dict[str, Any] = plain(evaluation.metrics)
    metrics["seconds"], metrics["settings"], metrics["seed"] = plain(seconds), plain(settings), seed
    metrics["versions"] = dict(versions) if versions is not None else software_versions()
    figures = {
        "samples": draw_samples(evaluation),
        "shares": draw_shares(metrics),
        "tradeoff": draw_tradeoff(metrics),
        "losses": draw_losses(history or ()),
    }
    if figures["losses"] is None:
        metrics["omitted"]["losses.png"] = "no training history was given"
        # One left by an earlier run would be read as this run's.
        (output / "losses.png").unlink(missing_ok=True)
    pictures = {name: png(figure) for name, figure in figures.items() if figure is not None}
    for name, data in pictures.items():
        write_bytes_atomic(output / f"{name}.png", data)
    write_bytes_atomic(output / "report.html", render_html(metrics, pictures, title).encode())
    write_json_atomic(output / "metrics.json", metrics)
    return metrics


def plain(value: Any) -> Any:
    """The value in JSON's types: containers copied, paths and unknown objects as text, infinity and NaN as text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain({field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return plain(value.value)
    if isinstance(value, Tensor | np.generic | np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def digits(value: float) -> str:
    """A distance as text. Its scale is the classifier's own, so the decimals follow its size."""
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}" if abs(value) >= 0.1 else f"{value:.3g}"


def software_versions() -> dict[str, str]:
    """Versions of what the numbers depend on; packages that are not installed are left out."""
    versions = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("vdu_fast", "torch", "diffusers", "torchmetrics", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


# Pictures


def _thumbnails(images: Tensor) -> np.ndarray:
    """uint8 [N, h, w, 3] of about 56 pixels a side: whole-number enlargement, or averaging for larger images."""
    images = images if images.shape[1] == 3 else images[:, :1].expand(-1, 3, -1, -1)
    size = max(images.shape[2:])
    if size <= _CELL:
        scale = round(_CELL / size)
        images = images.repeat_interleave(scale, dim=2).repeat_interleave(scale, dim=3)
    else:
        images = torch.nn.functional.interpolate(images, scale_factor=_CELL / size, mode="area")
    return ((images + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def _pair_grid(evaluation: Evaluation, chosen: Tensor) -> np.ndarray:
    """The chosen samples as pairs before | after on white, those of the forgotten class framed; uint8 [h, w, 3]."""
    from matplotlib.colors import to_rgb

    sides = [_thumbnails(evaluation.before[chosen]), _thumbnails(evaluation.after[chosen])]
    labels = [evaluation.labels_before[chosen], evaluation.labels_after[chosen]]
    height, width = sides[0].shape[1] + 2 * _FRAME, sides[0].shape[2] + 2 * _FRAME
    step_y, step_x = height + 8, 2 * width + 16
    canvas = np.full((math.ceil(len(chosen) / _PAIRS_PER_ROW) * step_y, _PAIRS_PER_ROW * step_x, 3), 255, np.uint8)
    red = np.array([round(255 * part) for part in to_rgb(FORGOTTEN)], np.uint8)
    for index in range(len(chosen)):
        top, left = index // _PAIRS_PER_ROW * step_y, index % _PAIRS_PER_ROW * step_x
        for side, (images, classes) in enumerate(zip(sides, labels, strict=True)):
            cell = canvas[top : top + height, left + side * width : left + (side + 1) * width]
            if int(classes[index]) == evaluation.forget:
                cell[:] = red
            cell[_FRAME:-_FRAME, _FRAME:-_FRAME] = images[index]
    return canvas


def draw_samples(evaluation: Evaluation) -> Figure:
    """Pairs of samples from the same seeds: first those the original drew as the forgotten class, then others."""
    name = evaluation.class_names[evaluation.forget]
    was = evaluation.labels_before == evaluation.forget
    groups = [
        (f"The original drew “{name}” here", was.nonzero().flatten(), _MOST_FORGOTTEN),
        ("The original drew something else here", (~was).nonzero().flatten(), _MOST_OTHERS),
    ]
    shown = [(text, len(index), index[:most]) for text, index, most in groups if len(index)]
    blocks = [_pair_grid(evaluation, chosen) for _, _, chosen in shown]
    header, margin, width = 62, 10, blocks[0].shape[1]
    full_width, full_height = width + 2 * margin, sum(len(block) + header for block in blocks) + margin
    figure, top = new_figure(full_width / 100, full_height / 100), 0

    def write(x: float, y: float, text: str, **style: Any) -> None:
        figure.text(x / full_width, 1 - y / full_height, text, va="center", parse_math=False, **style)

    for (text, count, chosen), block in zip(shown, blocks, strict=True):
        title = f"{text}: first {len(chosen)} of {count} seeds"
        write(margin + 4, top + 22, title, fontsize=11, weight="bold", color=INK)
        for column in range(min(_PAIRS_PER_ROW, len(chosen))):
            for label, middle in (("before", 0.22), ("after", 0.66)):
                x = margin + (column + middle) * width / _PAIRS_PER_ROW
                write(x, top + 50, label, fontsize=8, color=FAINT, ha="center")
        top += header + len(block)
        place = margin / full_width, 1 - top / full_height, width / full_width, len(block) / full_height
        axes = figure.add_axes(place)
        axes.imshow(block, interpolation="nearest", aspect="auto")
        axes.set_axis_off()
    return figure


def draw_shares(metrics: Mapping[str, Any]) -> Figure:
    """Bars of every class's share of the samples, in percent, before and after."""
    before, after = metrics["shares"]["before"], metrics["shares"]["after"]
    names, forgotten = list(before), metrics["forgotten_class"]["name"]
    place = np.arange(len(names))
    figure = new_figure(min(16.0, max(7.5, 0.55 * len(names) + 1.5)), 3.6, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(place - 0.2, [100 * before[name] for name in names], 0.38, color=BEFORE, label="before")
    axes.bar(place + 0.2, [100 * after[name] for name in names], 0.38, color=AFTER, label="after")
    crowded = len(names) > 25 or max(map(len, names)) * len(names) > 90
    axes.set_xticks(place, names, rotation=45 if crowded else 0, ha="right" if crowded else "center")
    axes.set_ylabel("share of samples (%)", color=FAINT)
    tidy(axes)
    for label, name in zip(axes.get_xticklabels(), names, strict=True):
        label.set_parse_math(False)  # a dollar sign in a name is no formula
        if name == forgotten:
            label.set(color=FORGOTTEN, weight="bold")
    figure.legend(loc="outside upper right", ncols=2, frameon=False, fontsize=9)
    title = f"What the models draw (forgotten: {forgotten})"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11, weight="bold", parse_math=False)
    return figure


def draw_tradeoff(metrics: Mapping[str, Any]) -> Figure:
    """Forgetting (PUL, percent) against quality (u-FID) with the references; the lower right corner is best."""
    u_fid, pul = metrics["u_fid"], metrics["pul"]
    points = [
        ("original model", "before", 0.0, BEFORE, "s", 90),
        ("oracle (perfect removal)", "oracle", 100.0, ORACLE, "D", 190),  # seen behind a model that reaches it
        ("unlearned model", "after", pul, AFTER, "o", 90),
    ]
    figure = new_figure(7.5, 4.2, layout="constrained")
    axes = figure.add_subplot()
    if "before" in u_fid and "after" in u_fid:
        arrow = {"arrowstyle": "-|>", "color": "#B8C0C8", "shrinkA": 9, "shrinkB": 9, "lw": 1.4}
        axes.annotate("", (pul, u_fid["after"]), (0, u_fid["before"]), arrowprops=arrow)
    for label, key, x, colour, marker, size in points:
        if key in u_fid:
            text = f"{label}: PUL {x:.1f}%, u-FID {digits(u_fid[key])}"
            axes.scatter(x, u_fid[key], s=size, color=colour, marker=marker, label=text, zorder=3, edgecolor="white")
    if "floor" in u_fid:
        axes.axhline(
            u_fid["floor"], color=FLOOR, linestyle="--", label=f"floor (real images): {digits(u_fid['floor'])}"
        )
    values = list(u_fid.values())
    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, 1.12 * max(*values, 1e-6))
    axes.set_xlim(min(-4.0, pul - 4), 104)
    axes.set_xlabel("PUL: forgotten, % (right is better)", color=FAINT)
    axes.set_ylabel("u-FID (lower is better)", color=FAINT)
    tidy(axes, "both")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle("Forgetting against quality", x=0.01, ha="left", fontsize=11, weight="bold")
    return figure


def draw_losses(history: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The course of the run, one panel for every quantity that was recorded; None where nothing was."""
    panels = {
        "loss": "objective",
        "forget_ratio": "forget loss / its start",
        "forget_loss": "forget loss",
        "penalty": "KL per weight from the original",
        "replay_loss": "drift on what should stay",
    }
    series = {}
    for key in panels:
        found = [(row.get("step", at), row[key]) for at, row in enumerate(history) if row.get(key) is not None]
        found = [(step, value) for step, value in found if math.isfinite(value)]
        if found:
            series[key] = found
    if "forget_ratio" in series:
        series.pop("forget_loss", None)
    if not series:
        return None
    figure = new_figure(7.5, 2.4 * math.ceil(len(series) / 2) + 0.3, layout="constrained")
    for place, (key, found) in enumerate(series.items()):
        axes = figure.add_subplot(math.ceil(len(series) / 2), min(2, len(series)), place + 1)
        steps, values = zip(*found, strict=True)
        axes.plot(steps, values, color=AFTER, linewidth=1.6, marker="o" if len(found) < 3 else None)
        if key == "forget_ratio":
            axes.axhline(1, color=BEFORE, linestyle=":", linewidth=1)
        axes.set_title(panels[key], loc="left", fontsize=10, color=INK)
        axes.set_xlabel("step", color=FAINT, fontsize=9)
        tidy(axes)
    figure.suptitle("The unlearning run", x=0.01, ha="left", fontsize=11, weight="bold")
    return figure


# Page and terminal


def judge(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A plain-language verdict: `headline`, `level` (good, mixed or bad), `lead`, and `checks` of (met, name, text)."""
    name, counts, pul, u_fid = metrics["forgotten_class"]["name"], metrics["counts"], metrics["pul"], metrics["u_fid"]
    checks = [(pul >= GOOD_PUL, "Forgotten", f"{pul:.1f}% of the “{name}” pictures are gone (goal: {GOOD_PUL:.0f}%).")]
    if "oracle" in u_fid and "after" in u_fid:
        limit = GOOD_U_FID * u_fid["oracle"]
        text = (
            f"Distance from real pictures of everything else: {digits(u_fid['after'])}, where perfect removal would "
            f"give {digits(u_fid['oracle'])} (goal: at most {digits(limit)}; lower is better)."
        )
        checks.append((u_fid["after"] <= limit, "Quality kept", text))
    if "kept_ratio_min" in metrics["shares"]:
        least, of = metrics["shares"]["kept_ratio_min"], metrics["shares"]["kept_ratio_min_class"]
        text = f"Every other class kept at least {least:.0%} of its share; “{of}” kept least (goal: {GOOD_KEPT:.0%})."
        checks.append((least >= GOOD_KEPT, "Others kept", text))
    if pul < 50:
        level, headline = "bad", f"The model still draws “{name}”."
    elif pul < GOOD_PUL:
        level, headline = "mixed", f"The model draws “{name}” less often, but has not forgotten it."
    elif all(met for met, _, _ in checks):
        level, headline = "good", f"The model has forgotten “{name}” and still draws the rest."
    else:
        level, headline = "mixed", f"The model has forgotten “{name}”, but the rest has suffered."
    lead = (
        f"Of {counts['samples']:,} pictures from the same random starts, {counts['forgotten_before']:,} showed "
        f"“{name}” with the original model; with the new one, {counts['forgotten_after']:,} do."
    )
    return {"headline": headline, "level": level, "lead": lead, "checks": checks}


def _rows(value: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as (dotted name, text)."""
    rows: list[tuple[str, str]] = []
    for key, item in value.items():
        name = f"{prefix}{key}"
        rows += _rows(item, f"{name}.") if isinstance(item, Mapping) else [(name, str(item))]
    return rows


def render_html(metrics: Mapping[str, Any], pictures: Mapping[str, bytes], title: str) -> str:
    """The page: pictures inlined, nothing fetched, every text escaped."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(loader=PackageLoader("vdu_fast"), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    environment.filters["digits"] = digits
    return environment.get_template("report.html.j2").render(
        title=title,
        m=metrics,
        verdict=judge(metrics),
        persistence=list(persistence_rows(metrics.get("persistence"))),
        goals={"pul": GOOD_PUL, "u_fid": GOOD_U_FID, "kept": GOOD_KEPT},
        pictures={name: base64.b64encode(data).decode() for name, data in pictures.items()},
        settings=[*_rows(metrics["settings"]), ("seed", str(metrics["seed"]))],
        versions=_rows(metrics["versions"]),
        largest_share=max([*metrics["shares"]["before"].values(), *metrics["shares"]["after"].values()]),
    )


def print_summary(metrics: Mapping[str, Any], console: Console) -> None:
    """One compact table: every number beside what it is to be compared with, then the warnings."""
    from rich.table import Table
    from rich.text import Text

    counts, u_fid, shares = metrics["counts"], metrics["u_fid"], metrics["shares"]
    table = Table(title=Text(f"Forgetting “{metrics['forgotten_class']['name']}”"), title_justify="left")
    for header, justify in (("measure", "left"), ("value", "right"), ("beside it", "left")):
        table.add_column(header, justify=justify)  # type: ignore[arg-type]

    def row(measure: str, value: str, beside: str) -> None:
        table.add_row(Text(measure), Text(value, style="bold"), Text(beside))

    row("PUL", f"{metrics['pul']:.1f}%", f"{counts['forgotten_before']} -> {counts['forgotten_after']} samples")
    references = {"original": "before", "oracle": "oracle", "real held-out": "floor"}
    beside = ", ".join(f"{label} {digits(u_fid[key])}" for label, key in references.items() if key in u_fid)
    if u_fid.get("oracle"):
        beside += f" ({u_fid['after'] / u_fid['oracle']:.2f} x oracle)"
    row("u-FID", digits(u_fid["after"]), beside)
    if "kept_ratio_min" in shares:
        row("least kept share", f"{shares['kept_ratio_min']:.0%}", f"class {shares['kept_ratio_min_class']}")
    for key, label in (("forget_loss", "forget loss"), ("retained_loss", "retained loss")):
        if key in metrics:
            row(label, f"{metrics[key]['after']:.4f}", f"before {metrics[key]['before']:.4f}")
    for measure, value, beside in persistence_rows(metrics.get("persistence")):
        row(measure, value, beside)
    if "accuracy" in metrics["classifier"]:
        row("classifier", f"{metrics['classifier']['accuracy']:.1%}", "right on held-out images")
    sampler = metrics["sampler"]
    row("samples", f"{counts['samples']}", f"{sampler['steps']} steps of {sampler['name']}, seed {sampler['seed']}")
    if metrics.get("seconds"):
        row("seconds", "", ", ".join(f"{key} {value:.1f}" for key, value in metrics["seconds"].items()))
    console.print(table)
    for warning in metrics["warnings"]:
        console.print(Text(f"Note: {warning}", style="yellow"))
