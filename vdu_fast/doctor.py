"""Is this installation sound, and what does it run on? The answers behind `vdu-fast doctor`."""

from __future__ import annotations

import hashlib
import math
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import torch

from vdu_fast import _native, ops, reference, rng
from vdu_fast.demo import shipped_model
from vdu_fast.errors import InputError

PACKAGES = (
    "vdu_fast",
    "torch",
    "triton",
    "diffusers",
    "numpy",
    "safetensors",
    "torchmetrics",
    "scikit-learn",
    "pillow",
    "matplotlib",
    "jsonargparse",
    "rich",
)

# Known answers published with Random123: (counter, key, output).
PHILOX_ANSWERS = (
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)
# SHA-256 of the 4,096 float32 normals of seed 0, little-endian. They must not differ between machines.
NORMALS_DIGEST = "ef2d72dfcdc046690c60badc5a4defea3b972bbd183db1dd46030c5ccb91c7ba"


@dataclass(frozen=True)
class Route:
    """The backend that an op takes on a device, and why no faster one."""

    op: str
    device: str
    backend: str
    reason: str


@dataclass(frozen=True)
class Check:
    """A check by name, whether it passed, and what was found."""

    name: str
    passed: bool
    found: str


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; "not installed" where one is absent."""
    found = {"python": f"{platform.python_version()} on {platform.platform()}"}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def devices() -> dict[str, str]:
    """Every device that torch sees, with what there is to know about it."""
    threads = f"{torch.get_num_threads()} threads on {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    found = {"cpu": threads}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        gigabytes = properties.total_memory / 2**30
        found[f"cuda:{index}"] = f"{properties.name}, {gigabytes:.0f} GiB, sm_{properties.major}{properties.minor}"
    return found


def routes() -> list[Route]:
    """For every op and kind of device: the backend and the reason."""
    return [
        Route(op, device, backend, _native.reason(device))
        for op, by_device in _native.backends().items()
        for device, backend in by_device.items()
    ]


def absences() -> dict[str, str]:
    """Backends that cannot be used here, with the reason."""
    return {name: absence for name, absence in _native.ABSENCES.items() if absence is not None}


def build() -> dict[str, str]:
    """What the native code was built with and which instruction set of this machine it uses; empty if not built."""
    if _native.ABSENCES["cpu"] is not None:
        return {}
    from vdu_fast import _C_cpu

    info = _C_cpu.build_info()
    return {"cpu": f"{info['isa']} (of {', '.join(_C_cpu.available_isas())}), gcc {info['compiler']}, {info['flags']}"}


def checks() -> list[Check]:
    """Run every self-check; none raises."""
    named: list[tuple[str, Callable[[], str]]] = [
        ("random words", _check_words),
        ("random normals", _check_normals),
        ("backends", _check_backends),
        ("shipped model", _check_shipped_model),
    ]
    result = []
    for name, check in named:
        try:
            result.append(Check(name, True, check()))
        except (AssertionError, InputError) as error:
            result.append(Check(name, False, str(error)))
    return result


def _check_words() -> str:
    for counter, key, expected in PHILOX_ANSWERS:
        words = rng.philox4x32_10(tuple(torch.tensor([word]) for word in counter), key)
        came = tuple(int(word) for word in words)
        if came != expected:
            raise AssertionError(
                f"Philox4x32-10 of {counter} under {key} gave {came}, the published answer is {expected}"
            )
    return f"Philox4x32-10 gives the {len(PHILOX_ANSWERS)} published answers"


def _check_normals() -> str:
    normals = rng.standard_normal(4096, 0)
    words = rng.random_words(4096, 0).double().reshape(-1, 2, 2)
    radius = ((((words[..., 0] / 512).floor() + 0.5) / 2**23).log() * -2).sqrt()
    angle = 2 * math.pi * ((words[..., 1] / 256).floor() - 2**21) / 2**24
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).reshape(-1)
    error = float((normals.double() - exact).abs().max())
    if not error < 2e-6:
        raise AssertionError(f"normals differ from Box-Muller in float64 by {error:.1e}")
    digest = hashlib.sha256(normals.numpy().astype("<f4").tobytes()).hexdigest()
    if digest != NORMALS_DIGEST:
        raise AssertionError(
            f"the bits of 4,096 normals hash to {digest[:16]}..., other machines give {NORMALS_DIGEST[:16]}...: runs "
            "of this machine cannot be repeated elsewhere bit for bit"
        )
    return f"4,096 normals have the bits of every other machine (error {error:.0e} against float64)"


def _check_backends() -> str:
    """The fast normals and weights against the reference's, bit for bit, on every device."""
    found = []
    for device in sorted({route.device for route in routes()}):
        mean, log_std = (rng.standard_normal(5000, 0, k, device=device) for k in (1, 2))
        for op, arguments in (("standard_normal", (5000, 3, 4)), ("sample_weights", (mean, log_std, 3, 4))):
            options = {"device": device} if op == "standard_normal" else {}
            fast, slow = (getattr(module, op)(*arguments, **options) for module in (ops, reference))
            if not torch.equal(fast, slow):
                wrong = int((fast != slow).sum())
                raise AssertionError(
                    f"{op} on {device} by backend {_native.backend_of(device)} differs from the reference in {wrong} "
                    "of 5,000 values; set VDU_FAST_BACKEND=reference and report this with the output of this command"
                )
        found.append(f"{_native.backend_of(device)} on {device}")
    return f"normals and weights have the reference's bits ({', '.join(found)})"


def _check_shipped_model() -> str:
    return f"checksums match in {shipped_model()}"
