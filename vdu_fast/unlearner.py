"""`unlearn`: from a pipeline, forget images and a posterior to a pipeline that no longer draws them."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdu_fast.checkpoint import (
    StoppedAtOnce,
    fingerprint,
    load_tensors,
    prepare_output,
    save_tensors,
    write_json_atomic,
)
from vdu_fast.config import UnlearnConfig
from vdu_fast.data import ImageSet, check_fits
from vdu_fast.errors import InputError
from vdu_fast.execution import Execution
from vdu_fast.filters import (
    Filtered,
    FilterReport,
    check_positive_unlabelled,
    classifier_filter,
    positive_unlabelled_filter,
)
from vdu_fast.guidance import bank_of_next, guide
from vdu_fast.phases import phase
from vdu_fast.pipelines import Denoiser, denoiser_of, pick_device, save_pipeline
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.records import decisive
from vdu_fast.replay import ReplayBank, build_bank, check_memory
from vdu_fast.unlearning_run import UnlearningRun, check_run

logger = logging.getLogger(__name__)

STATE_FILE = "resume/unlearn.safetensors"
BANK_FILE = "resume/bank.safetensors"
LAST_GOOD = "last-good"

OnStep = Callable[[dict[str, Any]], None]
OnSample = Callable[[int], None]


@dataclass
class UnlearnResult:
    """What `unlearn` gives back.

    Attributes:
        model: the pipeline or module that was given, now with the new weights.
        steps: optimizer steps done; `weights_from_step` is the step whose weights were kept.
        stopped_because: the reason in words.
        history: one record per step.
        filter_report: what the filter kept and dropped, or None without a bank.
        bank: how many images the unfiltered bank had and what it was made with, or None.
        seconds: of "bank", "filter" and "steps", and their sum "unlearn"; those of an interrupted part are in them.
        config: the settings used.
        execution: how the network was run in the end: uncompiled where `compile` could not be used.
    """

    model: Any
    steps: int
    weights_from_step: int
    stopped_because: str
    history: list[dict[str, float]]
    filter_report: FilterReport | None
    bank: dict[str, Any] | None
    seconds: dict[str, float]
    config: UnlearnConfig
    execution: Execution

    def record(self) -> dict[str, Any]:
        """Everything but the model, ready for JSON."""
        return {
            "steps": self.steps,
            "weights_from_step": self.weights_from_step,
            "stopped_because": self.stopped_because,
            "bank": self.bank,
            "filter": asdict(self.filter_report) if self.filter_report else None,
            "seconds": self.seconds,
            "settings": asdict(self.config),
            "execution": asdict(self.execution),
            "history": self.history,
        }


@dataclass
class Observers:
    """Callbacks of a run; each may be None.

    Attributes:
        on_step: called after each step with its record and `images_per_second`.
        on_sample: called with the number of new replay trajectories.
        on_message: called with one line about what was decided.
    """

    on_step: OnStep | None = None
    on_sample: OnSample | None = None
    on_message: Callable[[str], None] | None = None

    def say(self, message: str) -> None:
        logger.info(message)
        if self.on_message is not None:
            self.on_message(message)


@dataclass
class Job:
    """The checked inputs of one call."""

    model: Any
    denoiser: Denoiser
    images: Tensor
    posterior: GaussianPosterior
    config: UnlearnConfig
    observers: Observers
    output: Path | None
    seconds: dict[str, float] = field(default_factory=dict)


def unlearn(
    model: Any,
    forget_images: Tensor | ImageSet,
    *,
    posterior: GaussianPosterior | str | Path,
    config: UnlearnConfig | None = None,
    scheduler: Any = None,
    bank: ReplayBank | str | Path | None = None,
    next_bank: str | Path | None = None,
    classifier: nn.Module | None = None,
    forget_label: int | None = None,
    retained_images: Tensor | None = None,
    output: Path | str | None = None,
    overwrite: bool = False,
    resume: bool = False,
    observers: Observers | None = None,
) -> UnlearnResult:
    """Make a diffusion model forget what the given images show, and keep the rest.

    Args:
        model: a diffusers pipeline (see `vdu_fast.pipelines.SUPPORTED`), or any nn.Module called as
            module(x_t, timesteps); a module needs `scheduler`. Changed in place.
        forget_images: float [N, C, H, W] in [-1, 1], of the size the model draws.
        posterior: over the model's parameters, or the file that holds it.
        config: settings; None is the default recipe.
        scheduler: diffusers scheduler or NoiseSchedule, for a bare module only.
        bank: a replay bank of this model, or a file: read when it exists, otherwise written there. None makes one.
        next_bank: file to write for the `bank` of the next request, on the model that this one makes. The next one then
            keeps what the first model drew and predicted, and the losses of requests do not add up.
        classifier: for bank_filter "classifier": maps images [B, C, H, W] to logits [B, classes]. Never judge the
            result with the same classifier.
        forget_label: the class index that `classifier` gives to what must go.
        retained_images: only measured, for the history; never trained on.
        output: folder for the new pipeline, unlearn.json and, while it runs, the state for `resume`.
        overwrite, resume: see `vdu_fast.checkpoint.prepare_output`; without them a `next_bank` that exists is refused.
        observers: progress callbacks.

    Returns:
        The result; `result.model` is `model`, ready for `save_pretrained`.

    Raises:
        InputError: anything unusable in the above, or a loss that is not finite (the last good weights are kept in
            `model`, and in `output` when given).
    """
    config = config or UnlearnConfig()
    job = check_inputs(model, forget_images, posterior, config, scheduler, observers or Observers())
    if config.replay_weight > 0:
        check_replay(job, bank, classifier, forget_label, passed_on=next_bank is not None)
    if next_bank is not None:
        check_next_bank(Path(next_bank), bank, config, replace=overwrite or resume)
    if output is not None:
        job.output = prepare_output(output, overwrite=overwrite, resume=resume, owned=STATE_FILE)
        if not resume:
            shutil.rmtree(job.output / "resume", ignore_errors=True)
    elif resume:
        raise InputError("resume needs the output folder of the interrupted run.")
    report = used = None
    kept: ReplayBank | None = None
    left: ReplayBank | None = None
    if config.replay_weight > 0:
        whole = obtain_bank(job, bank)
        used = whole.made_from | {"images": len(whole)}
        kept, report, left = filter_bank(job, whole, classifier, forget_label, pass_on=next_bank is not None)
        del whole
    run = UnlearningRun(job.denoiser, job.images, job.posterior, kept, config, retained_images=retained_images)
    try:
        reason = _drive(run, job, resume=resume)
        step = run.finish()
    except BaseException:
        run.write_mean()
        run.release()
        raise
    result = UnlearnResult(
        model, run.step_number, step, reason, run.history, report, used, job.seconds, config, job.denoiser.execution
    )
    if left is not None:
        assert next_bank is not None
        left.of_model(job.denoiser).save(next_bank)
    if job.output is not None:
        _write(result, job)
    return result


def check_inputs(
    model: Any,
    forget_images: Tensor | ImageSet,
    posterior: GaussianPosterior | str | Path,
    config: UnlearnConfig,
    scheduler: Any,
    observers: Observers,
) -> Job:
    images = forget_images.images if isinstance(forget_images, ImageSet) else forget_images
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        shape = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InputError(f"forget_images must be a float tensor [N, C, H, W] with N >= 1, got {shape}.")
    if not images.isfinite().all() or images.abs().max() > 1.001:
        raise InputError("forget_images must lie in [-1, 1]; scale 8-bit images by x / 127.5 - 1.")
    if isinstance(model, nn.Module):
        if scheduler is None:
            raise InputError("a bare module needs scheduler=..., the diffusers scheduler it was trained with.")
        denoiser = Denoiser(model, scheduler, tuple(images.shape[1:]))  # type: ignore[arg-type]
    else:
        denoiser = denoiser_of(model)
    channels, height, width = denoiser.sample_shape
    named = forget_images if isinstance(forget_images, ImageSet) else ImageSet(images, None, (), "forget_images")
    check_fits(named, sample_size=(height, width), channels=channels, argument="forget")
    if not isinstance(posterior, GaussianPosterior):
        posterior = GaussianPosterior.load(posterior)
    check_run(denoiser, posterior, config)
    for name, parameter in denoiser.module.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"the model's {name} holds NaN or infinity; give an intact model.")
    denoiser.module.to(pick_device(config.device, denoiser.module))
    denoiser.execution = config.execution
    return Job(model, denoiser, images.float(), posterior, config, observers, None)


def check_replay(
    job: Job,
    bank: ReplayBank | str | Path | None,
    classifier: nn.Module | None,
    forget_label: int | None,
    *,
    passed_on: bool = False,
) -> None:
    """InputError when the bank cannot be made, kept or filtered: asked before the minutes that drawing it takes."""
    config = job.config
    if isinstance(bank, str | Path) and Path(bank).is_dir():
        raise InputError(f"--bank {bank} is a folder; name a .safetensors file in it.")
    if bank is None and config.replay_samples < config.replay_batch_size:
        raise InputError(
            f"replay_samples {config.replay_samples} is fewer than replay_batch_size {config.replay_batch_size}. "
            "Raise the one or lower the other."
        )
    if bank is None or not (isinstance(bank, ReplayBank) or Path(bank).is_file()):
        if config.replay_sampler_steps > (total := len(job.denoiser.schedule)):
            raise InputError(
                f"replay_sampler_steps {config.replay_sampler_steps} is more than the model's {total} timesteps; pass "
                f"--replay_sampler_steps {total} or less."
            )
        check_memory(
            job.denoiser.sample_shape,
            config.replay_samples,
            config.replay_states,
            guided=config.replay_guidance > 0,
            passed_on=passed_on,
        )
    if config.bank_filter == "classifier" and (classifier is None or forget_label is None):
        raise InputError("bank_filter 'classifier' needs classifier=... and forget_label=...")
    if config.bank_filter == "positive_unlabelled":
        check_positive_unlabelled(job.denoiser, job.images, config.feature_module)


def check_next_bank(path: Path, bank: ReplayBank | str | Path | None, config: UnlearnConfig, *, replace: bool) -> None:
    """InputError when no bank can be passed on in this file."""
    if config.replay_weight == 0:
        raise InputError("--next_bank: without replay (--replay_weight 0) there is no bank to pass on; leave it out.")
    if path.is_dir():
        raise InputError(f"--next_bank {path} is a folder; name a .safetensors file in it.")
    if isinstance(bank, str | Path) and Path(bank).resolve() == path.resolve():
        raise InputError(
            f"--next_bank {path} is --bank itself, which serves the model before this request; name another file."
        )
    if path.exists() and not replace:
        raise InputError(f"--next_bank {path} is there already; name another file, or replace it with --overwrite.")


@phase("bank")
def obtain_bank(job: Job, bank: ReplayBank | str | Path | None) -> ReplayBank:
    if isinstance(bank, ReplayBank):
        bank.check_fits(job.denoiser, "bank")
        return bank
    config, began = job.config, time.perf_counter()
    how = {"sampler_steps": config.replay_sampler_steps, "states": config.replay_states, "seed": config.seed}
    path = Path(bank) if bank is not None else job.output / BANK_FILE if job.output is not None else None
    if path is not None and path.is_file():
        existing = ReplayBank.load(path)
        existing.check_fits(job.denoiser, f"--bank {path}")
        job.observers.say(f"using the replay bank in {path}: {len(existing)} images, {existing.made_from}")
        return existing
    job.observers.say(f"drawing {config.replay_samples} images from the model for the replay bank")
    made = build_bank(
        job.denoiser,
        config.replay_samples,
        batch_size=config.inference_batch_size,
        progress=job.observers.on_sample,
        **how,
    )
    job.seconds["bank"] = time.perf_counter() - began
    if path is not None:
        made.save(path)
    return made


@phase("filter")
def filter_bank(
    job: Job, bank: ReplayBank, classifier: nn.Module | None, forget_label: int | None, *, pass_on: bool = False
) -> tuple[ReplayBank, FilterReport, ReplayBank | None]:
    """What is replayed, the filter's report, and with `pass_on` what is left for the next request.

    Replayed is the bank without what must go, but for noise that is guided elsewhere.

    Raises:
        InputError: too little is left for a batch, or nothing can be guided.
    """
    config, began = job.config, time.perf_counter()
    found = filtered(job, bank, classifier, forget_label)
    kept = int(found.keep.sum())
    job.observers.say(found.report.describe())
    if kept < config.replay_batch_size:
        raise InputError(
            f"the filter left {kept} of {len(bank)} replayed images, fewer than replay_batch_size "
            f"{config.replay_batch_size}. Raise replay_samples, or lower max_dropped or replay_batch_size."
        )
    replayed = replace(bank, likeness=found.likeness)
    report = found.report
    if config.replay_guidance > 0:
        guided = guide(replayed, found.keep, found.unwanted, job.denoiser.schedule, strength=config.replay_guidance)
        if guided.states == 0:
            raise InputError(
                f"replay_guidance {config.replay_guidance}: the {len(bank)} replayed images lie too far apart to say "
                "of any state what it would become without the unwanted. Raise replay_samples, or leave it at 0."
            )
        job.observers.say(guided.describe())
        replayed, report = guided.bank, replace(report, guided_states=guided.states, guided_dropped=guided.added)
    else:
        replayed = replayed.keep(found.keep)
    left = bank_of_next(bank, found.keep, found.unwanted, job.denoiser.schedule) if pass_on else None
    job.seconds["filter"] = time.perf_counter() - began
    return replayed, report, left


def filtered(job: Job, bank: ReplayBank, classifier: nn.Module | None, forget_label: int | None) -> Filtered:
    """What the filter of the settings says of a bank."""
    config = job.config
    how: dict[str, Any] = {"max_dropped": config.max_dropped, "batch_size": config.inference_batch_size}
    if config.bank_filter == "classifier":
        assert classifier is not None
        assert forget_label is not None
        return classifier_filter(bank.images, classifier, forget_label, **how)
    if config.bank_filter == "positive_unlabelled":
        return positive_unlabelled_filter(
            job.denoiser, bank.images, job.images, feature_module=config.feature_module, **how
        )
    return Filtered(
        torch.ones(len(bank), dtype=torch.bool), None, torch.zeros(len(bank)), FilterReport("none", len(bank), 0)
    )


def _drive(run: UnlearningRun, job: Job, *, resume: bool) -> str:
    """Take steps until a guard says stop, saving the state on the way."""
    config = job.config
    state_file = job.output / STATE_FILE if job.output is not None else None
    identity = _identity(run, job)
    seconds, earlier = job.seconds, 0.0
    if resume:
        assert state_file is not None
        state, metadata = load_tensors(state_file)
        if metadata["identity"] != identity:
            raise InputError(
                f"--resume: {state_file} is of a run with another model, posterior, forget data or settings. Give the "
                "same ones, or start anew with --overwrite."
            )
        run.load_state_dict(state)
        spent = json.loads(metadata["seconds"])
        earlier = spent.pop("steps")
        seconds |= {name: seconds.get(name, 0.0) + value for name, value in spent.items()}

    @phase("save")
    def save() -> None:
        seconds["steps"] = earlier + time.perf_counter() - began
        if state_file is not None:
            save_tensors(state_file, run.state_dict(), {"identity": identity, "seconds": json.dumps(seconds)})

    began, first = time.perf_counter(), run.step_number
    reason = run.stop_reason() if run.history else None
    if not run.history:
        save()
    try:
        while reason is None:
            record = run.step()
            reason = run.stop_reason()
            if run.step_number % config.save_every == 0 and reason is None:
                save()
            if job.observers.on_step is not None:
                per_step = config.batch_size * config.accumulate * config.samples_per_step
                rate = per_step * (run.step_number - first) / (time.perf_counter() - began)
                job.observers.on_step(record | {"total": config.steps, "images_per_second": rate})
    except StoppedAtOnce:
        raise  # in the middle of a step: the last save stands
    except KeyboardInterrupt:
        save()
        raise
    except InputError as error:
        if job.output is None:
            raise
        run.write_mean()
        _write_model(job, job.output / LAST_GOOD)
        raise InputError(f"{error} The weights before it are in {job.output / LAST_GOOD}.") from error
    seconds["steps"] = earlier + time.perf_counter() - began
    seconds["unlearn"] = sum(seconds.values())
    return reason


def _identity(run: UnlearningRun, job: Job) -> str:
    """A digest of all that decides the course of a run, so that a resumed one cannot silently become another."""
    digest = hashlib.sha256(json.dumps(decisive(job.config), sort_keys=True).encode())
    for tensor in (run.weights.center, run.weights.prior_std, job.images):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    if run.bank is not None:
        digest.update(run.bank.images.numpy().tobytes())
        if job.config.replay_guidance > 0:
            digest.update(run.bank.predictions.numpy().tobytes())
    return digest.hexdigest()[:32]


@phase("save")
def _write(result: UnlearnResult, job: Job) -> None:
    assert job.output is not None
    _write_model(job, job.output)
    record = result.record() | {"weights": fingerprint(job.denoiser.module), "forget_images": len(job.images)}
    write_json_atomic(job.output / "unlearn.json", record)
    for stale in ("resume", LAST_GOOD):
        shutil.rmtree(job.output / stale, ignore_errors=True)


def _write_model(job: Job, folder: Path) -> None:
    if isinstance(job.model, nn.Module):
        save_tensors(folder / "model.safetensors", job.denoiser.module.state_dict())
    else:
        save_pipeline(job.model, folder)
