"""Block sizes that `vdu-fast tune` found to be the fastest, in the user's cache, by device and version of Triton."""

from __future__ import annotations

import json
import logging
import os
from functools import lru_cache
from pathlib import Path

import torch

logger = logging.getLogger(__name__)


def cache_file() -> Path:
    """Where the sizes are kept: under $XDG_CACHE_HOME, else ~/.cache."""
    # Not Path.home(), which fails for a user without a home, as containers have.
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "vdu_fast" / "triton_blocks.json"


def device_key(device: torch.device) -> str:
    """What sizes are remembered by: they are not worth keeping for another device or another compiler."""
    import triton

    name = "cpu" if device.type == "cpu" else getattr(torch, device.type).get_device_name(device)
    return f"{name}, triton {triton.__version__}"


def size_key(kernel: str, narrow: bool) -> str:
    return f"{kernel}, {'16' if narrow else '32'}-bit"


@lru_cache(maxsize=1)
def _remembered() -> dict[str, dict[str, list[int]]]:
    try:
        found = json.loads(cache_file().read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("%s cannot be read, the built-in block sizes are used: %s", cache_file(), error)
        return {}
    return found if isinstance(found, dict) else {}


def block(kernel: str, device: torch.device, narrow: bool) -> tuple[int, int] | None:
    """(elements per program, warps) as tuned for this kernel, or None."""
    if device.type == "cpu":
        return None
    found = _remembered().get(device_key(device), {}).get(size_key(kernel, narrow))
    return (int(found[0]), int(found[1])) if found else None


def remember(device: torch.device, sizes: dict[str, tuple[int, int]]) -> Path:
    """Add the sizes of a device to the cache file; they serve from the next process on."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    everything = {**_remembered(), device_key(device): {key: list(size) for key, size in sizes.items()}}
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(everything, indent=2) + "\n")
    temporary.replace(path)
    _remembered.cache_clear()
    return path
