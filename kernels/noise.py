"""Standard normals with the bits of csrc/core/normal.h: Philox4x32-10 and Box-Muller."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from vdu_fast.kernels.elementary import ONE_BITS, cosine_sine, scaled_log
from vdu_fast.rng import Stream

WEIGHTS = tl.constexpr(int(Stream.WEIGHTS))
IMAGE_NOISE = tl.constexpr(int(Stream.IMAGE_NOISE))
# Whether radius_of may do what NVIDIA's own correctly rounded root does with numbers that are neither tiny nor huge.
# The branch for those, which no radius takes, keeps a thread from working on two of them at a time. A torch for the CPU
# alone runs no kernel, but compiles them ahead for NVIDIA's GPUs.
OTHER_GPUS = torch.version.hip is not None or getattr(torch.version, "xpu", None) is not None
NVIDIA_ROOT = tl.constexpr(not OTHER_GPUS and not triton.knobs.runtime.interpret)


@triton.jit
def scalar(value):
    """A scalar that was known at launch, or lies in device memory: a captured graph then replays with new values."""
    if value.dtype.is_ptr():
        return tl.load(value)
    else:
        return value


@triton.jit
def words_of(seed, step, stream, group):
    """The four random words of every group, an int64 tensor: element i has index 4 group + i."""
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = tl.zeros_like(low)
    purpose = (zero + stream).to(tl.uint32)
    return tl.philox(scalar(seed).to(tl.int64), low, high, purpose, zero + scalar(step).to(tl.uint32))


@triton.jit
def radius_of(word, NVIDIA: tl.constexpr):
    """sqrt(-2 log u), u = ((word >> 9) + 0.5) / 2^23."""
    # 1 + (word >> 9) / 2^23, less 1 - 2^-24.
    u = ((word >> 9) | ONE_BITS).to(tl.float32, bitcast=True) - 0.99999994
    x = scaled_log(u, -2.0)
    if NVIDIA:
        inverse = tl.rsqrt(x)
        root = x * inverse
        return tl.fma(tl.fma(-root, root, x), inverse * 0.5, root)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def normals(seed, step, stream, group, NVIDIA: tl.constexpr = NVIDIA_ROOT):
    """The normals of every group in order: [..., G] groups give [..., 4 G] normals."""
    r0, r1, r2, r3 = words_of(seed, step, stream, group)
    radius_a = radius_of(r0, NVIDIA)
    cosine_a, sine_a = cosine_sine(r1)
    radius_b = radius_of(r2, NVIDIA)
    cosine_b, sine_b = cosine_sine(r3)
    even = tl.interleave(radius_a * cosine_a, radius_b * cosine_b)
    odd = tl.interleave(radius_a * sine_a, radius_b * sine_b)
    return tl.interleave(even, odd)


@triton.jit
def normals_at(seed, step, stream, index):
    """The normals of any elements, at four times the price: each draws the words of its whole group."""
    r0, r1, r2, r3 = words_of(seed, step, stream, index >> 2)
    late = (index & 2) != 0
    cosine, sine = cosine_sine(tl.where(late, r3, r1))
    return radius_of(tl.where(late, r2, r0), NVIDIA_ROOT) * tl.where((index & 1) != 0, sine, cosine)
