// Four standard normals from four random words, by Box-Muller on (r0, r1) and (r2, r3).
#pragma once

#include "elementary.h"
#include "philox.h"

namespace vdu::VDU_ISA {

// sqrt(-2 log u), u = ((word >> 9) + 0.5) / 2^23.
VDU_INLINE float radius_of(uint32_t word) {
  const float u = (static_cast<float>(static_cast<int32_t>(word >> 9)) + 0.5f) * 1.1920928955078125e-07f;
  return square_root(log_normal_range(u) * -2.0f);
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
