"""Which settings suit each of the other methods on Fashion-MNIST?

    python benchmarks/fashion_methods.py --data /usr/share/datasets/fashion-mnist

The eight settings of each method that tune_methods.py tries on the digits, on one class that the table of `protocol.py
fashion_mnist` does not compare methods on, with its model, judge and budget, one seed, and other starting noise. What
stands first by tune_methods.py's rule, once all eight have run, is what the method is given in that table. (Ours was
given more: fashion_settings.py.)
Every run appends a row to benchmarks/results/fashion_mnist/method_settings.csv; what has a row already is not run.
`--part 0/2` takes every second run.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from default_settings import EVALUATION_SEED
from fashion_settings import NAME, measured
from protocol import PROTOCOLS, RESULTS, Bench
from published_runs import PublishedRuns
from tune_methods import SETTINGS, rank

from vdu_fast.baselines import get_method
from vdu_fast.benchmarks.ledger import STAMP, append, rows
from vdu_fast.comparison import Comparison, Job
from vdu_fast.errors import InputError

TABLE = RESULTS / NAME / "method_settings.csv"
COLUMNS = [
    "method", "changes", "class", "pul", "u_fid", "oracle", "ratio", "original", "kept_min", "evaluations", "steps",
    "seconds", "device", *STAMP, "key",
]  # fmt: skip

# Sneakers.
CLASS = 7
# PUL that is enough: what ours has on these data with its settings there.
FORGOTTEN = 98.0
TRIES = {name: tries for name, tries in SETTINGS.items() if name != "ours"}
JOBS = [(name, changes) for name, tries in TRIES.items() for changes in tries]


def comparison_of(bench: Bench, name: str, changes: dict[str, Any]) -> Comparison:
    """The comparison that a try belongs to."""
    number = JOBS.index((name, changes))
    return replace(
        bench.base,
        output=bench.output / "method-settings" / str(number),
        config=replace(bench.base.config, seed=EVALUATION_SEED),
        settings={name: get_method(name).settings(**changes)},
    )


def measure_missing(bench: Bench, jobs: Iterable[tuple[str, dict[str, Any]]]) -> None:
    """Run what has no row yet."""
    known = {row["key"] for row in rows(TABLE)}
    for name, changes in jobs:
        comparison, job = comparison_of(bench, name, changes), Job(CLASS, name, 0)
        if comparison.key(job) in known:
            continue
        record = comparison.finished(job) or comparison.run(job)
        row = {
            "method": name,
            "changes": json.dumps(changes),
            **measured(record, comparison),
            "original": round(record["metrics"]["u_fid"]["before"], 3),
            "evaluations": record["evaluations"],
            "steps": record["steps"],
            "seconds": round(record["seconds"], 1),
        }
        append(TABLE, COLUMNS, row)
        print(*(f"{column} {row[column]}" for column in COLUMNS[:9]), flush=True)


def standing(name: str) -> list[tuple[dict[str, Any], dict[str, float]]]:
    """The settings of a method that have run, each with PUL, u-FID and the original model's; the best one first."""
    by_changes = {row["changes"]: row for row in rows(TABLE) if row["method"] == name}  # of several rows the last
    found = [
        (changes, {column: float(row[column]) for column in ("pul", "u_fid", "oracle", "original")})
        for changes in TRIES[name]
        if (row := by_changes.get(json.dumps(changes))) is not None
    ]
    return sorted(found, key=lambda item: rank(item[1], FORGOTTEN))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder of the data set; not needed with --table")
    parser.add_argument("--output", type=Path, default=Path("runs") / NAME, help="the protocol's output folder")
    parser.add_argument("--part", default="0/1", help="i/n: do every n-th run, starting at the i-th")
    parser.add_argument("--methods", nargs="*", default=list(TRIES), choices=list(TRIES))
    parser.add_argument("--table", action="store_true", help="print how the settings of each method stand, and stop")
    arguments = parser.parse_args()
    number, parts = map(int, arguments.part.split("/"))
    if not arguments.table:
        if arguments.data is None:
            parser.error("--data is missing: give the folder of the data set, or --table")
        torch.set_num_threads(1)
        try:
            published = PublishedRuns(RESULTS / NAME, arguments.output)
            bench = Bench(PROTOCOLS[NAME], arguments.data, arguments.output, 1, take_over=published)
            jobs = [job for job in JOBS if job[0] in arguments.methods]
            measure_missing(bench, jobs[number::parts])
        except InputError as error:
            parser.exit(1, f"{error}\n")
    for name in arguments.methods:
        for changes, means in standing(name):
            print(name, changes, *(f"{measure} {mean:.2f}" for measure, mean in means.items()))


if __name__ == "__main__":
    main()
