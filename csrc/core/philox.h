// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): four random words that are a
// pure function of a counter and a key.
//
//   key     = (seed low, seed high)
//   counter = (index / 4 low, index / 4 high, stream, step),   lane = index % 4
#pragma once

#include "macros.h"

namespace vdu::VDU_ISA {

// Where in the noise a draw takes place; one per call of an op.
struct NoiseKey {
  uint32_t seed_low, seed_high, stream, step;
};

VDU_INLINE NoiseKey noise_key(int64_t seed, int64_t step, int64_t stream) {
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32),
          static_cast<uint32_t>(stream), static_cast<uint32_t>(step)};
}

// The 64 bits of a product in two words. nvcc turns a shift by 32 into the wide product and an addition of zero.
VDU_INLINE void wide_product(uint32_t a, uint32_t b, uint32_t& low, uint32_t& high) {
#if defined(__CUDA_ARCH__)
  asm("{ .reg .b64 product; mul.wide.u32 product, %2, %3; mov.b64 {%0, %1}, product; }"
      : "=r"(low), "=r"(high)
      : "r"(a), "r"(b));
#else
  const uint64_t product = static_cast<uint64_t>(a) * b;
  low = static_cast<uint32_t>(product);
  high = static_cast<uint32_t>(product >> 32);
#endif
}

VDU_INLINE void philox4x32_10(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    uint32_t low0, high0, low1, high1;
    wide_product(c0, 0xD2511F53u, low0, high0);
    wide_product(c2, 0xCD9E8D57u, low1, high1);
    c0 = high1 ^ c1 ^ k0;
    c1 = low1;
    c2 = high0 ^ c3 ^ k1;
    c3 = low0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace vdu::VDU_ISA
