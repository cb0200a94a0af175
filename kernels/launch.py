"""The host side of every kernel: scalars by value or by pointer, block sizes, launches, and who serves which device.

Nothing here waits for the device or reads its memory, and every launch has enable_fp_fusion=False: products and sums
are rounded one by one, so that all backends give equal bits (but for exact products, and within a rounded root).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import lru_cache, wraps
from typing import Any

import torch
import triton
from torch import Tensor

from vdu_fast import _schema, reference
from vdu_fast.errors import InputError
from vdu_fast.kernels import tuned

logger = logging.getLogger(__name__)

INTERPRETED: bool = triton.knobs.runtime.interpret

# Arguments that differ from call to call: compiling anew for their value would cost more than it gains.
VARYING = ["group", "seed", "step", "draw", "next_draw", "stream"]

# Elements per program and warps, by kind of device (its major compute capability on NVIDIA) and by whether the
# operands are 16-bit: eight of those, or four in float32, are the 128 bits that a thread moves at a time.
BLOCKS: dict[str, dict[bool, tuple[int, int]]] = {
    "cuda 8": {False: (1024, 4), True: (1024, 4)},
    "cuda": {False: (2048, 4), True: (2048, 4)},
    "hip": {False: (1024, 4), True: (2048, 4)},
    "xpu": {False: (1024, 4), True: (1024, 4)},
    "cpu": {False: (4096, 1), True: (4096, 1)},  # the interpreter, which pays by program
}


def device_kind(device: torch.device) -> str:
    """The key of BLOCKS for a device."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return "hip"
    kind = f"cuda {torch.cuda.get_device_capability(device)[0]}"
    return kind if kind in BLOCKS else "cuda"


@lru_cache(maxsize=1024)
def _block(kernel: str, device: torch.device, narrow: bool) -> tuple[int, int]:
    return tuned.block(kernel, device, narrow) or BLOCKS[device_kind(device)][narrow]


_forced: tuple[int, int] | None = None


@contextmanager
def block_size(size: tuple[int, int]) -> Iterator[None]:
    """Use one (block, warps) for all kernels whose blocks may have any size, to time it."""
    global _forced
    before, _forced = _forced, size
    try:
        yield
    finally:
        _forced = before


def block(kernel: str, *operands: Tensor) -> dict[str, int]:
    """BLOCK and num_warps of a kernel whose operands these are: the tuned ones, else those of the table."""
    narrow = all(tensor.element_size() == 2 for tensor in operands)
    elements, warps = _forced or _block(kernel, operands[0].device, narrow)
    return {"BLOCK": elements, "num_warps": warps}


def launch(kernel: Any, programs: int, *arguments: Any, **options: Any) -> None:
    """Run a kernel, whose first argument is a tensor, on that tensor's device and current stream."""
    device = arguments[0].device
    here = nullcontext() if device.type == "cpu" else getattr(torch, device.type).device(device)
    if programs > 0:
        with here:
            kernel[(programs,)](*arguments, enable_fp_fusion=False, **options)


def over_elements(kernel: Any, numel: int, offset: int, *arguments: Any, BLOCK: int, **options: Any) -> None:
    """Run a list kernel over a tensor of `numel` elements, the first of which has index `offset`."""
    # Blocks begin with a whole group of four normals, hence before the tensor where the offset is within one.
    skip = offset % 4
    programs = triton.cdiv(numel + skip, BLOCK) if numel > 0 else 0
    # A mask that ends off a multiple of 16 would forbid vector accesses: then only the last program has one.
    split = skip == 0 and numel % 16 != 0 and numel > BLOCK
    launch(kernel, programs, *arguments, numel, SKIP=skip, SPLIT=split, BLOCK=BLOCK, **options)


def integer(value: Tensor, name: str, like: Tensor) -> int | Tensor:
    """An int64 scalar by value if it is on the CPU, else as the tensor that the kernel reads it from."""
    if value.dtype != torch.int64 or value.numel() != 1:
        raise InputError(f"{name} must be an int64 tensor of one element, got {value.dtype} {tuple(value.shape)}.")
    if value.device.type == "cpu":
        return value.item()
    if value.device != like.device:
        raise InputError(f"{name} must be on the CPU or on {like.device}, got {value.device}.")
    return value


def vector(values: Tensor | None, name: str, count: int, like: Tensor) -> Tensor | None:
    """`count` float values as the kernels read them: contiguous and on the device of `like`."""
    if values is None:
        return None
    if values.numel() != count:
        raise InputError(f"{name} must have {count} elements, one per sample, got {tuple(values.shape)}.")
    return values.to(like.device, non_blocking=True).contiguous()


def check_beside(like: Tensor, /, **operands: Tensor | Sequence[Tensor] | None) -> None:
    """Refuse operands on another device, of another size, and those of in-place ops (lists) that are not contiguous."""
    for name, operand in operands.items():
        for tensor in [operand] if isinstance(operand, Tensor) else operand or []:
            if tensor.device != like.device:
                raise InputError(f"{name} must be on {like.device} like the other tensors, got {tensor.device}.")
            if isinstance(operand, Tensor) and tensor.numel() != like.numel():
                raise InputError(f"{name} must have shape {tuple(like.shape)}, got {tuple(tensor.shape)}.")
            if not isinstance(operand, Tensor) and not tensor.is_contiguous():
                raise InputError(f"{name} must be contiguous; call .contiguous() on it first.")


def check_sizes(first: Sequence[Tensor], /, **lists: Sequence[Tensor]) -> None:
    """Refuse lists that do not match the first one tensor by tensor; an absent operand is an empty list."""
    numels = [tensor.numel() for tensor in first]
    for name, tensors in lists.items():
        if len(tensors) > 0 and [tensor.numel() for tensor in tensors] != numels:
            raise InputError(f"{name} must have as many elements, tensor by tensor, as the first list.")


@lru_cache
def _tell_wide(name: str) -> None:
    logger.warning("%s: the Triton kernels compute in float32, so float64 tensors go to the torch reference", name)


def float32_only(decides: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Hand calls in float64 to the reference. `decides` names the argument whose dtype says what is computed in."""

    def decorate(launcher: Callable[..., Any]) -> Callable[..., Any]:
        name = launcher.__name__
        position = launcher.__code__.co_varnames.index(decides)

        @wraps(launcher)
        def checked(*args: Any, **kwargs: Any) -> Any:
            operand = args[position] if len(args) > position else kwargs[decides]
            first = operand if isinstance(operand, Tensor) else next(iter(operand), None)
            if first is not None and first.dtype == torch.float64:
                _tell_wide(name)
                return _schema._contiguous(getattr(reference, name))(*args, **kwargs)
            return launcher(*args, **kwargs)

        return checked

    return decorate
