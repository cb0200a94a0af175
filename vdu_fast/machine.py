"""What this machine is: its processor and accelerators by name, and what they can do and hold."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from vdu_fast.memory import available_memory

CPUINFO = Path("/proc/cpuinfo")
# The accelerators whose allocators torch can ask.
METERED = ("cuda", "xpu")
# Instructions that compute in bfloat16: of x86 and of ARM.
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def cores() -> int:
    """Processor cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def device_name(device: torch.device) -> str:
    """What the maker calls the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return _cpuinfo().get("model name") or platform.processor() or platform.machine()


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; false where nothing says so."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = _cpuinfo()
    return device.type == "cpu" and bool(
        _BFLOAT16_FLAGS & set((flags.get("flags") or flags.get("Features", "")).split())
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that may still be allocated on the device; None where nothing says so."""
    if device.type == "cpu":
        return available_memory()
    if device.type not in METERED:
        return None
    free, _ = torch.accelerator.get_memory_info(device)
    # What torch holds but does not use is free to it as well.
    return free + torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)


class AcceleratorMeter:
    """Bytes of tensors on an accelerator, for `vdu_fast.phases.PhaseRecorder`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> int:
        """As they are."""
        return torch.accelerator.memory_allocated(self._device)

    def peak(self) -> int:
        """At their highest since this was asked last."""
        peak = torch.accelerator.max_memory_allocated(self._device)
        torch.accelerator.reset_peak_memory_stats(self._device)
        return peak


def _cpuinfo() -> dict[str, str]:
    """Linux's description of the first core; empty on other systems."""
    try:
        first = CPUINFO.read_text().partition("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}
