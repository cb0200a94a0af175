"""`vdu-fast tune`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jsonargparse import Namespace

from vdu_fast import _native
from vdu_fast.cli.parser import CommandParser, command_parser, take
from vdu_fast.errors import InputError


@dataclass
class TuneOptions:
    """What is timed.

    Args:
        device: a GPU, as in cuda:1; auto takes the first.
        elements: size of the tensors.
    """

    device: str = "auto"
    elements: int = 2**25

    def __post_init__(self) -> None:
        if self.elements < 1:
            raise InputError(f"--elements must be at least 1, got {self.elements}.")


def build_parser() -> CommandParser:
    parser = command_parser(
        "tune",
        "Time block sizes of the Triton kernels on a GPU, and remember the fastest in the user's cache for this device "
        "and version of Triton. Results keep their bits.",
    )
    parser.add_settings(TuneOptions, "what is timed", device="DEVICE")
    parser.set_usage()
    return parser


def run(arguments: Namespace, command: list[str]) -> int:
    options = take(TuneOptions, arguments)
    device = _device(options.device)
    from vdu_fast.kernels import tune, tuned

    sizes = {}
    # Triton's timer records its events on the current device, whichever the kernels run on.
    with getattr(torch, device.type).device(device):
        for key, times in tune.tune(device, options.elements):
            sizes[key] = size = tune.best(times)
            slowest = max(times.values())
            print(f"{key:36}{size[0]:6} elements, {size[1]:2} warps   {times[size]:.3f} ms (slowest {slowest:.3f})")
    print(f"Written to {tuned.remember(device, sizes)}; used from the next process on.")
    return 0


def _device(name: str) -> torch.device:
    """The GPU that was asked for.

    Raises:
        InputError: there is none, or Triton cannot be used.
    """
    if (absence := _native.ABSENCES["triton"]) is not None:
        raise InputError(f"vdu-fast tune times the Triton kernels, which cannot be used here: {absence}.")
    found = [kind for kind in ("cuda", "xpu") if getattr(torch, kind).is_available()]
    if name == "auto":
        name = found[0] if found else "none"
    if name.split(":")[0] not in found:
        raise InputError(f"vdu-fast tune needs a GPU; torch sees {', '.join(found) or 'none'}. See `vdu-fast doctor`.")
    kind, _, index = name.partition(":")
    count = getattr(torch, kind).device_count()
    if index and not (index.isdecimal() and int(index) < count):
        raise InputError(f"--device must be {kind}:0 to {kind}:{count - 1}, got {name!r}.")
    return torch.device(kind, int(index or 0))
