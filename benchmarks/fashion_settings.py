"""Which settings of ours forget the most and keep the most on Fashion-MNIST?

    python benchmarks/fashion_settings.py --data /usr/share/datasets/fashion-mnist

Every setting below on the classes, the model and the judge of `protocol.py fashion_mnist`, with one seed. Runs go to
the protocol's output folder, where they stay as they do there, and a row for each to
benchmarks/results/fashion_mnist/settings.csv; what has a row already is not run. The starting noise of the evaluation
is not that of the tables. The committed rows are of an H200, but for those of device cpu.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

from default_settings import EVALUATION_SEED, quality
from protocol import PROTOCOLS, RESULTS, Bench
from published_runs import PublishedRuns

from vdu_fast.benchmarks.ledger import STAMP, append, rows, stamp
from vdu_fast.comparison import Comparison, Job, run_all
from vdu_fast.config import UnlearnConfig
from vdu_fast.errors import InputError

NAME = "fashion_mnist"
TABLE = RESULTS / NAME / "settings.csv"
COLUMNS = ["setting", "changes", "class", "pul", "u_fid", "oracle", "ratio", "kept_min", "device", *STAMP, "key"]

SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "lambda 8": {"replay_weight": 8.0},
    "hinge 2": {"hinge_ratio": 2.0},
    "hinge 1.5": {"hinge_ratio": 1.5},
    "hinge 2, lambda 8": {"hinge_ratio": 2.0, "replay_weight": 8.0},
    "hinge 4, lambda 12": {"hinge_ratio": 4.0, "replay_weight": 12.0},
    "forget in 0.5": {"forget_share": 0.5},
    "forget in 0.7": {"forget_share": 0.7},
    "lambda 6, forget in 0.6": {"replay_weight": 6.0, "forget_share": 0.6},
    "lambda 8, forget in 0.5": {"replay_weight": 8.0, "forget_share": 0.5},
    "hinge 1.5, lambda 8, forget in 0.5": {"hinge_ratio": 1.5, "replay_weight": 8.0, "forget_share": 0.5},
    "hinge 2, lambda 8, forget in 0.3": {"hinge_ratio": 2.0, "replay_weight": 8.0, "forget_share": 0.3},
    "hinge 2, lambda 8, forget in 0.5": {"hinge_ratio": 2.0, "replay_weight": 8.0, "forget_share": 0.5},
    "hinge 2, lambda 8, forget in 0.7": {"hinge_ratio": 2.0, "replay_weight": 8.0, "forget_share": 0.7},
    "hinge 2, lambda 16, forget in 0.5": {"hinge_ratio": 2.0, "replay_weight": 16.0, "forget_share": 0.5},
    "lambda 8, forget in 0.5, focus 0.25": {"replay_weight": 8.0, "forget_share": 0.5, "replay_focus": 0.25},
    "lambda 8, forget in 0.5, timesteps from 300": {
        "replay_weight": 8.0,
        "forget_share": 0.5,
        "timestep_window": [300, 1000],
    },
    "lambda 8, forget in 0.5, guided": {"replay_weight": 8.0, "forget_share": 0.5, "replay_guidance": 1.0},
    "lambda 6, forget in 0.5, guided": {"replay_weight": 6.0, "forget_share": 0.5, "replay_guidance": 1.0},
    "focus 0.75": {"replay_focus": 0.75},
    "replay batch 128": {"replay_batch_size": 128},
    "batch 32, replay batch 128": {"batch_size": 32, "replay_batch_size": 128},
    "rate 0.01, 200 steps": {"learning_rate": 0.01, "steps": 200},
    "rate 0.04": {"learning_rate": 0.04},
    "sharpened metric": {"sharpen": 2.0},
    "sampled weights": {"family": "mean_field"},
}


def comparison_of(bench: Bench, changes: dict[str, Any], folder: str) -> Comparison:
    """The comparison that a setting's runs belong to."""
    return replace(
        bench.base,
        output=bench.output / "settings" / folder,
        config=replace(bench.base.config, seed=EVALUATION_SEED),
        settings={"ours": UnlearnConfig(**changes)},
        evaluations=None,
    )


def row_of(name: str, record: dict[str, Any], comparison: Comparison) -> dict[str, Any]:
    return {"setting": name, "changes": json.dumps(SETTINGS[name]), **measured(record, comparison)}


def measured(record: dict[str, Any], comparison: Comparison) -> dict[str, Any]:
    """The columns of a row that say what a run found, and how; threads and torch are the run's, not those of now."""
    return {
        "class": record["class"],
        **quality(record["metrics"]),
        "device": record["device"],
        **stamp(comparison.config),
        "threads": record["threads"],
        "torch": record["versions"]["torch"],
        "key": record["key"],
    }


def measure_missing(bench: Bench, names: Collection[str]) -> None:
    """Run what has no row yet, setting by setting."""
    labels, known = PROTOCOLS[NAME].classes, {row["key"] for row in rows(TABLE)}
    for number, name in enumerate(SETTINGS):
        if name not in names:
            continue
        comparison = comparison_of(bench, SETTINGS[name], str(number))
        jobs = [job for job in (Job(label, "ours", 0) for label in labels) if comparison.key(job) not in known]
        for record in run_all(comparison, jobs, processes=bench.processes) if jobs else []:
            row = row_of(name, record, comparison)
            append(TABLE, COLUMNS, row)
            print(*(f"{column} {row[column]}" for column in COLUMNS[:8]), flush=True)


def print_table() -> None:
    """One line per setting: means over the classes that have run."""
    by_setting: dict[str, list[dict[str, str]]] = {}
    for row in rows(TABLE):
        by_setting.setdefault(row["setting"], []).append(row)
    print(f"{'setting':38} {'PUL':>6} {'u-FID / oracle':>15} {'of each class':>16}")
    for setting, runs in by_setting.items():
        pul, ratio = (statistics.fmean(float(run[column]) for run in runs) for column in ("pul", "ratio"))
        each = "  ".join(f"{run['class']}: {float(run['pul']):.0f}, {float(run['ratio']):.2f}" for run in runs)
        print(f"{setting:38} {pul:6.1f} {ratio:15.2f}    {each}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data set; not needed with --table")
    parser.add_argument("--output", type=Path, default=Path("runs") / NAME, help="the protocol's output folder")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--table", action="store_true", help="print the table of what has run, and stop")
    arguments = parser.parse_args()
    if not arguments.table:
        if arguments.data is None:
            parser.error("--data is missing: give the folder of the data set, or --table")
        try:
            published = PublishedRuns(RESULTS / NAME, arguments.output)
            bench = Bench(PROTOCOLS[NAME], arguments.data, arguments.output, arguments.jobs, take_over=published)
            measure_missing(bench, arguments.settings)
        except InputError as error:
            parser.exit(1, f"{error}\n")
    print_table()


if __name__ == "__main__":
    main()
