"""Which settings suit each baseline best, every method being given the same number of tries?

Runs the settings below on the digit 0 of the shipped model, each within the network evaluations that `unlearn`
needs under its defaults, and appends one row per run to benchmarks/results/baseline_settings.csv. The best setting of a
method is the one with the least u-FID among those with a PUL of at least 90, or that with the highest PUL where there
is none; it is the default of the method's settings. The starting noise of the evaluation is not that of any table. A
run whose row is there already is skipped, and `--part 0/2` takes every second run, as in default_settings.py.

The last try of each method was placed after the others. The first of EraseDiff lay where everything collapses, and two
of these (barrier 1 at 1e-4 and 3e-4) gave way to lower barriers.
"""

from __future__ import annotations

import argparse
import datetime
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from default_settings import EVALUATION_SEED, Bench, short_digest

from vdu_fast.baselines import get_method
from vdu_fast.baselines.budget import evaluations_of_unlearn
from vdu_fast.baselines.method import MethodInputs, run_method
from vdu_fast.benchmarks.ledger import append, commit, rows
from vdu_fast.config import UnlearnConfig
from vdu_fast.evaluation import EvaluationConfig, evaluate
from vdu_fast.pipelines import denoiser_of, load_pipeline
from vdu_fast.posterior import GaussianPosterior

RESULTS = Path(__file__).parent / "results" / "baseline_settings.csv"
DIGIT, SEED, SAMPLES = 0, 0, 300
FORGOTTEN = 90.0


def grid(names: tuple[str, ...], *values: tuple[float | None, ...]) -> list[dict[str, Any]]:
    return [dict(zip(names, row, strict=True)) for row in values]


SETTINGS = {
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

COLUMNS = [
    "method", "changes", "pul", "u_fid", "oracle", "original", "kept_min", "retained_loss_ratio", "evaluations",
    "budget", "steps", "seconds", "samples", "sampler_steps", "threads", "torch", "commit", "date", "key",
]  # fmt: skip


def measure(bench: Bench, name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Unlearn and evaluate under one setting of one method."""
    denoiser = denoiser_of(load_pipeline(bench.model))
    forget, retained = bench.train.only(DIGIT).images, bench.train.without(DIGIT).images
    method = get_method(name)
    record = run_method(
        method,
        denoiser,
        MethodInputs(forget, retained, GaussianPosterior.load(bench.model / "posterior.safetensors")),
        budget=evaluations_of_unlearn(UnlearnConfig(), len(forget)),
        seed=SEED,
        settings=method.settings(**changes),
    )
    metrics = evaluate(
        bench.original,
        denoiser,
        train=bench.train,
        heldout=bench.heldout,
        forget=DIGIT,
        config=bench.config,
        classifier=bench.classifier,
        original_samples=bench.samples,
    ).metrics
    return {
        "pul": round(metrics["pul"], 1),
        "u_fid": round(metrics["u_fid"]["after"], 3),
        "oracle": round(metrics["u_fid"]["oracle"], 3),
        "original": round(metrics["u_fid"]["before"], 3),
        "kept_min": round(metrics["shares"]["kept_ratio_min"], 3),
        "retained_loss_ratio": round(metrics["retained_loss"]["ratio"], 3),
        "evaluations": record["evaluations"],
        "budget": record["budget"],
        "steps": record["steps"],
        "seconds": round(record["seconds"], 1),
    }


def best(method: str) -> dict[str, str] | None:
    """The row of a method that its defaults are taken from, or None before anything has run."""
    runs = [row for row in rows(RESULTS) if row["method"] == method]
    forgotten = [row for row in runs if float(row["pul"]) >= FORGOTTEN]
    if forgotten:
        return min(forgotten, key=lambda row: float(row["u_fid"]))
    return max(runs, key=lambda row: float(row["pul"]), default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="i/n: do every n-th run, starting at the i-th")
    parser.add_argument("--methods", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--table", action="store_true", help="print the best setting of each method, and stop")
    arguments = parser.parse_args()
    number, parts = map(int, arguments.part.split("/"))
    torch.set_num_threads(1)
    config = EvaluationConfig(samples=SAMPLES, seed=EVALUATION_SEED)
    bench: Bench | None = None
    jobs = [(name, changes) for name in arguments.methods for changes in SETTINGS[name]][number::parts]
    for name, changes in [] if arguments.table else jobs:
        key = short_digest([name, asdict(get_method(name).settings(**changes)), DIGIT, SEED, asdict(config)])
        if any(row["key"] == key for row in rows(RESULTS)):
            continue
        bench = bench or Bench(config)
        stamp = {
            "samples": SAMPLES,
            "sampler_steps": config.sampler_steps,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "commit": commit(),
            "date": datetime.date.today().isoformat(),
            "key": key,
        }
        row = {"method": name, "changes": json.dumps(changes), **measure(bench, name, changes), **stamp}
        append(RESULTS, COLUMNS, row)
        print(name, changes, *(f"{key} {row[key]}" for key in ("pul", "u_fid", "kept_min", "seconds")), flush=True)
    for name in arguments.methods:
        print(name, best(name))


if __name__ == "__main__":
    main()
