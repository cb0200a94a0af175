"""Which implementation of the ops runs where: the native libraries, the choice among them, and the reasons.

Ops run natively on every device whose library could be loaded, on GPUs without one in Triton, else on the reference,
and one warning says why. The environment variable VDU_FAST_BACKEND, or `use_backend` for a while, chooses otherwise.
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
        module: what holds it.
        device: the type of device whose tensors it serves.
        also: further types of device.
    """

    name: str
    module: str
    device: str
    also: tuple[str, ...] = ()


# Fastest first.
BACKENDS = (
    Backend("cuda", "vdu_fast._C_cuda", "cuda"),
    Backend("triton", "vdu_fast.kernels", "cuda", also=("xpu",)),
    Backend("cpu", "vdu_fast._C_cpu", "cpu"),
)
NAMES = ("reference", *(backend.name for backend in BACKENDS))


def _obstacle(backend: Backend) -> str | None:
    """What can be seen to be missing before anything is loaded."""
    if backend.name == "triton":
        return _triton_obstacle()
    if backend.device == "cuda" and torch.version.cuda is None:
        return f"torch {torch.__version__} is not a CUDA build"
    if find_spec(backend.module) is None:
        return f"{backend.module} was not built; reinstall with VDU_FAST_BUILD_{backend.name.upper()}=1 to see why"
    return None


def _triton_obstacle() -> str | None:
    if find_spec("triton") is None:
        return "triton is not installed; pip install 'vdu_fast[triton]'"
    builds = (torch.version.cuda, torch.version.hip, getattr(torch.version, "xpu", None))
    # The interpreter is Triton's way to run on the CPU: for tests, far too slow for work.
    if not any(builds) and os.environ.get("TRITON_INTERPRET", "0") in ("", "0"):
        return f"torch {torch.__version__} is built for no GPU"
    if find_spec("vdu_fast.kernels") is None:
        return "vdu_fast.kernels is not installed; reinstall vdu_fast"
    return None


def _load(backend: Backend) -> str | None:
    """Load it; why it cannot serve, or None when it can."""
    if (obstacle := _obstacle(backend)) is not None:
        return obstacle
    try:
        import_module(backend.module)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        return f"{backend.module} cannot be loaded: {error}"
    return None


ABSENCES = {backend.name: _load(backend) for backend in BACKENDS}
# Whether Triton would run on the CPU; known here, because torch.compile reads what `backend_of` reads.
INTERPRETED: bool = ABSENCES["triton"] is None and import_module("vdu_fast.kernels").INTERPRETED


def _warn_of_the_slow_reference() -> None:
    for device, there in (("cpu", True), ("cuda", torch.cuda.is_available())):
        absences = [ABSENCES[backend.name] for backend in BACKENDS if backend.device == device]
        if there and None not in absences and os.environ.get("VDU_FAST_BACKEND") != "reference":
            why = "; ".join(str(absence) for absence in absences)
            logger.warning("the torch reference runs on %s, many times slower: %s", device, why)


_warn_of_the_slow_reference()

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
    _route_triton()


# The dispatch keys that Triton holds now. torch has one kernel per op and key: what was there before, which may be a
# C++ library, serves again when the registration goes.
_triton_keys: dict[str, torch.library.Library] = {}


def _route_triton() -> None:
    """Put Triton behind the dispatcher where it is the backend, and nowhere else."""
    served = {device for device in ("cpu", "cuda", "xpu") if backend_of(device) == "triton"}
    for device in served - _triton_keys.keys():
        _triton_keys[device] = import_module("vdu_fast.kernels").register(device.upper())
    for device in _triton_keys.keys() - served:
        _triton_keys.pop(device)._destroy()


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """`choose_backend` for the time of a `with` block."""
    before = _chosen
    choose_backend(name)
    try:
        yield
    finally:
        choose_backend(before)


def _serves(backend: Backend, device: str) -> bool:
    if backend.name == "triton" and device == "cpu":
        return _chosen == "triton" and INTERPRETED
    return device in (backend.device, *backend.also)


def backend_of(device: str) -> str:
    """The backend that serves tensors on this type of device."""
    for backend in BACKENDS:
        if ABSENCES[backend.name] is None and _chosen in (None, backend.name) and _serves(backend, device):
            return backend.name
    return "reference"


def reason(device: str) -> str:
    """Why nothing faster serves this type of device; empty when the fastest does."""
    candidates = [backend for backend in BACKENDS if device in (backend.device, *backend.also)]
    if not candidates:
        return f"no backend is written for {device}"
    if backend_of(device) == candidates[0].name:
        return ""
    absences = [absence for backend in candidates if (absence := ABSENCES[backend.name]) is not None]
    return "; ".join(absences) or f"{_chosen} was chosen"


def backends() -> dict[str, dict[str, str]]:
    """The backend of every op on every type of device that torch has here: {op: {device: backend}}."""
    devices = ["cpu", *(name for name in ("cuda", "xpu") if getattr(torch, name).is_available())]
    return {name: {device: backend_of(device) for device in devices} for name in _schema.PUBLIC_OPS}


_route_triton()
if _wish := os.environ.get("VDU_FAST_BACKEND"):
    try:
        choose_backend(_wish)
    except InputError as error:
        raise InputError(f"VDU_FAST_BACKEND: {error}") from None
