// exp, log, sin and cos as fixed polynomials in float32. Library functions differ in their last bits between platforms;
// these may not, because what they give has to be the same on every backend.
//
// The coefficients are least-squares fits at Chebyshev nodes, rounded to float32; vdu_fast/elementary.py holds the
// same.
#pragma once

#include <cmath>

#include "macros.h"

namespace vdu::VDU_ISA {

constexpr float kLn2 = 0.6931472f;

// kScale log x for a positive, normal x, where kScale is a power of two with either sign: scaled coefficients cost
// nothing and give the bits of a product afterwards.
//
// log x = log(1 + f) + exponent ln 2, f in [sqrt(1/2) - 1, sqrt(2) - 1].
template <int kScale>
VDU_INLINE float scaled_log(float x) {
  constexpr float scale = kScale;
  const uint32_t bits = bits_of(x);
  const uint32_t exponent = (bits - 0x3F3504F3u) & 0xFF800000u;  // times 2^23
  const float f = float_of(bits - exponent) - 1.0f;
  float p = scale * -0.07362868f;
  p = p * f + scale * 0.12620327f;
  p = p * f + scale * -0.13202104f;
  p = p * f + scale * 0.14227115f;
  p = p * f + scale * -0.1662137f;
  p = p * f + scale * 0.19999826f;
  p = p * f + scale * -0.25000852f;
  p = p * f + scale * 0.33333355f;
  const float log1p = plus_exact_product(f, scale, (f * f) * (f * p - scale * 0.5f));
  return log1p + static_cast<float>(static_cast<int32_t>(exponent)) * (scale * kLn2 * 0x1p-23f);
}

VDU_INLINE float log_normal_range(float x) { return scaled_log<1>(x); }

VDU_INLINE float natural_log(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const float normal = tiny ? x * 8388608.0f : x;
  float result = log_normal_range(normal);
  result = tiny ? result - 23.0f * kLn2 : result;
  result = x == 0.0f ? -__builtin_inff() : result;
  result = x > 3.40282347e38f ? x : result;
  return x >= 0.0f ? result : __builtin_nanf("");  // also for NaN
}

VDU_INLINE double natural_log(double x) { return log(x); }

// 1 + r + r^2 P(r) of exp x = 2^k (1 + r + r^2 P(r)), |r| <= ln 2 / 2. The low bits of `shifted` hold k.
VDU_INLINE float exponential_mantissa(float x, float& shifted) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  shifted = x * 1.442695f + magic;
  const float k = shifted - magic;
  float r = plus_exact_product(k, -0.693359375f, x);  // k has 8 bits and the constant 9
  r = r - k * -0.00021219444f;
  float p = 0.00019899334f;
  p = p * r + 0.0013933688f;
  p = p * r + 0.008333298f;
  p = p * r + 0.041666463f;
  p = p * r + 0.16666667f;
  p = p * r + 0.5f;
  return (1.0f + r) + (r * r) * p;
}

// Two factors of 2^k, since 2^k itself may leave the normal range.
VDU_INLINE float exponential(float x) {
  float c = x < -105.0f ? -105.0f : x;
  c = c > 89.0f ? 89.0f : c;
  float shifted;
  const float y = exponential_mantissa(c, shifted);
  // What `shifted` has above the bits of k is shifted out.
  const uint32_t half = bits_of(shifted) >> 1;
  const float first = float_of((half << 23) + 0x3F800000u);
  const float second = float_of(((bits_of(shifted) - half) << 23) + 0x3F800000u);
  return (y * first) * second;
}

// The same bits for |x| <= kPlainExponent, where the result and every factor are normal: k is added to the exponent.
constexpr float kPlainExponent = 80.0f;
VDU_INLINE float plain_exponential(float x) {
  float shifted;
  const float y = exponential_mantissa(x, shifted);
  return float_of(bits_of(y) + (bits_of(shifted) << 23));
}

VDU_INLINE double exponential(double x) { return exp(x); }

// Cosine and sine of 2 pi ((word >> 8) - 2^21) / 2^24: the top two bits are the quadrant, the rest a centred quarter.
VDU_INLINE void cosine_sine(uint32_t word, float& cosine, float& sine) {
  // The 22 bits below the quadrant as the mantissa of a number in [1, 2).
  const float x = (float_of(((word >> 7) & 0x7FFFFEu) | 0x3F800000u) - 1.5f) * 1.5707964f;
  const float x2 = x * x;
  float s = -0.00019515962f;
  s = s * x2 + 0.008332166f;
  s = s * x2 + -0.16666655f;
  s = x + (x * x2) * s;
  float c = 2.4435854e-05f;
  c = c * x2 + -0.0013887342f;
  c = c * x2 + 0.041666646f;
  c = plus_exact_product(x2, -0.5f, 1.0f) + (x2 * x2) * c;
  const bool odd = (word & 0x40000000u) != 0u;
  const uint32_t cos_bits = bits_of(odd ? s : c), sin_bits = bits_of(odd ? c : s);
  // Quadrants 1 and 2 have a negative cosine, 2 and 3 a negative sine.
  cosine = float_of(cos_bits ^ ((word + 0x40000000u) & 0x80000000u));
  sine = float_of(sin_bits ^ (word & 0x80000000u));
}

}  // namespace vdu::VDU_ISA
