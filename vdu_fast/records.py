"""Results that are kept in a JSON file each, under a digest of all that decides them: what stands is not made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from vdu_fast.errors import InputError


def digest(value: Any) -> str:
    """The first 16 hex digits of the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def decisive(settings: Any) -> dict[str, Any]:
    """What of the settings, a dataclass, a result is known by.

    A field that came later is left out at the value at which nothing is as if it were not there, its metadata's "off":
    what was made before it stands.
    """
    return without_off(type(settings), asdict(settings))


def without_off(of: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the settings `of` some dataclass, without those fields that came later and are off."""
    off = {item.name: item.metadata["off"] for item in fields(of) if "off" in item.metadata}
    return {name: value for name, value in values.items() if name not in off or value != off[name]}


def read_record(path: Path, key: str) -> dict[str, Any] | None:
    """The record in a file of the output folder, or None where there is none or it was made under another key.

    Raises:
        InputError: the file is not readable JSON.
    """
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--output: {path} is not readable JSON ({error}). Remove it to have it made.") from error
    return record if record.get("key") == key else None
