"""The replay bank of one request: checked, read or drawn, rid of what must go, and left for the next request."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vdu_fast.errors import InputError
from vdu_fast.filters import (
    Filtered,
    FilterReport,
    check_positive_unlabelled,
    classifier_filter,
    positive_unlabelled_filter,
)
from vdu_fast.guidance import guide, passed_on
from vdu_fast.job import Job
from vdu_fast.phases import phase
from vdu_fast.replay import ReplayBank, build_bank, check_memory

logger = logging.getLogger(__name__)

BANK_FILE = "resume/bank.safetensors"

# What gives a request more images: a bank that is there has as many as it has.
_MORE = "Raise replay_samples (of a bank that is read, draw a larger one)"


def check_replay(
    job: Job, bank: ReplayBank | str | Path | None, classifier: nn.Module | None, forget_label: int | None
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
            job.denoiser.sample_shape, config.replay_samples, config.replay_states, guided=config.replay_guidance > 0
        )
    if config.bank_filter == "classifier" and (classifier is None or forget_label is None):
        raise InputError("bank_filter 'classifier' needs classifier=... and forget_label=...")
    if config.bank_filter == "positive_unlabelled":
        check_positive_unlabelled(job.denoiser, job.images, config.feature_module)


@phase("bank")
def obtain_bank(job: Job, bank: ReplayBank | str | Path | None) -> ReplayBank:
    if isinstance(bank, ReplayBank):
        _check_serves(job, bank, "bank")
        return bank
    config, began = job.config, time.perf_counter()
    how = {"sampler_steps": config.replay_sampler_steps, "states": config.replay_states, "seed": config.seed}
    path = Path(bank) if bank is not None else job.output / BANK_FILE if job.output is not None else None
    if path is not None and path.is_file():
        existing = ReplayBank.load(path)
        _check_serves(job, existing, f"--bank {path}")
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


def _check_serves(job: Job, bank: ReplayBank, name: str) -> None:
    """InputError when the bank is not for this model, or not for where the run starts."""
    bank.check_fits(job.denoiser, name)
    if bank.passed_on and job.config.center == "posterior":
        raise InputError(
            f"{name} was passed on by an earlier request, and center 'posterior' starts from the weights before it, "
            "which still draw what has gone from the bank. Use center 'model'."
        )


@phase("filter")
def filter_bank(
    job: Job, bank: ReplayBank, found: Filtered, *, left: Path | None = None
) -> tuple[ReplayBank, FilterReport]:
    """The bank without what must go, but for noise that is guided elsewhere, and the filter's report.

    Args:
        job: the checked inputs.
        bank: all of it.
        found: what the filter says of it, see `filtered`.
        left: file for what is left to the next request; the model that it will serve is not known yet.

    Raises:
        InputError: too little is left for a batch, or nothing can be guided.
    """
    config, began = job.config, time.perf_counter()
    kept = int(found.keep.sum())
    job.observers.say(found.report.describe())
    if kept < config.replay_batch_size:
        raise InputError(
            f"the filter left {kept} of {len(bank)} replayed images, fewer than replay_batch_size "
            f"{config.replay_batch_size}. {_MORE}, or lower max_dropped or replay_batch_size."
        )
    if left is not None:
        _leave(job, bank, found, left)
    replayed = replace(bank, likeness=found.likeness)
    report = found.report
    if config.replay_guidance > 0:
        guided = guide(replayed, found.keep, found.unwanted, job.denoiser.schedule, strength=config.replay_guidance)
        if guided.states == 0:
            raise InputError(
                f"replay_guidance {config.replay_guidance}: the {len(bank)} replayed images lie too far apart to say "
                f"of any state what it would become without the unwanted. {_MORE}, or leave it at 0."
            )
        job.observers.say(guided.describe())
        replayed, report = guided.bank, replace(report, guided_states=guided.states, guided_dropped=guided.added)
    else:
        replayed = replayed.keep(found.keep)
    job.seconds["filter"] += time.perf_counter() - began
    return replayed, report


def _leave(job: Job, bank: ReplayBank, found: Filtered, path: Path) -> None:
    """Write what the next request is to keep, and say how well that can be told."""
    rest, moved = passed_on(bank, found.keep, found.unwanted, job.denoiser.schedule)
    rest.save(path)
    job.observers.say(f"for the next request: {len(rest)} images, {moved} of their states led elsewhere")
    if moved == 0 or found.report.limited:
        why = "lie too far apart to lead noise elsewhere" if moved == 0 else "may hold some of it"
        logger.warning(
            "the %d images of the bank that is passed on %s: while the next request replays them, a part of what goes "
            "now may come back. See to it with vdu-fast evaluate.",
            *(len(rest), why),
        )


@phase("filter")
def filtered(job: Job, bank: ReplayBank, classifier: nn.Module | None, forget_label: int | None) -> Filtered:
    """What the filter of the settings says of a bank; the arguments are as for `unlearn`."""
    began = time.perf_counter()
    found = _filtered(job, bank, classifier, forget_label)
    job.seconds["filter"] = time.perf_counter() - began
    return found


def _filtered(job: Job, bank: ReplayBank, classifier: nn.Module | None, forget_label: int | None) -> Filtered:
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
