"""mix_noise: signal x_0 + noise eps with coefficients per sample, which serves `add_noise`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.kernels.access import read, write
from vdu_fast.kernels.batch import Batch, coefficient, columns_of, image_noise, rows_of
from vdu_fast.kernels.launch import VARYING, check_beside, float32_only, integer, launch, vector


@triton.jit(do_not_specialize=VARYING)
def mix_noise_kernel(
    out, x0, signal, noise, seed, step, samples, elements, chunks,
    GROUPED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row, column = rows_of(chunks, ROWS), columns_of(chunks, COLUMNS)
    at = row[:, None] * elements + column[None, :]
    inside = (row < samples)[:, None] & (column < elements)[None, :]
    eps = image_noise(seed, step, row, elements, chunks, GROUPED, COLUMNS)
    scaled = coefficient(signal, row, samples, 1.0) * read(x0, at, inside)
    write(out, at, inside, scaled + coefficient(noise, row, samples, 1.0) * eps)


@float32_only("x0")
def mix_noise(x0: Tensor, signal: Tensor, noise: Tensor, seed: Tensor, step: Tensor) -> Tensor:
    """signal x_0 + noise eps, eps of stream IMAGE_NOISE."""
    x0 = x0.contiguous()
    out = torch.empty_like(x0)
    check_beside(out, x0=x0)
    batch = Batch.of(x0)
    coefficients = vector(signal, "signal", batch.samples, x0), vector(noise, "noise", batch.samples, x0)
    launch(
        mix_noise_kernel, batch.programs, out, x0, *coefficients, integer(seed, "seed", x0), integer(step, "step", x0),
        batch.samples, batch.elements, batch.chunks, **batch.options,
    )  # fmt: skip
    return out
