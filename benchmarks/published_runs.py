"""The runs behind a protocol's tables, kept beside them, so that another machine can go on where one has stopped.

    runs.jsonl    a line for every run: the file in the output folder that it stands for, and its record
    shared/       the judge and the original model's samples, which all runs are measured with
    model/        the model that is unlearned, where the protocol trains it

A run that is taken over stands as one made here does: as long as it was made under the settings of now.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from vdu_fast.checkpoint import write_bytes_atomic

RUNS = "runs.jsonl"
# What else is copied, each with a pattern of the files; a model's checkpoints are large, and no run needs them.
FOLDERS = {
    "shared": ("*.safetensors",),
    "model": ("*.json", "posterior.safetensors", "unet/*", "scheduler/*"),
}


def publish(output: Path, results: Path) -> None:
    """Copy what the runs in `output` are into `results`, in the place of what is there."""
    lines = [
        json.dumps({"path": str(path.relative_to(output)), "record": json.loads(path.read_text())})
        for path in sorted(output.rglob("runs/*.json"))
    ]
    write_bytes_atomic(results / RUNS, "".join(f"{line}\n" for line in lines).encode())
    _copy(output, results, replace=True)


def take_over(results: Path, output: Path) -> int:
    """Copy what `results` holds into `output`, but for what is there already; says how many runs these were."""
    count, file = 0, results / RUNS
    for line in file.read_text().splitlines() if file.is_file() else []:
        run = json.loads(line)
        if not (path := output / run["path"]).exists():
            write_bytes_atomic(path, json.dumps(run["record"]).encode())
            count += 1
    _copy(results, output, replace=False)
    return count


def _copy(source: Path, target: Path, *, replace: bool) -> None:
    for folder, patterns in FOLDERS.items():
        for path in (path for pattern in patterns for path in sorted((source / folder).glob(pattern))):
            copy = target / path.relative_to(source)
            if replace or not copy.exists():
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
