"""Where a program works, and how it reads, writes and adds up: what all kernels share on the device.

A program of a list kernel handles the elements `at` of a tensor. The first one starts SKIP elements before the tensor,
so that every block begins with a whole group of four normals whatever the offset. `inside` marks the elements that
exist; None says that all do. Without a mask, and with one whose edge is a multiple of 16, 128 bits move at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(SKIP: tl.constexpr, BLOCK: tl.constexpr):
    """This program's elements, int64 [BLOCK]."""
    return tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) - SKIP


@triton.jit
def groups(group, BLOCK: tl.constexpr):
    """This program's groups of four normals, int64 [BLOCK / 4]; `group` is that of the first program's first."""
    return group + tl.program_id(0).to(tl.int64) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)


@triton.jit
def is_whole(numel, BLOCK: tl.constexpr):
    """Whether all elements of this program exist; asked only where SKIP is 0."""
    return (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= numel


@triton.jit
def within(at, numel, SKIP: tl.constexpr):
    """Which of the elements exist."""
    inside = at < numel
    if SKIP > 0:
        inside = inside & (at >= 0)
    return inside


@triton.jit
def read(pointer, at, inside):
    """Elements in float32; ones where there are none, harmless as values, logarithms or divisors."""
    if inside is None:
        return tl.load(pointer + at).to(tl.float32)
    else:
        return tl.load(pointer + at, mask=inside, other=1.0).to(tl.float32)


@triton.jit
def write(pointer, at, inside, value):
    """Rounded once, to the dtype that is stored."""
    tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def total(terms, inside):
    """The sum of the terms that exist, in float64."""
    if inside is not None:
        terms = tl.where(inside, terms, 0.0)
    return tl.sum(terms.to(tl.float64), axis=0)
