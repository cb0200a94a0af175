"""Requests that come one after another: does what was forgotten first stay away when the next class goes?

Each request starts from the model that the one before has left, with the posterior of the original model around the
weights of now and a new replay bank, drawn by the model of now. Beside it, whoever has kept the original model and the
forget images of all requests can start from there again: all classes at once, in as many steps as they would have had
in turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdu_fast.baselines import get_method
from vdu_fast.baselines.method import MethodInputs, run_method
from vdu_fast.checkpoint import fingerprint, write_json_atomic
from vdu_fast.classifier import frechet_distance
from vdu_fast.comparison import Comparison
from vdu_fast.evaluation import percentage_unlearned
from vdu_fast.pipelines import Denoiser
from vdu_fast.records import decisive, digest, read_record
from vdu_fast.report import plain
from vdu_fast.sampling import sample_images


def run(comparison: Comparison, labels: Sequence[int], seed: int) -> dict[str, Any]:
    """PUL of each class so far and u-FID after every request, and of all at once, written to a file of its own."""
    settings = comparison.settings_of("ours")
    classes = [comparison.train.class_names[label] for label in labels]
    path, key = path_of(comparison, labels, seed), key_of(comparison, labels, seed)
    if (record := read_record(path, key)) is not None:
        return record
    judge = _Judge(comparison)
    forget = [comparison.forget_of(label, seed) for label in labels]

    def measured(denoiser: Denoiser, images: Tensor, steps: int, gone: Sequence[int]) -> dict[str, Any]:
        inputs, how = MethodInputs(images, None, comparison.weights), replace(settings, steps=steps)
        run_method(get_method("ours"), denoiser, inputs, budget=None, seed=seed, settings=how)
        return judge(denoiser, gone)

    in_turn, anew = replace(comparison).original, replace(comparison).original  # a copy of its own for each
    requests = [measured(in_turn, images, settings.steps, labels[: done + 1]) for done, images in enumerate(forget)]
    at_once = measured(anew, torch.cat(forget), len(labels) * settings.steps, labels)
    about = {"key": key, "judge": fingerprint(comparison.classifier), "seed": seed, "classes": classes}
    record = plain({**about, "requests": requests, "at_once": at_once})
    write_json_atomic(path, record)
    return record


def path_of(comparison: Comparison, labels: Sequence[int], seed: int) -> Path:
    """The file of a sequence."""
    classes = [comparison.train.class_names[label] for label in labels]
    return comparison.output / "runs" / f"sequence-{'-'.join(classes)}-seed-{seed}.json"


def key_of(comparison: Comparison, labels: Sequence[int], seed: int) -> str:
    """A digest of all that decides its result."""
    return digest([list(labels), seed, decisive(comparison.settings_of("ours")), comparison.made_from])


class _Judge:
    """Measures models from which several classes are gone."""

    def __init__(self, comparison: Comparison) -> None:
        self.comparison, config = comparison, comparison.config
        how = {"steps": config.sampler_steps, "seed": config.seed, "batch_size": config.batch_size}
        self.how: dict[str, Any] = how
        # The oracle loses three classes in ten, and needs as many samples as the models have.
        before = sample_images(comparison.original, 2 * config.samples, **how)
        self.features, self.labels = comparison.classifier.embed_and_classify(before)

    def __call__(self, denoiser: Denoiser, gone: Sequence[int]) -> dict[str, Any]:
        """PUL of each class that is gone, and u-FID beside the oracle's."""
        train, config = self.comparison.train, self.comparison.config
        classify, forgotten = self.comparison.classifier.embed_and_classify, torch.tensor(list(gone))
        features, found = classify(sample_images(denoiser, config.samples, **self.how))
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


def run_all(comparison: Comparison, labels: Sequence[int], seeds: int, processes: int) -> list[dict[str, Any]]:
    """The sequence from every seed, several at a time, each in a process of one thread."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(_run_on_one_thread, [replace(comparison)] * seeds, [tuple(labels)] * seeds, range(seeds)))


def _run_on_one_thread(comparison: Comparison, labels: Sequence[int], seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run(comparison, labels, seed)
