"""exp, log, sine and cosine with the bits of csrc/core/elementary.h: fixed polynomials, every operation rounded alone.

They rely on enable_fp_fusion=False at every launch; with fused multiply-adds the last bits differ. Where tl.fma stands,
the product is exact, so that one rounding and two give the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931472)
SMALLEST_NORMAL = tl.constexpr(1.17549435e-38)
LARGEST = tl.constexpr(3.40282347e38)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 to the nearest integer
ONE_BITS = tl.constexpr(0x3F800000)
QUARTER = tl.constexpr(1.5707964)  # float32 of pi / 2


@triton.jit
def scaled_log(x, SCALE: tl.constexpr):
    """SCALE log x of positive, normal float32 numbers, where SCALE is a power of two with either sign."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - SQRT_HALF_BITS) & -0x800000  # times 2^23
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = f * (SCALE * -0.07362868) + SCALE * 0.12620327
    p = p * f + SCALE * -0.13202104
    p = p * f + SCALE * 0.14227115
    p = p * f + SCALE * -0.1662137
    p = p * f + SCALE * 0.19999826
    p = p * f + SCALE * -0.25000852
    p = p * f + SCALE * 0.33333355
    log1p = tl.fma(f, SCALE, (f * f) * (f * p - SCALE * 0.5))
    return log1p + exponent.to(tl.float32) * (SCALE * LN2 / 8388608.0)


@triton.jit
def log_normal_range(x):
    """log of positive, normal float32 numbers."""
    return scaled_log(x, 1.0)


@triton.jit
def natural_log(x):
    """log of any float32 numbers."""
    tiny = x < SMALLEST_NORMAL
    result = log_normal_range(tl.where(tiny, x * 8388608.0, x))
    result = tl.where(tiny, result - 23.0 * LN2, result)
    result = tl.where(x == 0.0, float("-inf"), result)
    result = tl.where(x > LARGEST, x, result)
    return tl.where(x >= 0.0, result, float("nan"))  # also for NaN


@triton.jit
def exponential(x):
    """exp of float32 numbers."""
    c = tl.where(x < -105.0, -105.0, x)
    c = tl.where(c > 89.0, 89.0, c)
    shifted = c * 1.442695 + ROUND
    k = shifted - ROUND
    r = tl.fma(k, -0.693359375, c)
    r = r - k * -0.00021219444
    p = r * 0.00019899334 + 0.0013933688
    p = p * r + 0.008333298
    p = p * r + 0.041666463
    p = p * r + 0.16666667
    p = p * r + 0.5
    y = (1.0 + r) + (r * r) * p
    # Two factors of 2^k, since 2^k itself may leave the range of normal numbers. What the bits of `shifted` have above
    # those of k is shifted out.
    bits = shifted.to(tl.int32, bitcast=True)
    half = bits >> 1
    first = ((half << 23) + ONE_BITS).to(tl.float32, bitcast=True)
    second = (((bits - half) << 23) + ONE_BITS).to(tl.float32, bitcast=True)
    return (y * first) * second


@triton.jit
def cosine_sine(word):
    """Cosine and sine of 2 pi ((word >> 8) - 2^21) / 2^24 for uint32 words."""
    # The 22 bits below the quadrant as the mantissa of a number in [1, 2).
    x = ((((word >> 7) & 0x7FFFFE) | ONE_BITS).to(tl.float32, bitcast=True) - 1.5) * QUARTER
    x2 = x * x
    s = x2 * -0.00019515962 + 0.008332166
    s = s * x2 + -0.16666655
    s = x + (x * x2) * s
    c = x2 * 2.4435854e-05 + -0.0013887342
    c = c * x2 + 0.041666646
    c = tl.fma(x2, -0.5, 1.0) + (x2 * x2) * c
    odd = (word & 0x40000000) != 0
    cosine_bits = tl.where(odd, s, c).to(tl.uint32, bitcast=True)
    sine_bits = tl.where(odd, c, s).to(tl.uint32, bitcast=True)
    # Quadrants 1 and 2 have a negative cosine, 2 and 3 a negative sine.
    cosine_bits ^= (word + 0x40000000) & 0x80000000
    sine_bits ^= word & 0x80000000
    return cosine_bits.to(tl.float32, bitcast=True), sine_bits.to(tl.float32, bitcast=True)
