// Sums in a fixed order: over the lanes of an item, the items of a thread, the threads of a block, the chunks of a
// list. No atomics, and nothing depends on the grid.
#pragma once

#include <cstdint>

#include "stream.cuh"

namespace vdu {

// Adds the first count terms; the rest belong to no element.
template <int kItem, typename T>
__device__ __forceinline__ void add_terms(double& sum, T (&terms)[kItem], int count) {
  T total = T(0);
  VDU_LANES total = total + (i < count ? terms[i] : T(0));
  sum += static_cast<double>(total);
}

// The sum over a block's threads, valid in thread 0.
__device__ __forceinline__ double sum_of_block(double value) {
  __shared__ double warps[kThreads / 32];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(0xFFFFFFFFu, value, distance);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  double total = 0;
  if (threadIdx.x == 0) {
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  }
  __syncthreads();
  return total;
}

// out[row] = sum of the row's partial sums.
template <typename Out>
__global__ void __launch_bounds__(kThreads) fold_partials(const double* partials, int64_t per_row, Out* out) {
  const double* row = partials + blockIdx.x * per_row;
  double sum = 0;
  for (int64_t k = threadIdx.x; k < per_row; k += kThreads) sum += row[k];
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Out>(sum);
}

}  // namespace vdu
