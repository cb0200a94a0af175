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

// log x = log(1 + f) + exponent ln 2 for a positive, normal x; f in [sqrt(1/2) - 1, sqrt(2) - 1].
VDU_INLINE float log_normal_range(float x) {
  const int32_t bits = static_cast<int32_t>(bits_of(x));
  const int32_t exponent = (bits - 0x3F3504F3) >> 23;
  const float f = float_of(static_cast<uint32_t>(bits) - (static_cast<uint32_t>(exponent) << 23)) - 1.0f;
  float p = -0.07362868f;
  p = p * f + 0.12620327f;
  p = p * f + -0.13202104f;
  p = p * f + 0.14227115f;
  p = p * f + -0.1662137f;
  p = p * f + 0.19999826f;
  p = p * f + -0.25000852f;
  p = p * f + 0.33333355f;
  const float log1p = f + (f * f) * (f * p - 0.5f);
  return log1p + static_cast<float>(exponent) * kLn2;
}

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
  float r = x - k * 0.693359375f;
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
  const uint32_t whole = bits_of(shifted) - 0x4B400000u;
  const uint32_t half = static_cast<uint32_t>(static_cast<int32_t>(whole) >> 1);
  const float first = float_of((half + 127u) << 23);
  const float second = float_of((whole - half + 127u) << 23);
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
  const uint32_t turn = word >> 8;
  const uint32_t quadrant = turn >> 22;
  const float x = static_cast<float>(static_cast<int32_t>(turn & 0x3FFFFFu) - 0x200000) * 3.7450704e-07f;
  const float x2 = x * x;
  float s = -0.00019515962f;
  s = s * x2 + 0.008332166f;
  s = s * x2 + -0.16666655f;
  s = x + (x * x2) * s;
  float c = 2.4435854e-05f;
  c = c * x2 + -0.0013887342f;
  c = c * x2 + 0.041666646f;
  c = (1.0f - 0.5f * x2) + (x2 * x2) * c;
  const bool odd = (quadrant & 1u) != 0u;
  const uint32_t cos_bits = bits_of(odd ? s : c), sin_bits = bits_of(odd ? c : s);
  // Quadrants 1 and 2 have a negative cosine, 2 and 3 a negative sine.
  cosine = float_of(cos_bits ^ ((((quadrant + 1u) >> 1) & 1u) << 31));
  sine = float_of(sin_bits ^ ((quadrant >> 1) << 31));
}

}  // namespace vdu::VDU_ISA
