"""Requests that come one after another: does what was forgotten first stay away when the next class goes?

Each request starts from the model that the one before has left, with the posterior of the original model around the
weights of now and a new replay bank, drawn by the model of now.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from typing import Any

import torch

from vdu_fast.baselines import get_method
from vdu_fast.baselines.method import MethodInputs, run_method
from vdu_fast.checkpoint import write_json_atomic
from vdu_fast.classifier import frechet_distance
from vdu_fast.comparison import Comparison
from vdu_fast.evaluation import percentage_unlearned
from vdu_fast.records import digest, read_record
from vdu_fast.report import plain
from vdu_fast.sampling import sample_images


def run(comparison: Comparison, labels: Sequence[int], seed: int) -> dict[str, Any]:
    """Forget the classes in turn; PUL of each so far and u-FID after every request, written to a file of its own."""
    decides = [list(labels), seed, asdict(comparison.settings_of("ours")), comparison.made_from]
    key = digest(decides)
    names = [comparison.train.class_names[label] for label in labels]
    path = comparison.output / "runs" / f"sequence-{'-'.join(names)}-seed-{seed}.json"
    if (record := read_record(path, key)) is not None:
        return record
    config, method = comparison.config, get_method("ours")
    how: dict[str, Any] = {"steps": config.sampler_steps, "seed": config.seed, "batch_size": config.batch_size}
    classify = comparison.classifier.embed_and_classify
    # The oracle loses three classes in ten, and needs as many samples as the models have.
    before = sample_images(comparison.original, 2 * config.samples, **how)
    features_before, labels_before = classify(before)
    drawn = torch.bincount(labels_before[: config.samples], minlength=len(comparison.train.class_names))
    denoiser = replace(comparison).original  # a copy of its own
    requests = []
    for done, label in enumerate(labels, start=1):
        run_method(
            method,
            denoiser,
            MethodInputs(comparison.forget_of(label, seed), None, comparison.weights),
            budget=None,
            seed=seed,
            settings=comparison.settings_of("ours"),
        )
        features, found = classify(sample_images(denoiser, config.samples, **how))
        gone = torch.tensor(labels[:done])
        assert comparison.train.labels is not None
        real = classify(comparison.train.images[~torch.isin(comparison.train.labels, gone)])[0]
        oracle = features_before[~torch.isin(labels_before, gone)][: config.samples]
        requests.append(
            {
                "pul": {
                    names[i]: percentage_unlearned(
                        int(drawn[other]), int((found == other).sum()), samples=config.samples, class_name=names[i]
                    )
                    for i, other in enumerate(labels[:done])
                },
                "u_fid": frechet_distance(features, real),
                "oracle": frechet_distance(oracle, real),
            }
        )
    record = plain({"key": key, "seed": seed, "classes": names, "requests": requests})
    write_json_atomic(path, record)
    return record


def run_all(comparison: Comparison, labels: Sequence[int], seeds: int, processes: int) -> list[dict[str, Any]]:
    """The sequence from every seed, several at a time, each in a process of one thread."""
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        return list(pool.map(_run_on_one_thread, [replace(comparison)] * seeds, [tuple(labels)] * seeds, range(seeds)))


def _run_on_one_thread(comparison: Comparison, labels: Sequence[int], seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return run(comparison, labels, seed)
