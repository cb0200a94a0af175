// What lets one source serve the host at several instruction sets and the GPU.
//
// Every addition and multiplication in these headers is rounded on its own, but for exact products and the steps of a
// correctly rounded root, so that all of them give the same bits: compile with -ffp-contract=off (host) and -fmad=false
// (nvcc), and never with fast-math.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__) || defined(__HIPCC__)
#define VDU_INLINE __host__ __device__ __forceinline__
#else
#define VDU_INLINE inline __attribute__((always_inline))
#endif

// A translation unit for one instruction set names a namespace of its own: two copies of an inline function compiled
// for different instruction sets must never be merged by the linker.
#ifndef VDU_ISA
#define VDU_ISA portable
#endif

namespace vdu::VDU_ISA {

VDU_INLINE uint32_t bits_of(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  return __builtin_bit_cast(uint32_t, value);
#endif
}

VDU_INLINE float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  return __builtin_bit_cast(float, bits);
#endif
}

// a b + c where a b is exact: one rounding and two give the same bits then, so a fused instruction may do it.
VDU_INLINE float plus_exact_product(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#else
  return a * b + c;
#endif
}

VDU_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(x);
#else
  return __builtin_sqrtf(x);
#endif
}

VDU_INLINE double square_root(double x) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(x);
#else
  return __builtin_sqrt(x);
#endif
}

}  // namespace vdu::VDU_ISA
