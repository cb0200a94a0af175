"""`sweep`: runs over a grid of settings that share one replay bank, each kept in a file of its own.

A sweep that was stopped goes on where it was: a setting whose file was made from the same model, images, posterior and
other settings is read, not run again.
"""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from vdu_fast.checkpoint import fingerprint, fingerprint_tensors, load_tensors, save_tensors, write_json_atomic
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.filters import Filtered, check_positive_unlabelled
from vdu_fast.job import Job, Observers, check_inputs
from vdu_fast.pipelines import Denoiser
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.records import decisive, digest, read_record
from vdu_fast.replay import ReplayBank
from vdu_fast.request_bank import check_replay, filter_bank, filtered, obtain_bank
from vdu_fast.rng import Stream
from vdu_fast.sampling import sample_images, sampler_for
from vdu_fast.sweeping.choice import choose
from vdu_fast.sweeping.grid import SWEPT, Point, Setting, SweepConfig, check_base
from vdu_fast.sweeping.signals import ORIGINAL_SAMPLES, Signals
from vdu_fast.unlearning_run import UnlearningRun

logger = logging.getLogger(__name__)

# Called with (settings done, settings in all, what was done last).
SweepProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class SweepResult:
    """What a sweep found.

    Attributes:
        points: every measurement.
        chosen: the one to take.
        reached: whether it forgets as much as was asked for; otherwise it is the one that forgets most.
        config: the settings of `unlearn` that end in `chosen`.
        bank: file of the replay bank, for `unlearn(bank=...)`.
        failed: what went wrong in the settings that have no points, by name.
    """

    points: list[Point]
    chosen: Point
    reached: bool
    config: UnlearnConfig
    bank: Path
    failed: dict[str, str]


def sweep(
    model: Any,
    forget_images: Tensor | ImageSet,
    *,
    posterior: GaussianPosterior | str | Path,
    output: Path | str,
    config: UnlearnConfig | None = None,
    grid: SweepConfig | None = None,
    scheduler: Any = None,
    bank: str | Path | None = None,
    observers: Observers | None = None,
    progress: SweepProgress | None = None,
) -> SweepResult:
    """Find gamma, lambda, steps and more for a model, from the forget images and what the model draws.

    Args:
        model, forget_images, posterior, scheduler: as for `vdu_fast.unlearn`; the model is moved to the device, and its
            weights stay as they are.
        output: folder for the replay bank, the samples of the original model and one file per setting. What is in it
            from the same inputs is not made again.
        config: all other settings; gamma, replay_weight, hinge_ratio and steps of it are replaced by the grid's, and
            forget_share and replay_guidance are refused, but at their defaults.
        grid: what is tried and how it is measured.
        bank: file of a replay bank, read when it exists, otherwise written; None keeps one in `output`.
        observers: `on_sample` and `on_message` are called.
        progress: called before the first setting and after each.

    Raises:
        InputError: anything unusable in the above, or every setting failed.
    """
    config, grid = config or UnlearnConfig(), grid or SweepConfig()
    check_base(config, grid)
    job = check_inputs(model, forget_images, posterior, config, scheduler, observers or Observers())
    # Asked here, before the minutes that the bank takes.
    sampler_for(job.denoiser, grid.sampler_steps)
    check_positive_unlabelled(job.denoiser, job.images, config.feature_module)
    check_replay(replace(job, config=replace(config, replay_guidance=max(grid.replay_guidances))), bank, None, None)
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    this = Sweep(job, grid, output, Path(bank) if bank is not None else None)
    records = this.run_all(grid.settings(), progress or (lambda done, total, text: None))
    points = [Point(**values) for record in records for values in record["points"]]
    failed = {record["name"]: record["failed"] for record in records if record["failed"] is not None}
    if not points:
        raise InputError(f"every setting failed, the first one so: {next(iter(failed.values()))}")
    chosen, reached = choose(points, grid.least_forgotten)
    found = chosen.setting.applied(config, chosen.steps)
    return SweepResult(points, chosen, reached, found, this.bank_file, failed)


class Sweep:
    """What the runs of one sweep share, each part made when it is first needed.

    Args:
        job: the checked inputs.
        grid: what is measured.
        output: an existing folder.
        bank: file of the bank, None for one in `output`.
    """

    def __init__(self, job: Job, grid: SweepConfig, output: Path, bank: Path | None) -> None:
        self.job, self.grid, self.output = job, grid, output
        self.original = job.denoiser
        self._model = fingerprint(self.original.module)
        config = job.config
        made_from = [self._model, config.replay_samples, config.replay_sampler_steps, config.replay_states, config.seed]
        self._kept: tuple[float, ReplayBank] | None = None
        self.bank_file = bank or output / f"bank-{digest(made_from)}.safetensors"

    @cached_property
    def bank(self) -> ReplayBank:
        return obtain_bank(self.job, self.bank_file)

    @cached_property
    def found(self) -> Filtered:
        """What the filter says of the bank."""
        return filtered(self.job, self.bank, None, None)

    def kept(self, guidance: float) -> ReplayBank:
        """The bank without what must go, guided so far; the last one is remembered.

        Raises:
            InputError: too little is left, or nothing can be guided.
        """
        if self._kept is None or self._kept[0] != guidance:
            self._kept = None  # before there are two
            job = replace(self.job, config=replace(self.job.config, replay_guidance=guidance))
            self._kept = guidance, filter_bank(job, self.bank, self.found)[0]
        return self._kept[1]

    @cached_property
    def worker(self) -> Denoiser:
        """The network that is unlearned, again and again from the start."""
        worker = Denoiser(copy.deepcopy(self.original.module), self.original.scheduler, self.original.sample_shape)
        worker.execution = self.job.config.execution
        return worker

    @cached_property
    def signals(self) -> Signals:
        config = self.job.config
        return Signals(
            self.original,
            self.original_samples,
            self.job.images,
            samples=self.grid.samples,
            feature_module=config.feature_module,
            batch_size=config.inference_batch_size,
        )

    @cached_property
    def original_samples(self) -> Tensor:
        """What the original model draws, from the output folder when it is there."""
        count = ORIGINAL_SAMPLES * self.grid.samples
        made_from = [self._model, count, self.grid.sampler_steps, self.grid.sample_seed]
        path = self.output / f"samples-{digest(made_from)}.safetensors"
        if not path.is_file():
            self.job.observers.say(f"drawing {count} images from the model to compare with")
            save_tensors(path, {"images": self._draw(self.original, count)})
        return load_tensors(path)[0]["images"]

    def _draw(self, denoiser: Denoiser, count: int) -> Tensor:
        return sample_images(
            denoiser,
            count,
            steps=self.grid.sampler_steps,
            seed=self.grid.sample_seed,
            batch_size=self.job.config.inference_batch_size,
            stream=Stream.SWEEP,
        )

    @cached_property
    def _made_from(self) -> dict[str, Any]:
        """What every run depends on, beside its setting."""
        shared = {name: value for name, value in decisive(self.job.config).items() if name not in SWEPT}
        posterior = self.job.posterior
        bank = {"images": self.bank.images, "x_t": self.bank.x_t, "predictions": self.bank.predictions}
        return {
            "model": self._model,
            "forget_images": fingerprint_tensors({"images": self.job.images}),
            "posterior": fingerprint_tensors(posterior.std),
            "posterior_mean": None if posterior.mean is None else fingerprint_tensors(posterior.mean),
            "bank": fingerprint_tensors(bank),
            "settings": shared,
            "measured": self.grid.measured_by(),
        }

    def path(self, setting: Setting) -> Path:
        """The file of a setting."""
        return self.output / "settings" / f"{setting.name}.json"

    def key(self, setting: Setting) -> str:
        """A digest of all that decides the measurements of a setting."""
        return digest([asdict(setting), self._made_from])

    def finished(self, setting: Setting) -> dict[str, Any] | None:
        """The record of a setting that was measured under the inputs of now, or None."""
        return read_record(self.path(setting), self.key(setting))

    def run_all(self, settings: Sequence[Setting], progress: SweepProgress) -> list[dict[str, Any]]:
        """The records of the settings, in their order; those that are finished are read, not made again."""
        records = {setting: record for setting in settings if (record := self.finished(setting)) is not None}
        progress(len(records), len(settings), "finished before" if records else "")
        for setting in settings:
            if setting not in records:
                records[setting] = record = self.run(setting)
                progress(len(records), len(settings), describe(record))
        return [records[setting] for setting in settings]

    def run(self, setting: Setting) -> dict[str, Any]:
        """Measure a setting, whether it was done before or not; the record is written to its file."""
        # Made here, because where these fail no setting can be measured; guidance can fail alone.
        signals, _ = self.signals, self.kept(0.0) if setting.replay_guidance == 0 else self.found
        began = time.perf_counter()
        record: dict[str, Any] = {"name": setting.name, "key": self.key(setting), "points": [], "failed": None}
        try:
            for run, steps in self.states(setting):
                images = self._draw(self.worker, self.grid.samples)
                checked = run.history[-1]
                point = Point(
                    **asdict(setting),
                    steps=steps,
                    **signals.measure(images),
                    replay_distance=checked["replay_check"],
                    forget_ratio=checked["forget_ratio"],
                )
                record["points"].append(asdict(point))
        except InputError as error:
            logger.warning("%s failed: %s", setting.name, error)
            record["failed"] = str(error)
        record["seconds"] = round(time.perf_counter() - began, 2)
        write_json_atomic(self.path(setting), record)
        return record

    def states(self, setting: Setting) -> Iterator[tuple[UnlearningRun, int]]:
        """Put into `worker` what the setting ends with after each number of steps; yields the run and that number."""
        self.worker.module.load_state_dict(self.original.module.state_dict())
        config = setting.applied(self.job.config, max(self.grid.step_counts))
        kept = self.kept(setting.replay_guidance)
        run = UnlearningRun(self.worker, self.job.images, self.job.posterior, kept, config)
        try:
            for steps in annealed_states(run, self.grid.step_counts):
                yield run, steps
        finally:
            run.release()


def annealed_states(run: UnlearningRun, step_counts: Sequence[int]) -> Iterator[int]:
    """Put into the network, for one number of steps after another, the mean that a run of just these steps ends with.

    Runs of different lengths are equal bit for bit until the shortest begins to anneal, or ends to forget, so that one
    trunk at the full rate serves them all: a copy of its state is annealed for each.

    Args:
        run: at its start; `config.steps` must be the largest of the counts.
        step_counts: ascending.

    Yields:
        The number of steps that the network's weights are now the result of.
    """
    config = run.config
    for steps in step_counts:
        while run.step_number < min(int(steps * (1 - config.anneal)), replace(config, steps=steps).forget_steps):
            run.step()
        trunk = {name: tensor.clone() for name, tensor in run.state_dict().items()}
        run.config = replace(config, steps=steps)
        try:
            while run.step_number < steps:
                run.step()
            run.write_mean()
            yield steps
        finally:
            run.config = config
        run.load_state_dict(trunk)


def describe(record: dict[str, Any]) -> str:
    """A setting's record on one line."""
    if record["failed"] is not None:
        return f"{record['name']}: failed"
    last = Point(**record["points"][-1])
    return f"{record['name']}: estimated PUL {last.pul:.1f}, kept distance x {last.ratio:.2f}"
