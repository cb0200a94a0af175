"""Sums over all elements: one partial per chunk of fixed size, then one ordered second pass in float64, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.kernels.launch import launch

# The order of addition follows from both, so neither depends on the device: the same bits from run to run.
CHUNK, CHUNK_WARPS = 1024, 4
_FOLD = 8192  # partials that the second pass reads at a time


@triton.jit
def fold_kernel(partials, out, slots, BLOCK: tl.constexpr):
    """out[row] = sum of the row's partials; one program per row."""
    row = tl.program_id(0).to(tl.int64)
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, slots, BLOCK):
        at = first + tl.arange(0, BLOCK)
        sums += tl.load(partials + row * slots + at, mask=at < slots, other=0.0)
    tl.store(out + row, tl.sum(sums, axis=0).to(out.dtype.element_ty))


def partials_of(like: Tensor, rows: int, slots: int) -> Tensor:
    """Room for the partial sums, float64 [rows, slots]."""
    return torch.empty((rows, slots), dtype=torch.float64, device=like.device)


def fold(partials: Tensor, out: Tensor) -> Tensor:
    """Add up every row of `partials` into `out`, [rows] of any float dtype."""
    rows, slots = partials.shape
    block = min(_FOLD, triton.next_power_of_2(max(slots, 1)))
    launch(fold_kernel, rows, partials, out, slots, BLOCK=block, num_warps=max(1, block // 512))
    return out
