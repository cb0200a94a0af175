// Stands in for csrc/cuda/runtime.cuh where there is no GPU: the kernels are compiled as plain C++, and threads of the
// host run one block after the other. Slow, and blind to races between blocks; it shows that indexing, heads and tails,
// noise and sums are right.
#pragma once

#include <barrier>
#include <cstdint>
#include <thread>
#include <vector>

#include "../tensors.h"

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static

struct Dimensions {
  unsigned int x, y;
};
inline thread_local Dimensions threadIdx{0, 0}, blockIdx{0, 0}, gridDim{1, 1};

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) double2 {
  double x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline double2 make_double2(double x, double y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline uint2 make_uint2(uint32_t x, uint32_t y) {
  return {x, y};
}

inline float __uint_as_float(uint32_t bits) {
  return __builtin_bit_cast(float, bits);
}
inline uint32_t __float_as_uint(float value) {
  return __builtin_bit_cast(uint32_t, value);
}

using __half = _Float16;
using __nv_bfloat16 = uint16_t;
inline float __half2float(__half value) {
  return static_cast<float>(value);
}
inline __half __float2half_rn(float value) {
  return static_cast<__half>(value);
}
inline __half __ushort_as_half(unsigned short bits) {
  return __builtin_bit_cast(__half, bits);
}
inline unsigned short __half_as_ushort(__half value) {
  return __builtin_bit_cast(unsigned short, value);
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) {
  return value;
}
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  const uint32_t bits = __float_as_uint(value);
  return static_cast<__nv_bfloat16>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

constexpr int kEmulatedThreads = 256;

inline void __syncthreads() {
  static std::barrier<> everyone(kEmulatedThreads);
  everyone.arrive_and_wait();
}

// All threads of the block take part, so a barrier for all of them serves a warp too.
inline double __shfl_down_sync(unsigned int, double value, int distance) {
  static double values[kEmulatedThreads];
  values[threadIdx.x] = value;
  __syncthreads();
  const bool inside = threadIdx.x % 32 + static_cast<unsigned int>(distance) < 32;
  const double result = inside ? values[threadIdx.x + static_cast<unsigned int>(distance)] : value;
  __syncthreads();
  return result;
}

namespace vdu {

struct DeviceGuard {};

inline DeviceGuard on_device_of(const Tensor&) {
  return {};
}

inline bool is_beside(const Tensor& tensor, const Tensor&) {
  return tensor.is_cpu();
}

// Seeds and constants go the way of those in device memory, which is the way of captured graphs.
inline bool is_readable(const Tensor&) {
  return false;
}

// Few, so that blocks walk in strides.
constexpr int64_t kMostBlocks = 3;
// So that blocks take several chunks.
constexpr int64_t kEnoughBlocks = 1;

struct Grid {
  int64_t x, y = 1;
};

inline uint32_t same_in_warp(uint32_t value) {
  return value;
}

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, const Tensor&, const Arguments&... arguments) {
  VDU_CHECK(threads == kEmulatedThreads, "blocks must have 256 threads");
  std::vector<std::thread> block;
  for (unsigned int t = 0; t < kEmulatedThreads; ++t) {
    block.emplace_back([&, t] {
      threadIdx.x = t;
      gridDim = {static_cast<unsigned int>(grid.x), static_cast<unsigned int>(grid.y)};
      for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y) {
        for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
          kernel(arguments...);
          __syncthreads();  // the blocks share what is static
        }
      }
    });
  }
  for (std::thread& thread : block) thread.join();
}

}  // namespace vdu
