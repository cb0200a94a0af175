// Philox for many neighbouring counters at once. Compilers turn the 32 x 32 -> 64 bit product of the plain code into
// the slow 64 x 64 one, so it is written out where there is an instruction for it.
#pragma once

#include "../core/philox.h"

namespace vdu::VDU_ISA {
namespace {

// A vector holds one word of several counters, in the lower half of 64 bits each: that is where the product reads its
// factors. It gives no heed to the upper halves, so nothing clears them.
#if defined(VDU_AVX512)

using Words = __m512i;
inline Words all(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
inline Words counted(uint32_t first) {
  const Words place = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_add_epi32(all(first), place);
}
inline Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm512_srli_epi64(a, 32); }
inline Words mix(Words a, Words b) { return _mm512_xor_si512(a, b); }
inline Words mix(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }  // a ^ b ^ c
inline void store_pairs(uint32_t* to, Words even, Words odd) {
  _mm512_store_si512(to, _mm512_mask_blend_epi32(0xAAAA, even, _mm512_slli_epi64(odd, 32)));
}
#define VDU_VECTOR_PHILOX 1

#elif defined(VDU_AVX2)

using Words = __m256i;
inline Words all(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
inline Words counted(uint32_t first) {
  return _mm256_add_epi32(all(first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words upper(Words a) { return _mm256_srli_epi64(a, 32); }
inline Words mix(Words a, Words b) { return _mm256_xor_si256(a, b); }
inline Words mix(Words a, Words b, Words c) { return mix(mix(a, b), c); }
inline void store_pairs(uint32_t* to, Words even, Words odd) {
  _mm256_store_si256(reinterpret_cast<Words*>(to), _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA));
}
#define VDU_VECTOR_PHILOX 1

#endif

#if defined(VDU_VECTOR_PHILOX)

constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;

// What all counters of a call share: the keys of every round, and what the first two rounds make of the words that do
// not depend on the counter's low word. These are half of the words, so half of the products are left out there.
struct SharedWords {
  Words keys[10][2], factor0, factor1;
  Words first2, second0, second2, second3;  // of words 0, 2 and 3 after the first and after the second round

  SharedWords(const NoiseKey& key, uint32_t counter_high)
      : factor0(all(kFactor0)), factor1(all(kFactor1)), first2(all(key.step ^ key.seed_high)) {
    for (uint32_t round = 0; round < 10; ++round) {
      keys[round][0] = all(key.seed_low + round * 0x9E3779B9u);
      keys[round][1] = all(key.seed_high + round * 0xBB67AE85u);
    }
    const uint64_t p1 = static_cast<uint64_t>(key.stream) * kFactor1;
    const uint32_t c0 = static_cast<uint32_t>(p1 >> 32) ^ counter_high ^ key.seed_low;
    const uint64_t p0 = static_cast<uint64_t>(c0) * kFactor0;
    second0 = all(static_cast<uint32_t>(p1) ^ (key.seed_low + 0x9E3779B9u));
    second2 = all(static_cast<uint32_t>(p0 >> 32) ^ (key.seed_high + 0xBB67AE85u));
    second3 = all(static_cast<uint32_t>(p0));
  }
};

struct FourWords {
  Words c0, c1, c2, c3;
};

// Ten rounds on counters that are given by their low word. kChains of them go side by side: a round waits for the one
// before, and a processor looks only so far ahead for work that does not.
constexpr int kChains = 4;

inline void rounds(const SharedWords& shared, const Words (&low)[kChains], FourWords (&w)[kChains]) {
  for (int k = 0; k < kChains; ++k) {
    const Words p = product(low[k], shared.factor0);
    const Words q = product(mix(upper(p), shared.first2), shared.factor1);
    w[k] = {mix(upper(q), shared.second0), q, mix(p, shared.second2), shared.second3};
  }
#pragma GCC unroll 8
  for (int round = 2; round < 10; ++round) {
#pragma GCC unroll 8
    for (int k = 0; k < kChains; ++k) {
      const Words p0 = product(w[k].c0, shared.factor0), p1 = product(w[k].c2, shared.factor1);
      w[k] = {mix(upper(p1), w[k].c1, shared.keys[round][0]), p1, mix(upper(p0), w[k].c3, shared.keys[round][1]), p0};
    }
  }
}

#endif

// The four words of counters group .. group + n - 1, word k of counter g in words[k][g].
template <int64_t n>
void philox_words(const NoiseKey& key, uint64_t group, uint32_t (&words)[4][n]) {
#if defined(VDU_VECTOR_PHILOX)
  const auto low = static_cast<uint32_t>(group);
  if (low <= UINT32_MAX - n) {  // else the high word changes on the way
    const SharedWords shared(key, static_cast<uint32_t>(group >> 32));
    constexpr int64_t width = sizeof(Words) / sizeof(uint32_t), together = kChains / 2 * width;
    static_assert(n % together == 0);
    for (int64_t g = 0; g < n; g += together) {
      Words counters[kChains];
      FourWords w[kChains];
      for (int k = 0; k < kChains; k += 2) {
        counters[k] = counted(low + static_cast<uint32_t>(g + k / 2 * width));
        counters[k + 1] = upper(counters[k]);
      }
      rounds(shared, counters, w);
      for (int k = 0; k < kChains; k += 2) {
        const int64_t place = g + k / 2 * width;
        store_pairs(&words[0][place], w[k].c0, w[k + 1].c0);
        store_pairs(&words[1][place], w[k].c1, w[k + 1].c1);
        store_pairs(&words[2][place], w[k].c2, w[k + 1].c2);
        store_pairs(&words[3][place], w[k].c3, w[k + 1].c3);
      }
    }
    return;
  }
#endif
  for (int64_t g = 0; g < n; ++g) {
    const uint64_t counter = group + static_cast<uint64_t>(g);
    words[0][g] = static_cast<uint32_t>(counter);
    words[1][g] = static_cast<uint32_t>(counter >> 32);
    words[2][g] = key.stream;
    words[3][g] = key.step;
    philox4x32_10(words[0][g], words[1][g], words[2][g], words[3][g], key.seed_low, key.seed_high);
  }
}

}  // namespace
}  // namespace vdu::VDU_ISA
