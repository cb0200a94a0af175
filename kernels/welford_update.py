"""welford_update_: one more value into a running mean and sum of squared deviations."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.errors import InputError
from vdu_fast.kernels.access import is_whole, place, read, total, within, write
from vdu_fast.kernels.launch import check_beside, check_sizes, float32_only, over_elements
from vdu_fast.kernels.sums import CHUNK, CHUNK_WARPS, chunks_of, fold, partials_of


@triton.jit
def _welford(mean, squares, value, inverse_count, at, inside):
    x, m = read(value, at, inside), read(mean, at, inside)
    delta = x - m
    m = m + inverse_count * delta
    write(mean, at, inside, m)
    write(squares, at, inside, read(squares, at, inside) + delta * (x - m))
    return total(delta * delta, inside), total(x * x, inside)


@triton.jit
def welford_update_kernel(
    mean, squares, value, partials, slots, inverse_count, numel,
    SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at = place(SKIP, BLOCK)
    if SPLIT:
        if is_whole(numel, BLOCK):
            distance, length = _welford(mean, squares, value, inverse_count, at, None)
        else:
            distance, length = _welford(mean, squares, value, inverse_count, at, within(at, numel, SKIP))
    else:
        distance, length = _welford(mean, squares, value, inverse_count, at, within(at, numel, SKIP))
    tl.store(partials + tl.program_id(0), distance)
    tl.store(partials + slots + tl.program_id(0), length)


@float32_only("mean")
def welford_update_(mean: Tensor, squares: Tensor, value: Tensor, count: int) -> Tensor:
    """Returns float64 [2] on the device: the sums of (value - mean before)^2 and of value^2."""
    if count < 1:
        raise InputError(f"count must be at least 1, the number of values with this one, got {count}.")
    check_sizes([mean], squares=[squares], value=[value])
    check_beside(mean, mean=[mean], squares=[squares], value=value)
    slots = chunks_of(mean.numel())
    partials = partials_of(mean, 2, slots)
    over_elements(
        welford_update_kernel, mean.numel(), 0, mean, squares, value.contiguous(), partials, slots, 1 / count,
        BLOCK=CHUNK, num_warps=CHUNK_WARPS,
    )  # fmt: skip
    return fold(partials, torch.empty(2, dtype=torch.float64, device=mean.device))
