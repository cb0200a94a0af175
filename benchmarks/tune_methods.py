"""Which settings suit each method best, ours among them, every one being given the same number of tries?

First round: the eight settings below of every method on the digit 0 of the shipped model, 300 samples, with retraining,
which has nothing to tune, beside them. Second round: the three best of each on the digits 0, 4 and 8, 1,000 samples.
Every run stays within the network evaluations that `unlearn` needs under its defaults, and appends one row to
benchmarks/results/method_settings.csv. What wins is the default of the method's settings, for all classes and data. The
starting noise of the evaluation is not that of any table. A run whose row is there already is skipped, and `--part
0/2` takes every second run, as in default_settings.py.

Best (see `rank`): of the settings that leave u-FID no higher than the original model's, the least u-FID among those
that forget enough, or else the most forgotten. Where a method has none such, the same among all of its settings.

Ours was given its eight tries twice, before half of a replay batch was focused and with it; the rows are of the second
time. Its default lambda, 4, is none of them: over all ten digits (default_settings.py) the 5 that won here left PUL at
the edge of what is enough. The last try of each method was placed after the others. The first of EraseDiff lay where
everything collapses, and two of these (barrier 1 at 1e-4 and 3e-4) gave way to lower barriers.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from default_settings import EVALUATION_SEED, Bench, short_digest

from vdu_fast.baselines import get_method
from vdu_fast.baselines.budget import evaluations_of_unlearn
from vdu_fast.baselines.method import MethodInputs, run_method
from vdu_fast.benchmarks.ledger import STAMP, append, rows, stamp
from vdu_fast.checkpoint import write_bytes_atomic
from vdu_fast.comparison import read_pretraining
from vdu_fast.comparison_report import OURS, styles_of
from vdu_fast.config import UnlearnConfig
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.figures import BEFORE, FAINT, FLOOR, INK, ORACLE, new_figure, png, tidy
from vdu_fast.pipelines import denoiser_of, load_pipeline
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.records import decisive

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).parent / "results" / "method_settings.csv"
SEED = 0


@dataclass(frozen=True)
class Round:
    """One round of tries: `forgotten` is the mean PUL that is enough, a little below which one image is left over."""

    digits: tuple[int, ...]
    samples: int
    forgotten: float

    @property
    def evaluation(self) -> EvaluationConfig:
        return EvaluationConfig(samples=self.samples, seed=EVALUATION_SEED)


FIRST, SECOND = Round((0,), 300, 97.0), Round((0, 4, 8), 1000, 99.0)
FINALISTS = 3


def grid(names: tuple[str, ...], *values: tuple[float | None, ...]) -> list[dict[str, Any]]:
    return [dict(zip(names, row, strict=True)) for row in values]


SETTINGS = {
    "ours": grid(
        ("hinge_ratio", "replay_weight"),
        (3.0, 8.0), (3.0, 5.0), (2.5, 5.0), (4.0, 5.0), (2.5, 8.0), (4.0, 8.0), (3.0, 20.0), (2.0, 5.0),
    ),
    "vdu": grid(
        ("learning_rate", "gamma", "steps"),
        (1e-5, 0.5, 50), (1e-5, 0.5, 150), (1e-5, 0.9, 150), (3e-5, 0.1, 50), (3e-5, 0.5, 50), (3e-5, 0.9, 50),
        (1e-4, 0.5, 25), (1e-4, 0.5, 10),
    ),
    "neg_grad": grid(
        ("learning_rate", "steps"),
        (3e-6, None), (1e-5, 50), (1e-5, 150), (3e-5, 25), (3e-5, 50), (1e-4, 10), (1e-4, 25), (3e-5, 35),
    ),
    "neg_grad_plus": grid(
        ("learning_rate", "retained_weight"),
        (1e-4, 1.0), (1e-4, 2.0), (1e-4, 5.0), (3e-4, 2.0), (3e-4, 5.0), (1e-3, 5.0), (1e-3, 10.0), (1e-4, 4.0),
    ),
    "fine_tune": grid(
        ("learning_rate", "batch_size"),
        (1e-4, 64), (3e-4, 64), (1e-3, 64), (3e-3, 64), (3e-4, 128), (1e-3, 128), (3e-3, 128), (6e-4, 64),
    ),
    "salun": grid(
        ("learning_rate", "retained_weight"),
        (1e-4, 1.0), (3e-4, 1.0), (1e-3, 1.0), (3e-4, 3.0), (1e-3, 3.0), (1e-3, 10.0), (3e-3, 3.0), (1e-4, 3.0),
    ),
    "selective_amnesia": grid(
        ("learning_rate", "replay_weight", "fisher_weight"),
        (1e-4, 1.0, 10.0), (3e-4, 1.0, 10.0), (1e-3, 1.0, 10.0), (3e-4, 3.0, 1.0), (1e-3, 3.0, 1.0),
        (1e-3, 3.0, 10.0), (1e-3, 10.0, 1.0), (3e-3, 10.0, 1.0),
    ),
    "erase_diff": grid(
        ("learning_rate", "barrier"),
        (3e-4, 0.03), (3e-4, 0.1), (3e-4, 0.3), (3e-4, 3.0), (1e-3, 0.03), (1e-3, 0.1), (1e-3, 1.0), (2e-3, 0.03),
    ),
    "siss": grid(
        ("learning_rate", "delete_share"),
        (1e-4, 0.1), (1e-4, 0.5), (3e-4, 0.1), (3e-4, 0.5), (3e-4, 1.0), (1e-3, 0.1), (1e-3, 0.5), (3e-3, 0.1),
    ),
}  # fmt: skip

# Set after these rounds, by a sweep over all ten digits (default_settings.py), which no other method was given.
SET_LATER: dict[str, dict[str, Any]] = {"ours": {"replay_weight": 4.0}}

MEANS = ("pul", "u_fid", "oracle", "original", "floor")
# The reference has no settings to try.
TRIES = SETTINGS | {"retrain": [{}]}
SIDES = {"oracle": "oracle", "original": "original model", "floor": "real held-out"}

COLUMNS = [
    "method", "digit", "changes", "pul", "u_fid", "oracle", "original", "floor", "kept_min", "retained_loss_ratio",
    "evaluations", "budget", "steps", "seconds", *STAMP, "key",
]  # fmt: skip


def run_key(name: str, changes: dict[str, Any], digit: int, evaluation: EvaluationConfig) -> str:
    """What one run is known by: every setting of the method and of the evaluation in force, and the digit."""
    return short_digest([name, decisive(get_method(name).settings(**changes)), digit, SEED, asdict(evaluation)])


def measure(bench: Bench, name: str, changes: dict[str, Any], digit: int) -> dict[str, Any]:
    """Unlearn and evaluate under one setting of one method."""
    denoiser = denoiser_of(load_pipeline(bench.model))
    forget, retained = bench.train.only(digit).images, bench.train.without(digit).images
    method = get_method(name)
    record = run_method(
        method,
        denoiser,
        MethodInputs(
            forget,
            retained,
            GaussianPosterior.load(bench.model / "posterior.safetensors"),
            read_pretraining(bench.model),
        ),
        budget=evaluations_of_unlearn(UnlearnConfig(), len(forget)),
        seed=SEED,
        settings=method.settings(**changes),
    )
    metrics = bench.metrics(denoiser, digit)
    return {
        "pul": round(metrics["pul"], 3),
        "u_fid": round(metrics["u_fid"]["after"], 3),
        "oracle": round(metrics["u_fid"]["oracle"], 3),
        "original": round(metrics["u_fid"]["before"], 3),
        "floor": round(metrics["u_fid"]["floor"], 3),
        "kept_min": round(metrics["shares"]["kept_ratio_min"], 3),
        "retained_loss_ratio": round(metrics["retained_loss"]["ratio"], 3),
        "evaluations": record["evaluations"],
        "budget": record["budget"],
        "steps": record["steps"],
        "seconds": round(record["seconds"], 1),
    }


def rank(means: dict[str, float], forgotten: float) -> tuple[bool, bool, float]:
    """What the settings of a method are sorted by, the best one first.

    Args:
        means: over the digits of a round, of "pul", "u_fid" and "original", the u-FID of the original model.
        forgotten: the PUL that is enough.
    """
    enough = means["pul"] >= forgotten
    return (means["u_fid"] > means["original"], not enough, means["u_fid"] if enough else -means["pul"])


def standing(name: str, tries: Iterable[dict[str, Any]], which: Round) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """The settings that have run on all digits of a round, each with its means, the best one first."""
    by_key = {row["key"]: row for row in rows(RESULTS)}
    found = []
    for changes in tries:
        keys = [run_key(name, changes, digit, which.evaluation) for digit in which.digits]
        if all(key in by_key for key in keys):
            runs = [by_key[key] for key in keys]
            means = {c: statistics.fmean(float(run[c]) for run in runs) for c in MEANS if all(run[c] for run in runs)}
            found.append((changes, means))
    return sorted(found, key=lambda item: rank(item[1], which.forgotten))


def measure_missing(which: Round, jobs: list[tuple[str, dict[str, Any], int]]) -> None:
    """Run what has no row yet."""
    bench: Bench | None = None
    for name, changes, digit in jobs:
        key = run_key(name, changes, digit, which.evaluation)
        if any(row["key"] == key for row in rows(RESULTS)):
            continue
        bench = bench or Bench(which.evaluation)
        result = measure(bench, name, changes, digit)
        row = {"method": name, "digit": digit, "changes": json.dumps(changes), **result, **stamp(which.evaluation)}
        append(RESULTS, COLUMNS, row | {"key": key})
        print(name, digit, changes, *(f"{k} {result[k]}" for k in ("pul", "u_fid", "kept_min", "seconds")), flush=True)


def draw() -> Figure:
    """Every try of the first round: PUL against u-FID, a line through those of a method that no other of it beats."""
    figure = new_figure(9.2, 5.4, layout="constrained")
    axes = figure.add_subplot()
    found = {name: [means for _, means in standing(name, TRIES[name], FIRST)] for name in TRIES}
    for name, (marker, colour) in styles_of(TRIES).items():
        method, points = get_method(name), sorted((m["pul"], m["u_fid"]) for m in found[name])
        hollow = "none" if "retained" in method.sees else colour
        look: dict[str, Any] = {"color": colour, "markersize": 12 if name == OURS else 6, "markerfacecolor": hollow}
        axes.plot(*zip(*points, strict=True), marker, label=method.title, **look)
        front = [p for p in points if not any(q[0] >= p[0] and q[1] <= p[1] for q in points if q != p)]
        axes.plot(*zip(*front, strict=True), color=colour, linewidth=1.0, zorder=1)
    lines = {"oracle": ORACLE, "original": BEFORE, "floor": FLOOR}
    for (side, colour), dashes in zip(lines.items(), ("--", ":", "-."), strict=True):
        value = found["retrain"][0][side]
        axes.axhline(value, color=colour, linestyle=dashes, label=f"{SIDES[side]}: u-FID {value:.2f}", zorder=1)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("PUL: forgotten, % (right is better)", color=FAINT)
    axes.set_ylabel("u-FID (lower is better)", color=FAINT)
    tidy(axes, "both")
    title = "filled: saw no retained data\nhollow: saw retained data"
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title=title, title_fontsize=9, alignment="left")
    text = f"What each method can do: eight settings of each, digit {FIRST.digits[0]}, {FIRST.samples} samples"
    figure.suptitle(text, x=0.01, ha="left", fontsize=11, weight="bold", color=INK)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="i/n: do every n-th run, starting at the i-th")
    parser.add_argument("--methods", nargs="*", default=list(TRIES), choices=list(TRIES))
    parser.add_argument("--round", type=int, choices=(1, 2), default=1, help="2 needs what all parts of 1 have found")
    parser.add_argument("--table", action="store_true", help="print how the settings of each method stand, and stop")
    arguments = parser.parse_args()
    number, parts = map(int, arguments.part.split("/"))
    torch.set_num_threads(1)
    which, tries = FIRST, TRIES
    if arguments.round == 2:
        which = SECOND
        tries = {name: [c for c, _ in standing(name, TRIES[name], FIRST)[:FINALISTS]] for name in SETTINGS}
    if not arguments.table:
        jobs = [
            (name, changes, digit)
            for name in arguments.methods
            for changes in tries.get(name, [])
            for digit in which.digits
        ]
        measure_missing(which, jobs[number::parts])
    for name in arguments.methods:
        for changes, means in standing(name, tries.get(name, []), which):
            print(name, changes, *(f"{measure} {mean:.2f}" for measure, mean in means.items()))
    if arguments.round == 1 and all(standing(name, TRIES[name], FIRST) for name in TRIES):
        write_bytes_atomic(RESULTS.with_suffix(".png"), png(draw()))


if __name__ == "__main__":
    main()
