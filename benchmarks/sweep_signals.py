"""Do the signals of `vdu-fast sweep`, which see neither real data nor a classifier, tell what those would?

Sweeps a small grid on some digits of the shipped model, judges every measured state as `vdu-fast evaluate` would (on
other starting noise than the README's tables), and appends one row per state to benchmarks/results/sweep_signals.csv.
Prints rank correlations of the signals with the truth, and what the setting that each sweep chooses is worth. What has
a row already is skipped, so it can be stopped and started again.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import torch
from default_settings import CACHE, EVALUATION_SEED, Bench
from scipy.stats import spearmanr

from vdu_fast.benchmarks.ledger import STAMP, append, rows, stamp
from vdu_fast.config import UnlearnConfig
from vdu_fast.evaluation import EvaluationConfig
from vdu_fast.job import Observers, check_inputs
from vdu_fast.sweeping import Point, Setting, Sweep, SweepConfig, choose
from vdu_fast.unlearning_run import UnlearningRun

RESULTS = Path(__file__).parent / "results" / "sweep_signals.csv"
GRID = SweepConfig(replay_weights=[2.0, 8.0, 32.0], hinge_ratios=[2.0, 4.0], gammas=[0.05], step_counts=[50, 100])
SAMPLES = 1000
LEAST_PUL, MOST_RATIO = 99.0, 1.25

SIGNALS = [field.name for field in fields(Point)]
TRUTH = ["true_pul", "u_fid", "oracle", "u_fid_ratio", "kept_min"]
COLUMNS = ["digit", *SIGNALS, *TRUTH, *STAMP, "key"]


class JudgedSweep(Sweep):
    """A sweep that also evaluates every state it measures."""

    bench: Bench
    digit: int

    def states(self, setting: Setting) -> Iterator[tuple[UnlearningRun, int]]:
        self.truth: dict[int, dict[str, float]] = {}
        for run, steps in super().states(setting):
            metrics = self.bench.metrics(self.worker, self.digit)
            after, oracle = metrics["u_fid"]["after"], metrics["u_fid"]["oracle"]
            values = (metrics["pul"], after, oracle, after / oracle, metrics["shares"]["kept_ratio_min"])
            self.truth[steps] = dict(zip(TRUTH, values, strict=True))
            yield run, steps


def measure_missing(digit: int, evaluation: EvaluationConfig) -> None:
    """Run what has no rows yet."""
    bench = Bench(evaluation)
    posterior = bench.model / "posterior.safetensors"
    images = bench.train.only(digit)
    job = check_inputs(bench.original.module, images, posterior, UnlearnConfig(), bench.original.scheduler, Observers())
    output = CACHE / f"sweep-{digit}"
    output.mkdir(exist_ok=True)
    sweep = JudgedSweep(job, GRID, output, None)
    sweep.bench, sweep.digit = bench, digit
    for setting in GRID.settings():
        key = sweep.key(setting)
        if any(row["key"] == key and row["samples"] == str(evaluation.samples) for row in rows(RESULTS)):
            continue
        for point in sweep.run(setting)["points"]:
            truth = sweep.truth[point["steps"]]
            row = {"digit": digit, **point, **truth, **stamp(evaluation), "key": key}
            shown = {name: f"{value:.5g}" if isinstance(value, float) else value for name, value in row.items()}
            append(RESULTS, COLUMNS, shown)
            print(digit, setting.name, point["steps"], point["pul"], point["ratio"], truth, flush=True)


def report(digits: list[int], least_forgotten: float) -> None:
    """Rank correlations over the grid, and the truth about what would be chosen."""
    for digit in digits:
        measured = [row for row in rows(RESULTS) if row["digit"] == str(digit)]
        if len(measured) < 3:
            continue
        value = {name: [float(row[name]) for row in measured] for name in (*SIGNALS, *TRUTH)}
        pairs = (("pul", "true_pul"), ("ratio", "u_fid_ratio"), ("replay_distance", "u_fid_ratio"))
        ranks = ", ".join(f"{a} with {b} {spearmanr(value[a], value[b]).statistic:.2f}" for a, b in pairs)
        points = [Point(**{name: float(row[name]) for name in SIGNALS}) for row in measured]  # type: ignore[arg-type]
        chosen, reached = choose(points, least_forgotten)
        row = measured[points.index(chosen)]
        good = float(row["true_pul"]) >= LEAST_PUL and float(row["u_fid_ratio"]) <= MOST_RATIO
        print(
            f"digit {digit}, {len(points)} states: {ranks}\n  chosen {chosen.setting.name}, {chosen.steps:.0f} steps "
            f"(enough forgotten: {reached}): PUL {row['true_pul']}, u-FID / oracle {row['u_fid_ratio']}, "
            f"{'meets' if good else 'misses'} PUL >= {LEAST_PUL:g} and ratio <= {MOST_RATIO:g}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", nargs="*", type=int, default=[8, 0, 5])
    parser.add_argument("--least_forgotten", type=float, default=GRID.least_forgotten)
    parser.add_argument("--table", action="store_true", help="print what the rows say, and stop")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for digit in [] if arguments.table else arguments.digits:
        measure_missing(digit, EvaluationConfig(samples=SAMPLES, seed=EVALUATION_SEED))
    report(arguments.digits, arguments.least_forgotten)


if __name__ == "__main__":
    main()
