"""`unlearn`: from a pipeline, forget images and a posterior to a pipeline that no longer draws them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from vdu_fast.data import ImageSet
from vdu_fast.errors import InputError
from vdu_fast.execution import Execution
from vdu_fast.filters import FilterReport
from vdu_fast.job import Job, Observers, check_inputs
from vdu_fast.phases import phase
from vdu_fast.pipelines import save_pipeline
from vdu_fast.posterior import GaussianPosterior
from vdu_fast.records import decisive
from vdu_fast.replay import ReplayBank
from vdu_fast.request_bank import check_replay, filter_bank, filtered, obtain_bank
from vdu_fast.unlearning_run import UnlearningRun

STATE_FILE = "resume/unlearn.safetensors"
LAST_GOOD = "last-good"
# Both in the output folder: while the request runs, and for the next one when it is done.
LEFT_FILE = "resume/left.safetensors"
PASSED_ON = "passed-on/bank.safetensors"


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


def unlearn(
    model: Any,
    forget_images: Tensor | ImageSet,
    *,
    posterior: GaussianPosterior | str | Path,
    config: UnlearnConfig | None = None,
    scheduler: Any = None,
    bank: ReplayBank | str | Path | None = None,
    pass_on_bank: bool = False,
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
        pass_on_bank: leave what the filter leaves of the bank in passed-on/bank.safetensors of `output`, as the `bank`
            of the next request on the model that is there then: that one keeps what the first model drew, not what is
            left of it, and loses less.
        classifier: for bank_filter "classifier": maps images [B, C, H, W] to logits [B, classes]. Never judge the
            result with the same classifier.
        forget_label: the class index that `classifier` gives to what must go.
        retained_images: only measured, for the history; never trained on.
        output: folder for the new pipeline, unlearn.json and, while it runs, the state for `resume`.
        overwrite, resume: see `vdu_fast.checkpoint.prepare_output`.
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
        check_replay(job, bank, classifier, forget_label)
    if pass_on_bank:
        _check_pass_on(config, output)
    if output is not None:
        job.output = prepare_output(output, overwrite=overwrite, resume=resume, owned=STATE_FILE)
        if not resume:
            shutil.rmtree(job.output / "resume", ignore_errors=True)
    elif resume:
        raise InputError("resume needs the output folder of the interrupted run.")
    report = used = None
    kept: ReplayBank | None = None
    if config.replay_weight > 0:
        whole = obtain_bank(job, bank)
        used = whole.made_from | {"images": len(whole)}
        left = job.output / LEFT_FILE if job.output is not None and pass_on_bank else None
        kept, report = filter_bank(job, whole, filtered(job, whole, classifier, forget_label), left=left)
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
    if job.output is not None:
        _write(result, job, pass_on_bank=pass_on_bank)
    return result


def _check_pass_on(config: UnlearnConfig, output: Path | str | None) -> None:
    """InputError when there is nothing to pass on, or nowhere to leave it."""
    if output is None:
        raise InputError("pass_on_bank needs an output folder, where the bank is left for the next request.")
    if config.replay_weight == 0:
        raise InputError("pass_on_bank: without replay (replay_weight 0) there is no bank to pass on; leave it out.")
    if config.bank_filter == "none":
        raise InputError(
            "pass_on_bank: a bank that nothing filters (bank_filter 'none') still holds what this request forgets, and "
            "the next one would teach it again. Use another bank_filter, or leave it out."
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

    began = time.perf_counter()
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
                rate = run.images_seen / (time.perf_counter() - began)
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
def _write(result: UnlearnResult, job: Job, *, pass_on_bank: bool) -> None:
    assert job.output is not None
    _write_model(job, job.output)
    if pass_on_bank:
        ReplayBank.load(job.output / LEFT_FILE).of_model(job.denoiser).save(job.output / PASSED_ON)
    record = result.record() | {"weights": fingerprint(job.denoiser.module), "forget_images": len(job.images)}
    write_json_atomic(job.output / "unlearn.json", record)
    stale = ["resume", LAST_GOOD] + [str(Path(PASSED_ON).parent)] * (not pass_on_bank)
    for name in stale:
        shutil.rmtree(job.output / name, ignore_errors=True)


def _write_model(job: Job, folder: Path) -> None:
    if isinstance(job.model, nn.Module):
        save_tensors(folder / "model.safetensors", job.denoiser.module.state_dict())
    else:
        save_pipeline(job.model, folder)
