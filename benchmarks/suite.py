"""Asks questions, one after the other, and keeps what has been answered when a later one fails or is interrupted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from vdu_fast.benchmarks.case import Case, Line, Question, Setting, load_questions
from vdu_fast.benchmarks.measure import COPIED, measure
from vdu_fast.benchmarks.parameters import cifar_unet, shapes_of
from vdu_fast.benchmarks.tables import lines_of
from vdu_fast.errors import InputError

# Parameters of the questions about ops where the CIFAR-10 network cannot be built, and on a GPU.
TENSOR = torch.Size([1024, 1024])
QUICK_TENSORS, GPU_TENSORS = 8, 100
QUICK_COPIED = 16_000_000


@dataclass
class Answer:
    """What came of a question: lines, or the reason why there are none, and whether that is a failure."""

    question: Question
    lines: list[Line]
    left_out: str | None = None
    failed: bool = False


def make_setting(device: torch.device, *, quick: bool) -> Setting:
    """On the CPU the parameters of the 35.7 M network, on a GPU 105 million where memory allows; fewer when quick."""
    if quick:
        return Setting(device, [TENSOR] * QUICK_TENSORS, quick=True)
    if device.type == "cuda":
        tensors = min(GPU_TENSORS, torch.cuda.mem_get_info(device)[0] // (4 * 50 * TENSOR.numel()))
        return Setting(device, [TENSOR] * max(1, tensors))
    try:
        return Setting(device, shapes_of(cifar_unet()))
    except ImportError:  # diffusers is absent
        return Setting(device, [TENSOR] * 34)


def chosen(patterns: Iterable[str], *, groups: Iterable[str] = (), quick: bool = False) -> list[Question]:
    """The questions whose name contains one of the patterns, of the groups; empty is all.

    Raises:
        InputError: a pattern that is in no name.
    """
    known, patterns, groups = load_questions(), list(patterns), list(groups)
    for pattern in patterns:
        if not any(pattern.casefold() in name.casefold() for name in known):
            raise InputError(f"no question contains {pattern!r}; choose among these: {'; '.join(known)}.")
    return [
        q
        for q in known.values()
        if (not patterns or any(p.casefold() in q.name.casefold() for p in patterns))
        and (not groups or q.group in groups)
        and (q.quick or patterns or not quick)
    ]


def ask(
    questions: Iterable[Question], setting: Setting, *, on_question: Callable[[Question], None] | None = None
) -> Iterator[Answer]:
    """The answers, each as soon as it is there."""
    for question in questions:
        if (absence := question.absence(setting)) is not None:
            yield Answer(question, [], absence)
            continue
        if on_question is not None:
            on_question(question)
        try:
            yield Answer(question, [{"question": question.name, **line} for line in _answer(question, setting)])
        except Exception as error:  # whatever it is, the other questions are still worth asking
            yield Answer(question, [], f"{type(error).__name__}: {str(error).strip()[:300]}", failed=True)
        # A state of 11 x 36 million numbers and the compiled baselines must not stay for the next question.
        torch._dynamo.reset()
        gc.collect()
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()


def _answer(question: Question, setting: Setting) -> list[Line]:
    made = question.make(setting)
    if not isinstance(made, Case):
        return made
    if setting.quick:
        made.repeats = min(made.repeats, 5)
    # As much as a question moves: a GPU's copy of less does not reach its bandwidth.
    copied = QUICK_COPIED if setting.quick else max(COPIED, setting.numel)
    times, failed = measure(made, setting.device, copied=copied)
    return lines_of(made, times, failed, copied=copied)
