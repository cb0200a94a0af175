"""The runs behind a protocol's tables, kept beside them, so that another machine can go on where one has stopped.

    runs.jsonl    a line for every run: the file in the output folder that it stands for, and its record
    shared/       the judge and the original model's samples, which all runs are measured with
    model/        the model that is unlearned, where the protocol trains it

A run that is taken over stands as one made here does: as long as it was made under the settings of now, and measured by
the same judge. What was made from a model's checkpoints does not travel, since they are large.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdu_fast.checkpoint import write_bytes_atomic, write_json_atomic
from vdu_fast.errors import InputError
from vdu_fast.records import read_record

RUNS = "runs.jsonl"
# What else is copied. The posterior is written last in a model's folder, and says that it is whole.
FILES = ("shared/*.safetensors", "model/*.json", "model/unet/*", "model/scheduler/*", "model/posterior.safetensors")

Record = dict[str, Any]


class PublishedRuns:
    """What a results folder holds of the runs of an output folder.

    Raises:
        InputError: the results folder's runs.jsonl is not what `publish` writes.
    """

    def __init__(self, results: Path, output: Path) -> None:
        self.results, self.output = results, output
        self.records = _read(results / RUNS)

    def take_over_files(self) -> None:
        """Copy model, judge and samples into the output folder, but for what is there already."""
        _copy(self.results, self.output, replace=False)

    def take_over(self, path: Path, key: str, judge: str) -> None:
        """Put a published run into its file, where it was made under this key and what is there was not, or tells less.

        Args:
            path: in the output folder.
            judge: fingerprint of the classifier that measures.
        """
        published, local = self.records.get(self._name(path)), read_record(path, key)
        if published is None or (published["key"], published.get("judge")) != (key, judge):
            return
        if local is None or len(published) > len(local):
            write_json_atomic(path, published)

    def publish(self, runs: Mapping[Path, Record], judge: str) -> None:
        """Add runs of the output folder, in the place of what was there of these; what another judge measured goes."""
        self.records |= {self._name(path): record for path, record in runs.items()}
        self.records = {name: r for name, r in sorted(self.records.items()) if r.get("judge") == judge}
        lines = [json.dumps({"path": name, "record": record}) + "\n" for name, record in self.records.items()]
        write_bytes_atomic(self.results / RUNS, "".join(lines).encode())
        _copy(self.output, self.results, replace=True)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.output).as_posix()


def _read(file: Path) -> dict[str, Record]:
    records = {}
    for number, line in enumerate(file.read_text().splitlines() if file.is_file() else [], start=1):
        try:
            run = json.loads(line)
            records[run["path"]] = run["record"]
            run["record"]["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"--results: line {number} of {file} is not a run ({error!r}). Remove the line."
            ) from error
    return records


def _copy(source: Path, target: Path, *, replace: bool) -> None:
    for path in (path for pattern in FILES for path in sorted(source.glob(pattern))):
        copy = target / path.relative_to(source)
        if replace or not copy.exists():
            write_bytes_atomic(copy, path.read_bytes())
