"""What the replay bank of a run and its filter take, without drawing all of it."""

from __future__ import annotations

import math
import statistics
import time
from itertools import pairwise
from pathlib import Path

from torch import nn

from vdu_fast.filters import examples
from vdu_fast.guidance import guide
from vdu_fast.job import Job
from vdu_fast.profiling.measuring import Report, timed
from vdu_fast.profiling.record import RunPart
from vdu_fast.replay import ReplayBank, bank_bytes, build_bank
from vdu_fast.request_bank import filtered, obtain_bank

# Batches, and sampler steps of each, of the bank that is drawn to learn what a whole one takes.
BATCHES, STEPS = 2, 3


class ReplayCosts:
    """Measures once when it is made, and again at every `measure`; the fastest counts.

    A bank is hundreds of equal network calls. A few of them stand for all, so what another program takes from these few
    is multiplied as well, which it is less likely to do twice.

    Args:
        job: the checked inputs of a run.
        bank, classifier, forget_label: as for `unlearn`.
        report: called with the progress.

    Attributes:
        bank: to take steps with: the user's own, where there is one, or a small one.
        nbytes: of the bank that the run will have.
    """

    def __init__(
        self,
        job: Job,
        bank: ReplayBank | str | Path | None,
        classifier: nn.Module | None,
        forget_label: int | None,
        report: Report,
    ) -> None:
        self._job, self._classifier, self._forget_label, self._report = job, classifier, forget_label, report
        self._call = self._filter = self._guide = math.inf
        self._read: float | None = None
        config, batch = job.config, job.config.inference_batch_size
        if isinstance(bank, ReplayBank) or (bank is not None and Path(bank).is_file()):
            self.bank, self._read = timed(job.denoiser.device, lambda: obtain_bank(job, bank))
            self._count, self._states = self.bank.x_t.shape[:2]
        else:
            self._count, self._states = config.replay_samples, config.replay_states
            batches = max(BATCHES, math.ceil(max(config.replay_batch_size, config.check_size) / batch))
            self._drawn = min(self._count, batch * batches)
            self._steps = min(STEPS, config.replay_sampler_steps)
            self._draw(min(self._drawn, batch))  # a warm-up
            self.bank = self._draw(self._drawn)
        self.nbytes = bank_bytes(job.denoiser.sample_shape, self._count, self._states)
        self._measure_filter()

    def measure(self) -> None:
        """Once more, of what is worth it: a file that was just read comes from memory the second time."""
        if self._read is None:
            self._draw(self._drawn)
        self._measure_filter()

    def parts(self) -> list[RunPart]:
        """The "bank", and the "filter" where there is one."""
        config = self._job.config
        if self._read is not None:
            found = [RunPart("bank", self._read, False, f"{self._count} images read")]
        else:
            calls, all_calls = (
                math.ceil(images / config.inference_batch_size) * steps
                for images, steps in ((self._drawn, self._steps), (self._count, config.replay_sampler_steps))
            )
            basis = f"{calls} of {all_calls} network calls"
            found = [RunPart("bank", self._call * all_calls, calls < all_calls, basis)]
        if config.bank_filter != "none":
            forget = len(examples(self._job.images))
            looked_at, all_images = (forget + images for images in (len(self.bank), self._count))
            seconds = self._filter * all_images / looked_at
            if config.replay_guidance > 0:
                # Every state is held against every image.
                seconds += self._guide * (self._count / len(self.bank)) ** 2 * self._states / self.bank.x_t.shape[1]
            found.append(RunPart("filter", seconds, looked_at < all_images, f"{looked_at} of {all_images} images"))
        return found

    def _draw(self, count: int) -> ReplayBank:
        """A bank along a few sampler steps; its fastest batch tells what a network call takes."""
        config, marks = self._job.config, [time.perf_counter()]

        def on_sample(number: int) -> None:
            marks.append(time.perf_counter())
            self._report("drawing a small bank", min(count, (len(marks) - 1) * config.inference_batch_size), count)

        bank = build_bank(
            self._job.denoiser,
            count,
            sampler_steps=self._steps,
            states=min(config.replay_states, self._steps),
            seed=config.seed,
            batch_size=config.inference_batch_size,
            progress=on_sample,
        )
        batch = statistics.median(later - earlier for earlier, later in pairwise(marks))
        self._call = min(self._call, batch / self._steps)
        return bank

    def _measure_filter(self) -> None:
        if self._job.config.bank_filter != "none":
            how = self._job, self.bank, self._classifier, self._forget_label
            found, seconds = timed(self._job.denoiser.device, lambda: filtered(*how))
            self._filter = min(self._filter, seconds)
            if (strength := self._job.config.replay_guidance) > 0:
                told = self.bank, found.keep, found.unwanted, self._job.denoiser.schedule
                _, seconds = timed(self._job.denoiser.device, lambda: guide(*told, strength=strength))
                self._guide = min(self._guide, seconds)
