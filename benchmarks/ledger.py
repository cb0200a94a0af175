"""Results that grow by a row at a time: a run that is stopped has kept what it measured, and goes on from there."""

from __future__ import annotations

import csv
import datetime
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vdu_fast.evaluation import EvaluationConfig

# What `stamp` gives.
STAMP = ["samples", "sampler_steps", "threads", "torch", "commit", "date"]

ROOT = Path(__file__).parents[1]


def rows(path: Path) -> list[dict[str, str]]:
    """What the file holds; nothing where there is none."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(path: Path, columns: Sequence[str], row: dict[str, Any]) -> None:
    """Add a row, under a head where it is the first."""
    path.parent.mkdir(exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def stamp(evaluation: EvaluationConfig) -> dict[str, Any]:
    """How, with what and when a row was measured."""
    values = (evaluation.samples, evaluation.sampler_steps, torch.get_num_threads(), torch.__version__, commit())
    return dict(zip(STAMP, (*values, datetime.date.today().isoformat()), strict=True))


def commit() -> str:
    """Of the checkout that this is, "none" for an installed package or without git."""
    if not (ROOT / ".git").exists():
        return "none"
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
        )
    except OSError:
        return "none"
    return done.stdout.strip() or "none"
