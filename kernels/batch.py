"""Where a program works in a batch [samples, elements]: on a tile of whole samples, or on a chunk of one.

Samples have coefficients of their own, [B], while their elements are numbered through the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vdu_fast.kernels.noise import IMAGE_NOISE, normals, normals_at

TILE = 1024  # elements of a tile; fixed, because sums over samples are chunked by it


@dataclass(frozen=True)
class Batch:
    """A batch cut into tiles.

    Attributes:
        samples, elements: what lies in it; a tensor without dimensions is one sample.
        rows, columns: shape of a tile, powers of two.
        chunks: tiles that one sample takes.
    """

    samples: int
    elements: int
    rows: int
    columns: int
    chunks: int

    @classmethod
    def of(cls, tensor: Tensor) -> Batch:
        samples = tensor.shape[0] if tensor.ndim else 1
        elements = tensor.numel() // samples if samples else 0
        columns = min(TILE, max(4, triton.next_power_of_2(elements)))
        return cls(samples, elements, TILE // columns, columns, triton.cdiv(elements, columns))

    @property
    def programs(self) -> int:
        return triton.cdiv(self.samples, self.rows) * self.chunks

    @property
    def options(self) -> dict[str, int | bool]:
        """Compile-time arguments of every batch kernel."""
        # Where a sample is a whole number of groups of four normals, so is every row of a tile.
        grouped = self.elements % 4 == 0
        return {"GROUPED": grouped, "ROWS": self.rows, "COLUMNS": self.columns, "num_warps": 4}


@triton.jit
def rows_of(chunks, ROWS: tl.constexpr):
    """The samples of this program's tile, int64 [ROWS]."""
    return (tl.program_id(0) // chunks).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def columns_of(chunks, COLUMNS: tl.constexpr):
    """The elements of each sample in this program's tile, int32 [COLUMNS]."""
    return (tl.program_id(0) % chunks) * COLUMNS + tl.arange(0, COLUMNS)


@triton.jit
def image_noise(seed, step, row, elements, chunks, GROUPED: tl.constexpr, COLUMNS: tl.constexpr):
    """eps of a tile, [ROWS, COLUMNS]."""
    if GROUPED:
        column = (tl.program_id(0) % chunks) * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        return normals(seed, step, IMAGE_NOISE, row[:, None] * (elements // 4) + column[None, :])
    else:
        index = row[:, None] * elements + columns_of(chunks, COLUMNS)[None, :]
        return normals_at(seed, step, IMAGE_NOISE, index)


@triton.jit
def coefficient(values, row, samples, otherwise: tl.constexpr):
    """A coefficient per sample, float32 [ROWS, 1]; `otherwise` where the op was given none."""
    if values is None:
        return tl.full([row.shape[0], 1], otherwise, tl.float32)
    else:
        return tl.load(values + row, mask=row < samples, other=0.0).to(tl.float32)[:, None]
