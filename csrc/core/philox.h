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

VDU_INLINE void philox4x32_10(uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3, uint32_t k0, uint32_t k1) {
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t p1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

}  // namespace vdu::VDU_ISA
