"""Requests that come one after another: does what was forgotten first stay away when the next class goes?

Each request starts from the model that the one before has left, with the posterior of the original model around the
weights of now. Its replay bank is what the one before passes on, or a new one, drawn by the model of now. Beside them,
whoever has kept the original model and the forget images of all requests can start from there again: all classes at
once, in as many steps as they would have had in turn.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from vdu_fast.checkpoint import fingerprint, write_json_atomic
from vdu_fast.classifier import frechet_distance
from vdu_fast.comparison import Comparison
from vdu_fast.evaluation import percentage_unlearned
from vdu_fast.freed_memory import keep_freed_memory
from vdu_fast.pipelines import Denoiser
from vdu_fast.records import decisive, digest, read_record
from vdu_fast.report import plain
from vdu_fast.sampling import sample_images
from vdu_fast.unlearner import PASSED_ON, unlearn

Way = Literal["passed-on", "new-banks", "at-once"]
WAYS: tuple[Way, ...] = get_args(Way)


@dataclass(frozen=True)
class Sequence:
    """Classes that are forgotten one after another, or at once, from a seed."""

    labels: tuple[int, ...]
    way: Way
    seed: int

    def path(self, comparison: Comparison) -> Path:
        """The file of its record."""
        classes = "-".join(comparison.train.class_names[label] for label in self.labels)
        return comparison.output / "runs" / f"sequence-{classes}-{self.way}-seed-{self.seed}.json"

    def key(self, comparison: Comparison) -> str:
        """A digest of all that decides its result."""
        settings = decisive(comparison.settings_of("ours"))
        return digest([list(self.labels), self.way, self.seed, settings, comparison.made_from])


def plan(labels: tuple[int, ...], seeds: int) -> list[Sequence]:
    """All sequences, seed by seed."""
    return [Sequence(labels, way, seed) for seed in range(seeds) for way in WAYS] if labels else []


def run(comparison: Comparison, sequence: Sequence) -> dict[str, Any]:
    """PUL of each class so far and u-FID after every request, written to a file of its own."""
    path, key, labels = sequence.path(comparison), sequence.key(comparison), sequence.labels
    if (record := read_record(path, key)) is not None:
        return record
    judge, original = _Judge(comparison), replace(comparison).original  # a copy of its own
    settings = replace(comparison.settings_of("ours"), seed=sequence.seed, device=str(original.device))
    forget = [comparison.forget_of(label, sequence.seed) for label in labels]

    def measured(images: Tensor, steps: int, gone: tuple[int, ...], **banks: Any) -> dict[str, Any]:
        how: dict[str, Any] = {"posterior": comparison.weights, "scheduler": original.scheduler}
        unlearn(original.module, images, config=replace(settings, steps=steps), **how, **banks)
        return judge(original, gone)

    if sequence.way == "at-once":
        requests = [measured(torch.cat(forget), len(labels) * settings.steps, labels)]
    else:
        requests = []
        with TemporaryDirectory() as folder:
            bank: Path | None = None
            for done, images in enumerate(forget, start=1):
                output = Path(folder) / str(done) if sequence.way == "passed-on" else None
                banks = {"bank": bank, "output": output, "pass_on_bank": output is not None}
                requests.append(measured(images, settings.steps, labels[:done], **banks))
                bank = None if output is None else output / PASSED_ON
    about = {
        "key": key,
        "judge": fingerprint(comparison.classifier),
        "classes": [comparison.train.class_names[label] for label in labels],
        "way": sequence.way,
        "seed": sequence.seed,
    }
    record = plain({**about, "requests": requests})
    write_json_atomic(path, record)
    return record


class _Judge:
    """Measures models from which several classes are gone."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison = comparison
        self.features, self.labels = comparison.classifier.embed_and_classify(_drawn_before(comparison))

    def __call__(self, denoiser: Denoiser, gone: tuple[int, ...]) -> dict[str, Any]:
        """PUL of each class that is gone, and u-FID beside the oracle's."""
        train, config = self.comparison.train, self.comparison.config
        classify, forgotten = self.comparison.classifier.embed_and_classify, torch.tensor(list(gone))
        features, found = classify(sample_images(denoiser, config.samples, **self.comparison.sampling))
        assert train.labels is not None
        real = classify(train.images[~torch.isin(train.labels, forgotten)])[0]
        oracle = self.features[~torch.isin(self.labels, forgotten)][: config.samples]
        drawn = self.labels[: config.samples]
        pul = {
            (name := train.class_names[label]): percentage_unlearned(
                int((drawn == label).sum()), int((found == label).sum()), samples=config.samples, class_name=name
            )
            for label in gone
        }
        return {"pul": pul, "u_fid": frechet_distance(features, real), "oracle": frechet_distance(oracle, real)}


def _drawn_before(comparison: Comparison) -> Tensor:
    """Samples of the original model: the oracle loses three classes in ten, and needs as many as the models have."""
    return comparison.draw_original(2 * comparison.config.samples, comparison.output / "sequences")


def run_all(comparison: Comparison, sequences: list[Sequence], processes: int) -> None:
    """Run what is missing of these, several at a time, each in a process of one thread."""
    missing = [one for one in sequences if read_record(one.path(comparison), one.key(comparison)) is None]
    if not missing:
        return
    _drawn_before(comparison)  # once, and not in every process
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for _ in pool.map(_run_on_one_thread, [replace(comparison)] * len(missing), missing):
            pass


def _run_on_one_thread(comparison: Comparison, sequence: Sequence) -> None:
    keep_freed_memory()
    torch.set_num_threads(1)
    run(comparison, sequence)
