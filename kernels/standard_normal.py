"""standard_normal_: a tensor full of noise."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.kernels.access import groups, is_whole, place, within, write
from vdu_fast.kernels.launch import VARYING, block, check_beside, integer, over_elements
from vdu_fast.kernels.noise import normals


@triton.jit(do_not_specialize=VARYING)
def standard_normal_kernel(
    out, seed, step, stream, group, numel, SKIP: tl.constexpr, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    at = place(SKIP, BLOCK)
    n = normals(seed, step, stream, groups(group, BLOCK))
    if SPLIT:
        if is_whole(numel, BLOCK):
            write(out, at, None, n)
        else:
            write(out, at, within(at, numel, SKIP), n)
    else:
        write(out, at, within(at, numel, SKIP), n)


def standard_normal_(out: Tensor, seed: Tensor, step: Tensor, *, stream: int = 0, offset: int = 0) -> None:
    """Fill `out` with the normals of elements offset, offset + 1, ... (float64 too: the noise is drawn in float32)."""
    check_beside(out, out=[out])
    draw = integer(seed, "seed", out), integer(step, "step", out), stream
    over_elements(standard_normal_kernel, out.numel(), offset, out, *draw, offset // 4, **block("standard_normal", out))
