// Four standard normals from four random words, by Box-Muller on (r0, r1) and (r2, r3).
#pragma once

#include "elementary.h"
#include "philox.h"

namespace vdu::VDU_ISA {

// The correctly rounded root of a number in [2^-100, 2^100]. nvcc's own has a branch for those beyond, which keeps it
// from working on two of them at a time; this is the other side of that branch.
VDU_INLINE float root_within_range(float x) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  const float root = x * inverse;
  return __fmaf_rn(__fmaf_rn(-root, root, x), inverse * 0.5f, root);
#else
  return square_root(x);
#endif
}

// sqrt(-2 log u), u = ((word >> 9) + 0.5) / 2^23: between 3e-4 and 6.
VDU_INLINE float radius_of(uint32_t word) {
  // 1 + (word >> 9) / 2^23, less 1 - 2^-24.
  const float u = float_of((word >> 9) | 0x3F800000u) - 0.99999994f;
  return root_within_range(scaled_log<-2>(u));
}

// Two normals from two words.
VDU_INLINE void box_muller(uint32_t first, uint32_t second, float& a, float& b) {
  const float radius = radius_of(first);
  float cosine, sine;
  cosine_sine(second, cosine, sine);
  a = radius * cosine;
  b = radius * sine;
}

// The normals of elements 4 * group .. 4 * group + 3.
VDU_INLINE void four_normals(const NoiseKey& key, uint64_t group, float& n0, float& n1, float& n2, float& n3) {
  uint32_t r0 = static_cast<uint32_t>(group), r1 = static_cast<uint32_t>(group >> 32), r2 = key.stream, r3 = key.step;
  philox4x32_10(r0, r1, r2, r3, key.seed_low, key.seed_high);
  box_muller(r0, r1, n0, n1);
  box_muller(r2, r3, n2, n3);
}

}  // namespace vdu::VDU_ISA
