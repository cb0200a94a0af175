"""Progress of long runs on stderr: bars in a terminal, a few plain lines in a log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from vdu_fast.config import UnlearnConfig
from vdu_fast.job import Observers

# What a training record may hold, in the order of display.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "forget_ratio": ("forget loss x", "{:.2f}"),
    "penalty": ("KL/weight", "{:.2e}"),
    "images_per_second": ("images/s", "{:.0f}"),
}


def describe(record: Mapping[str, Any]) -> str:
    """The quantities of a training record that people watch, on one line."""
    found = [(name, form.format(record[key])) for key, (name, form) in _SHOWN.items() if record.get(key) is not None]
    return "  ".join(f"{name} {value}" for name, value in found)


class ProgressDisplay:
    """Shows stages of work one after another; a context manager.

    In a terminal every stage is a bar. Elsewhere it is a handful of lines, so that a log of a long run stays short.

    Args:
        quiet: show nothing but warnings.
        console: where to; None is stderr.
    """

    def __init__(self, *, quiet: bool = False, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True, highlight=False)
        self.quiet = quiet
        self._stage: str | None = None
        self._lines_printed = 0
        self._began = time.perf_counter()
        self._task: TaskID | None = None
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TimeRemainingColumn(compact=True, elapsed_when_finished=True),
            TextColumn("{task.fields[text]}"),
            console=self.console,
            disable=quiet or not self.console.is_terminal,
        )

    def __enter__(self) -> ProgressDisplay:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bars.stop()

    def update(self, stage: str, done: int, total: int, text: str = "", *, lines: int = 1) -> None:
        """Report that `done` of `total` are done in a stage, which begins with its first report.

        Args:
            text: shown behind the bar.
            lines: most lines that the whole stage takes where there is no terminal.
        """
        if self.quiet:
            return
        if stage != self._stage:
            self._stage, self._lines_printed, self._began = stage, 0, time.perf_counter()
            self._task = self._bars.add_task(stage, total=total, text=text)
        if not self._bars.disable:
            assert self._task is not None
            self._bars.update(self._task, completed=done, total=total, text=text)
            return
        reached = math.floor(lines * done / max(total, 1))
        if reached > self._lines_printed:
            self._lines_printed = reached
            seconds = time.perf_counter() - self._began
            line = f"{stage} {done}/{total}  {seconds:.0f}s  {text}"
            self.console.print(line.rstrip(), soft_wrap=True, markup=False)

    def say(self, message: str) -> None:
        """One line above the bars."""
        if not self.quiet:
            self.console.print(message, soft_wrap=True, markup=False)

    def warn(self, message: str) -> None:
        """One line above the bars, shown even when quiet."""
        self.console.print(f"warning: {message}", soft_wrap=True, markup=False, style="yellow")


def unlearning_observers(
    display: ProgressDisplay, config: UnlearnConfig, *, poll: Callable[[], None] | None = None
) -> Observers:
    """Callbacks that show a run of `unlearn`; `poll` is called between steps and may raise to end the run there."""
    drawn, ratio = 0, None

    def on_sample(count: int) -> None:
        nonlocal drawn
        drawn += count
        display.update("replay bank", drawn, config.replay_samples, lines=2)
        if poll is not None:
            poll()

    def on_step(record: dict[str, Any]) -> None:
        nonlocal ratio
        # Measured at some steps only; between them the last value stands.
        ratio = record.get("forget_ratio", ratio)
        text = describe(record | {"forget_ratio": ratio})
        display.update("unlearning", int(record["step"]), record["total"], text, lines=10)
        if poll is not None:
            poll()

    return Observers(on_step=on_step, on_sample=on_sample, on_message=display.say)
