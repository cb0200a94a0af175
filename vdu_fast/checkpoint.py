"""Files that survive a crash: safetensors and JSON, always written whole or not at all, never pickled."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from vdu_fast.errors import InputError

logger = logging.getLogger(__name__)

_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


def write_bytes_atomic(path: Path | str, data: bytes) -> None:
    """Write `data` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~current_umask())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def current_umask() -> int:
    """The permission bits that new files are not to have."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


class StoppedAtOnce(KeyboardInterrupt):
    """Ctrl-C for the second time within `uninterrupted`: an update may be half done, and must not be saved."""


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block is done, so that it cannot leave half an update behind.

    Raises:
        KeyboardInterrupt: after the block, when Ctrl-C came in it.
        StoppedAtOnce: in the block, when Ctrl-C came twice.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers the signal to the main thread only, and lets no other one set a handler.
        return
    held: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        if held:
            raise StoppedAtOnce
        held.append(number)
        logger.warning("interrupted: finishing the step, then saving (Ctrl-C again stops at once)")

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.SIG_DFL)
    if held:
        raise KeyboardInterrupt


def write_json_atomic(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused."""
    write_bytes_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def save_tensors(path: Path | str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors and string metadata as one safetensors file, atomically."""
    contiguous: dict[str, Tensor] = {}
    stored: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses two names for one storage; tied weights are written out under both.
        shared = value.untyped_storage().data_ptr()
        contiguous[name] = value.clone() if shared in stored else value
        stored.add(shared)
    write_bytes_atomic(path, save(contiguous, dict(metadata or {})))


def load_tensors(path: Path | str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file: tensors on the CPU, and the metadata.

    Raises:
        InputError: the file is missing, is a pickle, or is not a whole safetensors file.
    """
    path = Path(path)
    if path.suffix.lower() in _PICKLES:
        raise InputError(
            f"{path} looks like a pickle, which can run code when it is loaded, so it is refused. "
            "Convert it once where you trust it: safetensors.torch.save_file(state_dict, 'model.safetensors')."
        )
    if not path.is_file():
        raise InputError(f"{path} does not exist or is not a file; a .safetensors file is expected.")
    try:
        with safe_open(str(path), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except SafetensorError as error:
        raise InputError(
            f"{path} is not a readable safetensors file ({error}). It may be truncated: write or copy it again."
        ) from error


def load_state(path: Path | str) -> dict[str, Tensor]:
    """A state dict from a .safetensors file, or from a folder that holds exactly one model in diffusers' layout."""
    path = Path(path)
    if not path.is_dir():
        return load_tensors(path)[0]
    # A pipeline's weights lie in its unet/; what lies beside that folder (a posterior, a bank) is something else.
    for candidate in (path / "unet", path / "model", path):
        found = sorted(candidate.glob("*.safetensors")) if candidate.is_dir() else []
        if len(found) == 1:
            return load_tensors(found[0])[0]
    raise InputError(
        f"{path} holds no single .safetensors file (looked in it and in its unet/ folder). "
        "Give the file itself, or a folder written by save_pretrained."
    )


def fingerprint(module: nn.Module) -> str:
    """`fingerprint_tensors` of a module's state."""
    return fingerprint_tensors(module.state_dict())


def fingerprint_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the names, shapes and values of tensors, as 16 hex digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def prepare_output(path: Path | str, *, overwrite: bool, resume: bool = False, owned: str | None = None) -> Path:
    """Check an output folder before any work is done.

    Args:
        path: the folder; created when missing.
        overwrite: accept a folder that is not empty.
        resume: accept a folder that holds the file `owned`, the state of an interrupted run.
        owned: relative path of that state file; None for commands that cannot resume.

    Raises:
        InputError: the folder holds something and neither flag permits going on.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise InputError(f"--output {path} is a file; give a folder.")
    occupied = path.is_dir() and any(path.iterdir())
    interrupted = owned is not None and (path / owned).is_file()
    if resume and not interrupted:
        raise InputError(
            f"--resume: {path / (owned or '')} does not exist, so there is nothing to resume; leave --resume out."
        )
    if occupied and not (overwrite or resume):
        hint = "--resume goes on with the interrupted run in it, " if interrupted else ""
        raise InputError(f"--output {path} exists and is not empty: {hint}--overwrite replaces it, or name another.")
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`; when the block succeeds its entries replace those of the same name."""
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path, prefix=".writing-") as temporary:
        staged = Path(temporary)
        yield staged
        for entry in sorted(staged.iterdir()):
            target = path / entry.name
            if target.is_dir():
                # A folder cannot be replaced in one call: move the old one aside, then let it go with the staging.
                os.replace(target, staged / f".old-{entry.name}")
            os.replace(entry, target)
