"""Methods side by side: one run for every (class, seed, method), each kept in a file of its own, so that a comparison
that was stopped goes on where it was.

Every run starts from the same model, gets the same number of network evaluations (those that `unlearn` needs, or more),
sees only the data that its method may see, and is judged by the same classifier on the same starting noise. Classifier
and samples of the original model are made once and kept beside the runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor
from concurrent.futures import wait as first_done
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdu_fast.baselines import get_method
from vdu_fast.baselines.budget import evaluations_of_unlearn
from vdu_fast.baselines.method import MethodInputs, run_method
from vdu_fast.checkpoint import fingerprint, load_tensors, save_tensors, write_json_atomic
from vdu_fast.classifier import ImageClassifier, train_classifier
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.evaluation import EvaluationConfig, evaluate, fixed_subset, percentage_unlearned
from vdu_fast.freed_memory import keep_freed_memory
from vdu_fast.persistence import PersistenceConfig, check_count, measure_persistence
from vdu_fast.pipelines import Denoiser, denoiser_of, load_pipeline, pick_device
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.pretrain import PretrainConfig
from vdu_fast.records import decisive, digest, read_record
from vdu_fast.report import plain, software_versions
from vdu_fast.sampling import sample_images

# Called with (runs done, runs in all, what was done last).
ComparisonProgress = Callable[[int, int, str], None]

# The oracle fills the gaps that a class leaves from later samples; this many more are enough for one class in six.
_SPARE_SAMPLES = 1.25


@dataclass(frozen=True)
class Job:
    """One run: forget the class `label` by a method from a seed."""

    label: int
    method: str
    seed: int


@dataclass(frozen=True, eq=False)
class Comparison:
    """A comparison of methods on one model.

    Attributes:
        model: pipeline folder of the trained model; with the pretrain.json of `vdu-fast pretrain` for "retrain".
        posterior: over its weights, or the file that holds it.
        train: labelled images: those of a class are forgotten, the others are retained and the u-FID reference.
        heldout: labelled images of the same classes that the model did not see.
        output: folder for the runs and what they share.
        config: how results are measured.
        settings: of methods, by name, in the place of their defaults.
        device: where models run; "auto" takes CUDA where there is one.
        persistence: asks every run whether the class stays forgotten, too; None does not.
        forget_images: of the class, that methods see: a random choice, another one for every seed. None is all.
        evaluations: of the network, that a run may spend; None is what `unlearn` needs under its settings.
        shared: folder for what the runs share, which several comparisons of one model can use; None is one in `output`.
    """

    model: Path
    posterior: GaussianPosterior | Path
    train: ImageSet
    heldout: ImageSet
    output: Path
    config: EvaluationConfig = field(default_factory=EvaluationConfig)
    settings: Mapping[str, Any] = field(default_factory=dict)
    device: str = "auto"
    persistence: PersistenceConfig | None = None
    forget_images: int | None = None
    evaluations: int | None = None
    shared: Path | None = None

    def __post_init__(self) -> None:
        for name in ("forget_images", "evaluations"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name}: got {value}; accepted are whole numbers from 1 up. Raise it.")

    @cached_property
    def original(self) -> Denoiser:
        """The model before unlearning."""
        return self._load()

    def _load(self) -> Denoiser:
        denoiser = denoiser_of(load_pipeline(self.model))
        denoiser.module.to(pick_device(self.device, denoiser.module))
        return denoiser

    @cached_property
    def weights(self) -> GaussianPosterior:
        """The posterior, loaded."""
        return (
            self.posterior if isinstance(self.posterior, GaussianPosterior) else GaussianPosterior.load(self.posterior)
        )

    @cached_property
    def pretraining(self) -> PretrainConfig | None:
        """How the model was trained, or None where no pretrain.json says so."""
        return read_pretraining(self.model)

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """What every run depends on, as digests."""
        pixels = hashlib.sha256()
        for images in (self.train, self.heldout):
            pixels.update(images.images.numpy().tobytes())
            if images.labels is not None:
                pixels.update(images.labels.numpy().tobytes())
        spread = hashlib.sha256()
        for name, std in sorted(self.weights.std.items()):
            spread.update(name.encode() + std.float().contiguous().numpy().tobytes())
        return {
            "model": fingerprint(self.original.module),
            "posterior": spread.hexdigest()[:16],
            "data": pixels.hexdigest()[:16],
            "evaluation": asdict(self.config),
        }

    def settings_of(self, method: str) -> Any:
        """The settings that a method runs with."""
        return self.settings[method] if method in self.settings else get_method(method).settings()

    def budget(self, label: int) -> int:
        """Network evaluations that every method may spend on a class."""
        if self.evaluations is not None:
            return self.evaluations
        config = self.settings.get("ours", UnlearnConfig())
        return evaluations_of_unlearn(config, len(self.forget_of(label, seed=0)))

    def forget_of(self, label: int, seed: int) -> Tensor:
        """The images of a class that the methods of this seed see."""
        images = self.train.only(label).images
        return images if self.forget_images is None else fixed_subset(images, self.forget_images, seed)

    def key(self, job: Job) -> str:
        """A digest of all that decides the result of a run."""
        decides = [asdict(job), decisive(self.settings_of(job.method)), self.budget(job.label), self.made_from]
        if self.forget_images is not None:
            decides.append({"forget_images": self.forget_images})
        if job.method == "retrain" and self.pretraining is not None:
            decides.append(asdict(self.pretraining))
        return digest(decides)

    def path(self, job: Job) -> Path:
        """The file of a run."""
        return self.output / "runs" / f"class-{job.label}-{job.method}-seed-{job.seed}.json"

    @property
    def _shared(self) -> Path:
        return self.shared or self.output / "shared"

    def finished(self, job: Job) -> dict[str, Any] | None:
        """The record of a run that was made under the settings of now, or None."""
        record = self._evaluated(job)
        if record is None or self.persistence is None:
            return record and {name: part for name, part in record.items() if name != "persistence"}
        return record if record.get("persistence", {}).get("settings") == plain(self.persistence) else None

    def _evaluated(self, job: Job) -> dict[str, Any] | None:
        """The record of a run of which unlearning and evaluation, at least, were made under the settings of now."""
        return read_record(self.path(job), self.key(job))

    @cached_property
    def classifier(self) -> ImageClassifier:
        """The judge, trained on the training images when it is not in the output folder."""
        made_from = digest([self.made_from["data"], self.config.classifier_seed])
        path = self._shared / f"classifier-{made_from}.safetensors"
        if not path.is_file():
            train_classifier(self.train, seed=self.config.classifier_seed).save(path)
        return ImageClassifier.load(path)

    @cached_property
    def original_samples(self) -> Tensor:
        """What the original model draws, from the output folder when it is there."""
        return self.draw_original(int(_SPARE_SAMPLES * self.config.samples), self._shared)

    @property
    def sampling(self) -> dict[str, Any]:
        """How every model is sampled, as `sample_images` takes it."""
        config = self.config
        return {"steps": config.sampler_steps, "seed": config.seed, "batch_size": config.batch_size}

    def draw_original(self, count: int, folder: Path) -> Tensor:
        """So many samples of the original model, from a file in the folder when it is there."""
        path = folder / f"samples-{digest([self.made_from['model'], count, self.sampling])}.safetensors"
        if not path.is_file():
            save_tensors(path, {"images": sample_images(self.original, count, **self.sampling)})
        return load_tensors(path)[0]["images"]

    def check_drawn(self, label: int) -> None:
        """InputError where the original model does not draw the class: asked before anything is unlearned."""
        name, samples = self.train.class_names[label], self.config.samples
        drawn = self.classifier.embed_and_classify(self.original_samples)[1] == label
        percentage_unlearned(int(drawn[:samples].sum()), 0, samples=samples, class_name=name)
        if self.persistence is not None:
            samples = self.persistence.relearn_samples
            check_count(int(drawn[:samples].sum()), samples=samples, class_name=name)

    def run(self, job: Job) -> dict[str, Any]:
        """Unlearn and measure; the record is written to the run's file.

        Of a run that was evaluated earlier, persistence alone is measured. Its model was not kept; unlearning gives it
        again, but for rounding where device or threads are others.
        """
        forget, retained = self.forget_of(job.label, job.seed), self.train.without(job.label).images
        denoiser, method = self._load(), get_method(job.method)
        spent = run_method(
            method,
            denoiser,
            MethodInputs(forget, retained, self.weights, self.pretraining),
            budget=self.budget(job.label),
            seed=job.seed,
            settings=self.settings_of(job.method),
        )
        record = self._evaluated(job) if self.persistence is not None else None
        record = record or self._evaluate(job, denoiser, spent)
        if self.persistence is not None:
            how = self._measured_on(job)
            answers = measure_persistence(self.original, denoiser, persistence=self.persistence, **how)
            record["persistence"] = plain(answers)
            write_json_atomic(self.path(job), record)
        return record

    def _measured_on(self, job: Job) -> dict[str, Any]:
        """What all measurements of a run share."""
        return {
            "train": self.train,
            "heldout": self.heldout,
            "forget": job.label,
            "config": self.config,
            "classifier": self.classifier,
            "original_samples": self.original_samples,
        }

    def _evaluate(self, job: Job, denoiser: Denoiser, spent: Mapping[str, Any]) -> dict[str, Any]:
        """The record of a run without persistence, written to the run's file."""
        metrics = evaluate(self.original, denoiser, **self._measured_on(job)).metrics
        record = {
            **spent,
            "key": self.key(job),
            "label": job.label,
            "class": self.train.class_names[job.label],
            "forget_images": len(self.forget_of(job.label, job.seed)),
            "made_from": self.made_from,
            "judge": fingerprint(self.classifier),
            "threads": torch.get_num_threads(),
            "device": self.original.device.type,
            "versions": software_versions(),
            "metrics": metrics,
        }
        record = plain(record)
        write_json_atomic(self.path(job), record)
        return record


def read_pretraining(model: Path) -> PretrainConfig | None:
    """The settings in the pretrain.json of a pipeline folder, or None where there is none.

    Raises:
        InputError: it holds something else.
    """
    path = model / "pretrain.json"
    if not path.is_file():
        return None
    try:
        return PretrainConfig(**json.loads(path.read_text())["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--model: {path} does not hold the settings of `vdu-fast pretrain` ({error}). Remove it, and leave "
            "retrain out of --methods."
        ) from error


def plan(methods: Sequence[str], labels: Sequence[int], seeds: int) -> list[Job]:
    """All runs, seed by seed and class by class, so that what is done early compares all methods."""
    return [Job(label, method, seed) for seed in range(seeds) for label in labels for method in methods]


def run_all(
    comparison: Comparison, jobs: Sequence[Job], *, processes: int = 1, progress: ComparisonProgress | None = None
) -> list[dict[str, Any]]:
    """The records of the jobs, in their order; those that are finished are read, not made again.

    Args:
        processes: runs at a time, each in a process of one thread; 1 runs here, with the threads that torch has here.
        progress: called before the first run and after each.

    Raises:
        InputError: a method lacks what it needs; asked before the first run.
    """
    if any(job.method == "retrain" for job in jobs) and comparison.pretraining is None:
        raise InputError(
            f"--methods: retrain needs the pretrain.json that `vdu-fast pretrain` writes, and {comparison.model} has "
            "none. Leave retrain out."
        )
    report = progress or (lambda done, total, text: None)
    records = {job: record for job in jobs if (record := comparison.finished(job)) is not None}
    report(len(records), len(jobs), "finished before" if records else "")
    missing = [job for job in jobs if job not in records]
    if missing:
        # Makes classifier and samples, too, before the processes start, which would all make them otherwise.
        for label in {job.label for job in missing}:
            comparison.check_drawn(label)

    def keep(job: Job, record: dict[str, Any]) -> None:
        records[job] = record
        pul, u_fid = record["metrics"]["pul"], record["metrics"]["u_fid"]["after"]
        report(len(records), len(jobs), f"{record['title']}, class {record['class']}: PUL {pul:.1f}, u-FID {u_fid:.2f}")

    if processes == 1 or len(missing) < 2:
        for job in missing:
            keep(job, comparison.run(job))
    else:
        # A forked process would inherit torch's threads without being able to use them.
        # What this process has loaded already stays here: a copy carries the fields alone.
        context, shared = get_context("spawn"), (replace(comparison),)
        with ProcessPoolExecutor(processes, context, initializer=_start_process, initargs=shared) as pool:
            # No more at a time than there are processes: what waits in the pool could not all be called back.
            waiting, running = iter(missing), dict[Future[dict[str, Any]], Job]()

            def begin_next() -> None:
                if (job := next(waiting, None)) is not None:
                    running[pool.submit(_run_in_process, job)] = job

            try:
                for _ in range(processes):
                    begin_next()
                while running:
                    for future in first_done(running, return_when=FIRST_COMPLETED).done:
                        keep(running.pop(future), future.result())
                        begin_next()
            except BaseException:
                # What is under way is finished, and kept in its file.
                pool.shutdown(wait=True, cancel_futures=True)
                raise
    return [records[job] for job in jobs]


_comparison: Comparison | None = None


def _start_process(comparison: Comparison) -> None:
    global _comparison
    threading.Thread(target=_end_with_parent, daemon=True).start()
    keep_freed_memory()
    torch.set_num_threads(1)
    _comparison = comparison


def _end_with_parent() -> None:
    """A parent that was killed would leave this process waiting for its next job for good."""
    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run_in_process(job: Job) -> dict[str, Any]:
    assert _comparison is not None
    return _comparison.run(job)
