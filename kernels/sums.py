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
def fold_kernel(partials, out, rows, slots, TURNS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[row] = sum of the row's partials; a program adds up ROWS of them."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    sums = tl.zeros([ROWS, BLOCK], tl.float64)
    for turn in range(TURNS):
        slot = turn * BLOCK + tl.arange(0, BLOCK)
        inside = (row < rows)[:, None] & (slot < slots)[None, :]
        sums += tl.load(partials + row[:, None] * slots + slot[None, :], mask=inside, other=0.0)
    tl.store(out + row, tl.sum(sums, axis=1).to(out.dtype.element_ty), mask=row < rows)


def chunks_of(numel: int, offset: int = 0) -> int:
    """Chunks of a tensor whose first element has index `offset`: its programs, see `launch.over_elements`."""
    return triton.cdiv(numel + offset % 4, CHUNK) if numel > 0 else 0


def partials_of(like: Tensor, rows: int, slots: int) -> Tensor:
    """Room for the partial sums, float64 [rows, slots]."""
    return torch.empty((rows, slots), dtype=torch.float64, device=like.device)


def fold(partials: Tensor, out: Tensor) -> Tensor:
    """Add up every row of `partials` into `out`, [rows] of any float dtype."""
    rows, slots = partials.shape
    block = min(_FOLD, triton.next_power_of_2(max(slots, 1)))
    together = min(triton.next_power_of_2(max(rows, 1)), max(1, CHUNK // block))
    options = {"TURNS": triton.cdiv(slots, block), "ROWS": together, "BLOCK": block}
    warps = max(1, together * block // 512)
    launch(fold_kernel, triton.cdiv(rows, together), partials, out, rows, slots, num_warps=warps, **options)
    return out
