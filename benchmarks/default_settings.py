"""Which default settings forget the most and keep the most, over all ten digits?

Runs every setting below on every digit of the shipped model and appends one row per run to
benchmarks/results/default_settings.csv. The evaluation is that of the README's tables but for its seed: what is chosen
on one set of starting noise must not be reported on the same. A run whose row is there already is skipped, so it can
be stopped and started again, and several can share the work: `python benchmarks/default_settings.py --part 0/2`. What
decides that is every setting in force, not the name: a row of other defaults does not stand for the new ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from vdu_fast.benchmarks.ledger import STAMP, append, rows, stamp
from vdu_fast.checkpoint import fingerprint, load_tensors, save_tensors
from vdu_fast.classifier import ImageClassifier, train_classifier
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import load_images
from vdu_fast.demo import shipped_model
from vdu_fast.evaluation import EvaluationConfig, evaluate
from vdu_fast.pipelines import Denoiser, denoiser_of, load_pipeline
from vdu_fast.records import decisive, digest
from vdu_fast.sampling import sample_images
from vdu_fast.unlearner import unlearn

RESULTS = Path(__file__).parent / "results" / "default_settings.csv"
CACHE = Path(__file__).parent / "cache"

# Not EvaluationConfig's default, which the tables of the README are measured with.
EVALUATION_SEED = 4321

# What the lines below change: the defaults from which the sweep set out.
START = {"hinge_ratio": 3.0, "replay_weight": 8.0, "replay_focus": 0.0}
FOCUSED = {"replay_weight": 5.0, "replay_focus": 0.5}
SETTINGS: dict[str, dict[str, Any]] = {
    "start": {},
    "hinge 4, lambda 5, constant rate": {"hinge_ratio": 4.0, "replay_weight": 5.0, "anneal": 0.0},
    "hinge 4, lambda 5": {"hinge_ratio": 4.0, "replay_weight": 5.0},
    "hinge 2.5, lambda 5": {"hinge_ratio": 2.5, "replay_weight": 5.0},
    "hinge 3, lambda 5": {"replay_weight": 5.0},
    "hinge 3, lambda 5, focus": FOCUSED,
    "hinge 3, lambda 4, focus": FOCUSED | {"replay_weight": 4.0},
    "hinge 3, lambda 4, focus, guided": FOCUSED | {"replay_weight": 4.0, "replay_guidance": 1.0},
    "hinge 3, lambda 5, focus, bank of 20 steps": FOCUSED | {"replay_sampler_steps": 20},
    "hinge 2.5, lambda 5, sharpened metric": {"hinge_ratio": 2.5, "replay_weight": 5.0, "sharpen": 2.0},
    "hinge 2.5, lambda 5, 200 steps": {"hinge_ratio": 2.5, "replay_weight": 5.0, "steps": 200},
    "constant rate": {"anneal": 0.0},
    "lambda 20": {"replay_weight": 20.0},
    "gamma 0": {"gamma": 0.0},
    "gamma 0.3": {"gamma": 0.3},
    "200 steps": {"steps": 200},
    "sharpened metric": {"sharpen": 2.0},
    "sampled weights": {"family": "mean_field"},
    "npo": {"saturation": "npo"},
    "elbo weights": {"weighting": "elbo"},
    "timesteps 100 to 800": {"timestep_window": (100, 800)},
    "bank not filtered": {"bank_filter": "none"},
    "no replay": {"replay_weight": 0.0},
    "plain adam": {"optimizer": "adam", "learning_rate": 1e-4},
    "natural_sign": {"optimizer": "natural_sign", "learning_rate": 0.01},
}

COLUMNS = [
    "setting", "changes", "digit", "pul", "u_fid", "oracle", "ratio", "original", "kept_min", "forget_loss_ratio",
    "retained_loss_ratio", "dropped", "seconds", *STAMP, "key",
]  # fmt: skip

# Where a bank comes from; the other settings do not change it.
BANK_FIELDS = ("replay_samples", "replay_sampler_steps", "replay_states", "seed")


def short_digest(value: Any) -> str:
    """The first 12 hex digits of the SHA-256 of a value's JSON."""
    return digest(value)[:12]


def settings(changes: dict[str, Any]) -> UnlearnConfig:
    """The settings of a line."""
    return UnlearnConfig(**START | changes)


def row_key(changes: dict[str, Any], digit: int, evaluation: EvaluationConfig) -> str:
    """What one run is known by: every setting of unlearning and of evaluation in force, and the digit."""
    return short_digest([decisive(settings(changes)), digit, asdict(evaluation)])


def quality(metrics: dict[str, Any]) -> dict[str, float]:
    """The columns of a row that say how much was forgotten and what it cost, of what `evaluate` finds."""
    u_fid = metrics["u_fid"]
    return {
        "pul": round(metrics["pul"], 2),
        "u_fid": round(u_fid["after"], 3),
        "oracle": round(u_fid["oracle"], 3),
        "ratio": round(u_fid["after"] / u_fid["oracle"], 3),
        "kept_min": round(metrics["shares"]["kept_ratio_min"], 3),
    }


class Bench:
    """What all runs share, each kept in a file under a name that changes with what it is made from."""

    def __init__(self, config: EvaluationConfig) -> None:
        CACHE.mkdir(exist_ok=True)
        self.train, self.heldout = load_images("digits", split="train"), load_images("digits", split="heldout")
        self.config = config
        self.model = shipped_model()
        self.original = denoiser_of(load_pipeline(self.model))
        self.classifier = self._classifier()
        self.samples = self._samples()

    def _classifier(self) -> ImageClassifier:
        path = CACHE / f"digits-classifier-{self.config.classifier_seed}.safetensors"
        if not path.is_file():
            train_classifier(self.train, seed=self.config.classifier_seed).save(path)
        return ImageClassifier.load(path)

    def _samples(self) -> torch.Tensor:
        # The oracle needs as many samples without the class: a quarter more is enough for all digits.
        count = int(1.25 * self.config.samples)
        how = {"steps": self.config.sampler_steps, "seed": self.config.seed, "batch_size": self.config.batch_size}
        made_from = short_digest([fingerprint(self.original.module), count, how])
        path = CACHE / f"digits-samples-{made_from}.safetensors"
        if not path.is_file():
            save_tensors(path, {"images": sample_images(self.original, count, **how)})
        return load_tensors(path)[0]["images"]

    def _bank(self, config: UnlearnConfig) -> Path:
        made_from = [fingerprint(self.original.module), *(getattr(config, name) for name in BANK_FIELDS)]
        return CACHE / f"digits-bank-{short_digest(made_from)}.safetensors"

    def metrics(self, denoiser: Denoiser, digit: int) -> dict[str, Any]:
        """What `evaluate` finds of a model that was to forget the digit."""
        return evaluate(
            self.original,
            denoiser,
            train=self.train,
            heldout=self.heldout,
            forget=digit,
            config=self.config,
            classifier=self.classifier,
            original_samples=self.samples,
        ).metrics

    def run(self, changes: dict[str, Any], digit: int) -> dict[str, Any]:
        """Unlearn and evaluate one digit under one setting."""
        pipeline, config = load_pipeline(self.model), settings(changes)
        result = unlearn(
            pipeline,
            self.train.only(digit),
            posterior=self.model / "posterior.safetensors",
            config=config,
            bank=self._bank(config),
        )
        metrics = self.metrics(denoiser_of(pipeline), digit)
        return {
            "digit": digit,
            **quality(metrics),
            "original": round(metrics["u_fid"]["before"], 3),
            "forget_loss_ratio": round(metrics["forget_loss"]["ratio"], 3),
            "retained_loss_ratio": round(metrics["retained_loss"]["ratio"], 4),
            "dropped": result.filter_report.dropped if result.filter_report else "",
            "seconds": round(result.seconds["steps"], 1),
        }


def print_table() -> None:
    """One line per setting that has run on all digits."""
    print(
        f"{'setting':24} {'PUL median / least':>19} {'u-FID / oracle median / most':>29} {'kept min':>9} {'seconds':>8}"
    )
    by_setting: dict[str, list[dict[str, str]]] = {}
    for row in rows(RESULTS):
        by_setting.setdefault(row["setting"], []).append(row)
    for setting, runs in by_setting.items():
        pul, ratio, kept, seconds = ([float(r[c]) for r in runs] for c in ("pul", "ratio", "kept_min", "seconds"))
        print(
            f"{setting:24} {statistics.median(pul):9.1f} / {min(pul):6.1f} {statistics.median(ratio):19.2f} / "
            f"{max(ratio):6.2f} {min(kept):9.2f} {statistics.median(seconds):8.1f}   ({len(runs)} digits)"
        )


def measure_missing(settings: Iterable[str], digits: Iterable[int], evaluation: EvaluationConfig, part: str) -> None:
    """Run what has no row yet, in the order of the settings and, within each, of the digits."""
    number, parts = map(int, part.split("/"))
    bench: Bench | None = None
    jobs = [(setting, digit) for setting in settings for digit in digits][number::parts]
    for setting, digit in jobs:
        changes = SETTINGS[setting]
        key = row_key(changes, digit, evaluation)
        if any(row["key"] == key for row in rows(RESULTS)):
            continue
        bench = bench or Bench(evaluation)
        row = {"setting": setting, "changes": json.dumps(changes), **bench.run(changes, digit), **stamp(evaluation)}
        append(RESULTS, COLUMNS, row | {"key": key})
        print(setting, row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", default="0/1", help="i/n: do every n-th run, starting at the i-th")
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--digits", nargs="*", type=int, default=list(range(10)))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="print the table of what has run, and stop")
    arguments = parser.parse_args()
    if not arguments.table:
        torch.set_num_threads(arguments.threads)
        evaluation = EvaluationConfig(samples=arguments.samples, seed=EVALUATION_SEED)
        measure_missing(arguments.settings, arguments.digits, evaluation, arguments.part)
    print_table()


if __name__ == "__main__":
    main()
