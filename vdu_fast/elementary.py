"""Logarithm, exponential, sine and cosine as fixed polynomials in float32, the same bits on every platform.

Library functions differ in their last bits between processors and between versions. What decides which weights a run
draws may not, so it is built from float32 multiplication, addition and correctly rounded square root alone, each
rounded separately. csrc/core/elementary.h holds the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# log(1 + f) = f - f^2/2 + f^3 LOG(f) on [sqrt(1/2) - 1, sqrt(2) - 1];
# sin x = x + x^3 SIN(x^2) and cos x = 1 - x^2/2 + x^4 COS(x^2) on [-pi/4, pi/4];
# exp r = 1 + r + r^2 EXP(r) on [-ln(2)/2, ln(2)/2]. Least-squares fits at Chebyshev nodes, rounded to float32 and
# written as the shortest decimals that read back to those floats.
LOG = (-0.07362868, 0.12620327, -0.13202104, 0.14227115, -0.1662137, 0.19999826, -0.25000852, 0.33333355)
SIN = (-0.00019515962, 0.008332166, -0.16666655)
COS = (2.4435854e-05, -0.0013887342, 0.041666646)
EXP = (0.00019899334, 0.0013933688, 0.008333298, 0.041666463, 0.16666667, 0.5)
LN2 = 0.6931472  # float32
_LN2_HIGH, _LN2_LOW = 0.693359375, -0.00021219444  # their sum is ln 2; the first has few bits, so k * it is exact
_LOG2_E = 1.442695  # float32
_QUARTER_STEP = 3.7450704e-07  # float32 of 2 pi / 2^24
_SQRT_HALF_BITS = 0x3F3504F3
_ROUND = 12582912.0  # 1.5 * 2^23: adding it rounds a float32 to the nearest integer
_ROUND_BITS = 0x4B400000


def horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Polynomial with the given coefficients, highest power first, one rounding per operation."""
    result = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + coefficient
    return result


def natural_log(x: Tensor) -> Tensor:
    """log of positive, normal float32 numbers."""
    bits = x.view(torch.int32)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    log1p = f + (f * f) * (f * horner(f, LOG) - 0.5)
    return log1p + exponent.to(torch.float32) * LN2


def square_root(x: Tensor) -> Tensor:
    """Correctly rounded sqrt of float32 numbers.

    torch.sqrt is not: where torch is built with MKL it may be off in the last bit. A square root of 24 bits is never so
    close to the middle of two float32 numbers that the error of one in float64 could cross it.
    """
    return x.double().sqrt().float() if x.dtype == torch.float32 else x.sqrt()


def cosine_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 2 pi ((word >> 8) - 2^21) / 2^24 for 32-bit words in int64: float32."""
    turn = word >> 8
    quadrant = turn >> 22
    x = ((turn & 0x3FFFFF) - 0x200000).to(torch.float32) * _QUARTER_STEP
    x2 = x * x
    sine = x + (x * x2) * horner(x2, SIN)
    cosine = (1.0 - 0.5 * x2) + (x2 * x2) * horner(x2, COS)
    odd = (quadrant & 1).bool()
    c = torch.where(odd, sine, cosine)
    s = torch.where(odd, cosine, sine)
    negative_c = (quadrant == 1) | (quadrant == 2)
    return torch.where(negative_c, -c, c), torch.where(quadrant >= 2, -s, s)


class _Exponential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        clamped = x.clamp(-105.0, 89.0)
        shifted = clamped * _LOG2_E + _ROUND
        k = shifted - _ROUND
        whole = shifted.view(torch.int32) - _ROUND_BITS
        r = (clamped - k * _LN2_HIGH) - k * _LN2_LOW
        y = (1.0 + r) + (r * r) * horner(r, EXP)
        # Two factors of 2^k, since 2^k itself may leave the range of normal numbers.
        half = whole >> 1
        first, second = (((part + 127) << 23).view(torch.float32) for part in (half, whole - half))
        result = (y * first) * second
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (result,) = ctx.saved_tensors
        return grad * result


def exponential(x: Tensor) -> Tensor:
    """exp x: the fixed polynomial for float32, the library's function for float64."""
    return x.exp() if x.dtype == torch.float64 else _Exponential.apply(x)
