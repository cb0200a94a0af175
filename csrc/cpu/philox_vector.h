// Philox for many neighbouring counters at once. Compilers turn the 32 x 32 -> 64 bit product of the plain code into
// the slow 64 x 64 one, so it is written out where there is an instruction for it.
#pragma once

#include "../core/philox.h"

namespace vdu::VDU_ISA {
namespace {

#if defined(VDU_AVX512)

using Words = __m512i;
inline Words load_words(const uint32_t* from) { return _mm512_load_si512(from); }
inline void store_words(uint32_t* to, Words words) { _mm512_store_si512(to, words); }
inline Words all(uint32_t word) { return _mm512_set1_epi32(static_cast<int>(word)); }
inline Words mix(Words a, Words b, Words c) { return _mm512_ternarylogic_epi32(a, b, c, 0x96); }  // a ^ b ^ c
inline void multiply(Words a, Words factor, Words& high, Words& low) {
  const Words even = _mm512_mul_epu32(a, factor), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), factor);
  const Words evens = _mm512_setr_epi32(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
  const Words odds = _mm512_setr_epi32(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  high = _mm512_permutex2var_epi32(even, odds, odd);
  low = _mm512_permutex2var_epi32(even, evens, odd);
}
#define VDU_VECTOR_PHILOX 1

#elif defined(VDU_AVX2)

using Words = __m256i;
inline Words load_words(const uint32_t* from) { return _mm256_load_si256(reinterpret_cast<const Words*>(from)); }
inline void store_words(uint32_t* to, Words words) { _mm256_store_si256(reinterpret_cast<Words*>(to), words); }
inline Words all(uint32_t word) { return _mm256_set1_epi32(static_cast<int>(word)); }
inline Words mix(Words a, Words b, Words c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void multiply(Words a, Words factor, Words& high, Words& low) {
  const Words even = _mm256_mul_epu32(a, factor), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), factor);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
}
#define VDU_VECTOR_PHILOX 1

#endif

// The four words of counters group .. group + n - 1, word k of counter g in words[k][g]; n is a multiple of 16.
template <int64_t n>
void philox_words(const NoiseKey& key, uint64_t group, uint32_t (&words)[4][n]) {
#if defined(VDU_VECTOR_PHILOX)
  constexpr int64_t width = sizeof(Words) / sizeof(uint32_t);
  for (int64_t g = 0; g < n; ++g) {
    const uint64_t counter = group + static_cast<uint64_t>(g);
    words[0][g] = static_cast<uint32_t>(counter);
    words[1][g] = static_cast<uint32_t>(counter >> 32);
  }
  const Words m0 = all(0xD2511F53u), m1 = all(0xCD9E8D57u);
  alignas(sizeof(Words)) uint32_t keys[20][width];
  for (uint32_t round = 0; round < 10; ++round) {
    store_words(keys[2 * round], all(key.seed_low + round * 0x9E3779B9u));
    store_words(keys[2 * round + 1], all(key.seed_high + round * 0xBB67AE85u));
  }
  for (int64_t g = 0; g < n; g += width) {
    Words c0 = load_words(&words[0][g]), c1 = load_words(&words[1][g]), c2 = all(key.stream), c3 = all(key.step);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      Words high0, low0, high1, low1;
      multiply(c0, m0, high0, low0);
      multiply(c2, m1, high1, low1);
      c0 = mix(high1, c1, load_words(keys[2 * round]));
      c1 = low1;
      c2 = mix(high0, c3, load_words(keys[2 * round + 1]));
      c3 = low0;
    }
    store_words(&words[0][g], c0);
    store_words(&words[1][g], c1);
    store_words(&words[2][g], c2);
    store_words(&words[3][g], c3);
  }
#else
  for (int64_t g = 0; g < n; ++g) {
    const uint64_t counter = group + static_cast<uint64_t>(g);
    words[0][g] = static_cast<uint32_t>(counter);
    words[1][g] = static_cast<uint32_t>(counter >> 32);
    words[2][g] = key.stream;
    words[3][g] = key.step;
    philox4x32_10(words[0][g], words[1][g], words[2][g], words[3][g], key.seed_low, key.seed_high);
  }
#endif
}

}  // namespace
}  // namespace vdu::VDU_ISA
