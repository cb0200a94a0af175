"""What commands share: threads, warnings, models and data from the disk, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from vdu_fast.cli.parser import CommonOptions
from vdu_fast.data import ImageSet, Split, load_images
from vdu_fast.errors import InputError
from vdu_fast.freed_memory import keep_freed_memory
from vdu_fast.progress import ProgressDisplay


class _ToDisplay(logging.Handler):
    """Warnings of the library as lines of the display, which would otherwise be torn by them."""

    def __init__(self, display: ProgressDisplay) -> None:
        super().__init__(logging.WARNING)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        self.display.warn(record.getMessage())


@contextlib.contextmanager
def running(common: CommonOptions) -> Iterator[ProgressDisplay]:
    """Set threads and malloc for good, and show progress and warnings while the block runs."""
    keep_freed_memory()
    if common.threads is not None:
        torch.set_num_threads(common.threads)
    logger = logging.getLogger("vdu_fast")
    with ProgressDisplay(quiet=common.quiet) as display:
        handler = _ToDisplay(display)
        logger.addHandler(handler)
        try:
            yield display
        finally:
            logger.removeHandler(handler)


def load_data(data: str, *, split: Split, resize: int | None, channels: int | None, argument: str = "data") -> ImageSet:
    """`load_images`, with the name of the flag that the data came by in its messages."""
    try:
        return load_images(data, split=split, resize=resize, channels=channels)
    except InputError as error:
        text = str(error)
        raise InputError(f"--{argument}{text.removeprefix('data')}" if text.startswith("data") else text) from error


def load_forget_images(data: str, *, resize: int | None, channels: int | None) -> ImageSet:
    """The pictures to forget: the training split where there are labels, everything where there are none.

    Labelled data sets are the ones that `evaluate` judges on their held-out images, which must stay unseen. A folder
    of pictures collected for the purpose has no such use, and every one of them counts.
    """
    images = load_data(data, split="train", resize=resize, channels=channels, argument="forget")
    if images.labels is None:
        images = load_data(data, split="all", resize=resize, channels=channels, argument="forget")
    return images


class Interruption:
    """Turns the first Ctrl-C into a KeyboardInterrupt at the next `poll`, between steps, so that no step is torn.

    A second Ctrl-C interrupts at once; what was saved last then stands. Use as a context manager.
    """

    def __init__(self, display: ProgressDisplay) -> None:
        self.display = display
        self._asked = False
        self._previous: Any = None

    def __enter__(self) -> Interruption:
        # Only the main thread may set handlers; elsewhere Ctrl-C does not arrive anyway.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked:
            raise KeyboardInterrupt
        self._asked = True
        self.display.say("interrupted: finishing the step, then saving (Ctrl-C again stops at once)")

    def poll(self) -> None:
        """Raise KeyboardInterrupt when one was asked for."""
        if self._asked:
            raise KeyboardInterrupt


def resume_command(command: list[str]) -> str:
    """The shell command that goes on with an interrupted run."""
    return shlex.join([*(word for word in command if word not in ("--overwrite", "--resume")), "--resume"])


def report_interruption(command: list[str], output: Path, state: str) -> Literal[130]:
    """Say where an interrupted run stands and how to go on; returns the exit code."""
    if (output / state).is_file():
        message = f"Interrupted. The state is saved in {output / state}. Go on with:\n  {resume_command(command)}"
    elif output.is_dir() and any(output.iterdir()):
        again = [*(word for word in command if word != "--overwrite"), "--overwrite"]
        message = f"Interrupted before the first step was saved. Start again with:\n  {shlex.join(again)}"
    else:
        message = "Interrupted before anything was written. Run the same command again."
    print(message, file=sys.stderr)
    return 130
