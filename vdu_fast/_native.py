"""Which implementation of the ops runs where: the native libraries, the choice among them, and the reasons.

Ops run natively on every device whose library could be loaded, else on the reference, and one warning says why. The
environment variable VDU_FAST_BACKEND, or `use_backend` for a while, chooses otherwise.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch

from vdu_fast import _schema
from vdu_fast.errors import InputError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Backend:
    """A faster implementation of the ops than the reference.

    Attributes:
        name: as in VDU_FAST_BACKEND.
        module: what holds it; importing it registers it with torch.
        device: the type of device whose tensors it serves.
    """

    name: str
    module: str
    device: str


# Fastest first.
BACKENDS = (Backend("cuda", "vdu_fast._C_cuda", "cuda"), Backend("cpu", "vdu_fast._C_cpu", "cpu"))
NAMES = ("reference", *(backend.name for backend in BACKENDS))


def _load(backend: Backend) -> str | None:
    """Load it; why it cannot serve, or None when it can."""
    if backend.device == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if find_spec(backend.module) is None:
        absence = f"{backend.module} was not built; reinstall with VDU_FAST_BUILD_{backend.name.upper()}=1 to see why"
    else:
        try:
            import_module(backend.module)
            return None
        except (ImportError, OSError, RuntimeError) as error:
            absence = f"{backend.module} cannot be loaded: {error}"
    there = backend.device == "cpu" or torch.cuda.is_available()
    if there and os.environ.get("VDU_FAST_BACKEND") != "reference":
        logger.warning("the torch reference runs on %s, many times slower: %s", backend.device, absence)
    return absence


ABSENCES = {backend.name: _load(backend) for backend in BACKENDS}

_chosen: str | None = None


def choose_backend(name: str | None) -> None:
    """Use one backend wherever it serves, and the reference elsewhere; None takes the fastest on each device.

    Raises:
        InputError: no such backend, or it cannot serve here.
    """
    global _chosen
    if name is not None and name not in NAMES:
        raise InputError(f"backend must be one of {', '.join(NAMES)}, got {name!r}.")
    if name is not None and (absence := ABSENCES.get(name)) is not None:
        raise InputError(f"backend {name!r} cannot be used here: {absence}.")
    _chosen = name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`choose_backend` for the time of a `with` block."""
    before = _chosen
    choose_backend(name)
    try:
        yield
    finally:
        choose_backend(before)


def backend_of(device: str) -> str:
    """The backend that serves tensors on this type of device."""
    for backend in BACKENDS:
        if backend.device == device and ABSENCES[backend.name] is None and _chosen in (None, backend.name):
            return backend.name
    return "reference"


def reason(device: str) -> str:
    """Why nothing faster serves this type of device; empty when the fastest does."""
    candidates = [backend for backend in BACKENDS if backend.device == device]
    if not candidates:
        return f"no backend is written for {device}"
    if backend_of(device) == candidates[0].name:
        return ""
    absences = [absence for backend in candidates if (absence := ABSENCES[backend.name]) is not None]
    return "; ".join(absences) or f"{_chosen} was chosen"


def backends() -> dict[str, dict[str, str]]:
    """The backend of every op on every type of device that torch has here: {op: {device: backend}}."""
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return {name: {device: backend_of(device) for device in devices} for name in _schema.PUBLIC_OPS}


if _wish := os.environ.get("VDU_FAST_BACKEND"):
    try:
        choose_backend(_wish)
    except InputError as error:
        raise InputError(f"VDU_FAST_BACKEND: {error}") from None
