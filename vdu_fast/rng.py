"""Counter-based random numbers: the same seed draws the same bits on every backend and for every batch size.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) maps a key and a counter to four
32-bit words, so a draw is a pure function of where it is used and nothing has to be stored or restored:

    key     = (seed low, seed high)
    counter = (index // 4 low, index // 4 high, stream, step)        lane = index % 4

`index` is the position of the element, `step` the training step (modulo 2^32), `stream` the purpose of the draw.
A run that is resumed at step k therefore draws what an uninterrupted run would have drawn.

Normals follow Box-Muller on lanes (0, 1) and (2, 3), with the logarithm, sine and cosine of `vdu_fast.elementary`.

This is the definition, in plain torch; `vdu_fast.ops.standard_normal` draws the same bits faster.
"""

from __future__ import annotations

import math
from enum import IntEnum
from functools import lru_cache

import torch
from torch import Tensor

from vdu_fast.elementary import cosine_sine, natural_log, square_root

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
    SWEEP = 11  # settings must not be chosen on the noise of any evaluation
    REPLAY_FOCUS = 12


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


def _radius(word: Tensor) -> Tensor:
    """sqrt(-2 log u) with u = ((word >> 9) + 0.5) / 2^23, float32."""
    u = ((word >> 9).to(torch.float32) + 0.5) * (2.0**-23)
    return square_root(natural_log(u) * -2.0)


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
    radius_a, (cos_a, sin_a) = _radius(r0), cosine_sine(r1)
    radius_b, (cos_b, sin_b) = _radius(r2), cosine_sine(r3)
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
    for e in epoch.unique().tolist():
        inside = epoch == e
        result[inside] = _permutation(n, int(seed), e, int(stream))[place[inside]]
    return result
