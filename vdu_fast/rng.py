"""Counter-based random numbers: the same seed draws the same bits on every backend and for every batch size.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a key and a counter to four
32-bit words, so a draw is a pure function of where it is used and nothing has to be stored or restored:

    key     = (seed low, seed high)
    counter = (index // 4 low, index // 4 high, stream, step)        lane = index % 4

`index` is the position of the element, `step` the training step (modulo 2^32), `stream` the purpose of the draw.
A run that is resumed at step k therefore draws what an uninterrupted run would have drawn.

Normals follow Box-Muller on lanes (0, 1) and (2, 3). Logarithm, sine and cosine are fixed polynomials in float32
multiplication, addition and correctly rounded square root, each rounded separately, because library functions differ
in their last bits between platforms and these may not.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

Seed = int | Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85


class Stream(IntEnum):
    """What a draw is for. Values are part of the noise specification: add new ones, never renumber."""

    WEIGHTS = 0
    IMAGE_NOISE = 1
    TIMESTEPS = 2
    BATCH = 3
    SAMPLER = 4
    REPLAY_NOISE = 5
    REPLAY_BATCH = 6
    FISHER = 7
    PROBE = 8
    SPLIT = 9
    BANK = 10  # not SAMPLER: a bank and an evaluation of one seed must not start from the same noise


def philox4x32_10(counter: tuple[Tensor, ...], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten Philox rounds.

    Args:
        counter: four int64 tensors of one shape, each element in [0, 2^32).
        key: two integers in [0, 2^32).

    Returns:
        Four int64 tensors holding the 32-bit output words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps exactly the 64 bits that are wanted.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            (p1 >> 32 & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            (p0 >> 32 & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def _groups(first: int, last: int, seed: Seed, step: Seed, stream: int, device: torch.device | str) -> list[Tensor]:
    """Output words of the counters first..last (inclusive)."""
    group = torch.arange(first, last + 1, dtype=torch.int64, device=device)
    word_2, word_3 = torch.full_like(group, int(stream)), torch.full_like(group, int(step) & _WORD)
    key = int(seed)
    return list(philox4x32_10((group & _WORD, group >> 32 & _WORD, word_2, word_3), (key & _WORD, key >> 32 & _WORD)))


def random_words(
    numel: int, seed: Seed, step: Seed = 0, *, stream: int = 0, offset: int = 0, device: torch.device | str = "cpu"
) -> Tensor:
    """Uniform 32-bit words for the elements offset .. offset + numel - 1, as int64 [numel]."""
    if numel == 0:
        return torch.empty(0, dtype=torch.int64, device=device)
    first, last = offset // 4, (offset + numel - 1) // 4
    words = torch.stack(_groups(first, last, seed, step, stream, device), dim=1).reshape(-1)
    return words[offset - 4 * first :][:numel]


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Polynomial with the given coefficients, highest power first, one rounding per operation."""
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


# log(1 + f) = f - f^2/2 + f^3 LOG(f) on [sqrt(1/2) - 1, sqrt(2) - 1];
# sin x = x + x^3 SIN(x^2) and cos x = 1 - x^2/2 + x^4 COS(x^2) on [-pi/4, pi/4]. Least-squares fits at Chebyshev
# nodes, rounded to float32 and written as the shortest decimals that read back to those floats.
LOG = (-0.07362868, 0.12620327, -0.13202104, 0.14227115, -0.1662137, 0.19999826, -0.25000852, 0.33333355)
SIN = (-0.00019515962, 0.008332166, -0.16666655)
COS = (2.4435854e-05, -0.0013887342, 0.041666646)
LN2 = 0.6931472  # float32
QUARTER_STEP = 3.7450704e-07  # float32 of 2 pi / 2^24
_SQRT_HALF_BITS = 0x3F3504F3


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 log u) with u = ((word >> 9) + 0.5) / 2^23, float32."""
    u = ((word >> 9).to(torch.float32) + 0.5) * (2.0**-23)
    bits = u.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    f2 = f * f
    log1p = f + f2 * (f * _horner(f, LOG) - 0.5)
    return torch.sqrt((log1p + exponent.to(torch.float32) * LN2) * -2.0)


def _cos_sin(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi ((word >> 8) - 2^21) / 2^24, float32."""
    turn = word >> 8
    quadrant = turn >> 22
    x = ((turn & 0x3FFFFF) - 0x200000).to(torch.float32) * QUARTER_STEP
    x2 = x * x
    sine = x + (x * x2) * _horner(x2, SIN)
    cosine = (1.0 - 0.5 * x2) + (x2 * x2) * _horner(x2, COS)
    odd = (quadrant & 1).bool()
    c = torch.where(odd, sine, cosine)
    s = torch.where(odd, cosine, sine)
    negative_c = (quadrant == 1) | (quadrant == 2)
    return torch.where(negative_c, -c, c), torch.where(quadrant >= 2, -s, s)


def standard_normal(
    shape: tuple[int, ...] | torch.Size | int,
    seed: Seed,
    step: Seed = 0,
    *,
    stream: int = 0,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normals of the given shape; element i of the flattened result has index offset + i.

    Drawn in float32 and then converted to `dtype`, so that every dtype sees the same noise.
    """
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    numel = math.prod(shape)
    if numel == 0:
        return torch.empty(shape, dtype=dtype, device=device)
    first, last = offset // 4, (offset + numel - 1) // 4
    r0, r1, r2, r3 = _groups(first, last, seed, step, stream, device)
    radius_a, (cos_a, sin_a) = _radius(r0), _cos_sin(r1)
    radius_b, (cos_b, sin_b) = _radius(r2), _cos_sin(r3)
    normals = torch.stack((radius_a * cos_a, radius_a * sin_a, radius_b * cos_b, radius_b * sin_b), dim=1).reshape(-1)
    return normals[offset - 4 * first :][:numel].reshape(shape).to(dtype)


def randint(
    high: int,
    shape: tuple[int, ...] | int,
    seed: Seed,
    step: Seed = 0,
    *,
    low: int = 0,
    stream: int = 0,
    offset: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform integers in [low, high), int64: low + floor(word * (high - low) / 2^32)."""
    span = high - low
    if not 0 < span <= 2**31:
        raise ValueError(f"randint: high - low must be in [1, 2^31], got low={low}, high={high}")
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    words = random_words(math.prod(shape), seed, step, stream=stream, offset=offset, device=device)
    return (low + (words * span >> 32)).reshape(shape)


@lru_cache(maxsize=8)
def _permutation(n: int, seed: int, step: int, stream: int) -> Tensor:
    return torch.argsort(random_words(n, seed, step, stream=stream), stable=True)


def permutation(n: int, seed: Seed, step: Seed = 0, *, stream: int = Stream.BATCH) -> Tensor:
    """A random order of range(n), int64 [n]."""
    return _permutation(n, int(seed), int(step), int(stream)).clone()


def batch_indices(n: int, batch_size: int, step: int, seed: Seed, *, stream: int = Stream.BATCH) -> Tensor:
    """Indices of minibatch number `step` when range(n) is shuffled anew every epoch, int64 [batch_size].

    Stateless: a batch that crosses the end of an epoch takes its tail from the next order, so none is short.
    """
    position = torch.arange(step * batch_size, (step + 1) * batch_size)
    epoch, place = position // n, position % n
    result = torch.empty(batch_size, dtype=torch.int64)
    for e in range(int(epoch[0]), int(epoch[-1]) + 1):
        inside = epoch == e
        result[inside] = _permutation(n, int(seed), e, int(stream))[place[inside]]
    return result
