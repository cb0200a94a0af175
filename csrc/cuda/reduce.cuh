// Sums in a fixed order: over the lanes of an item, the items of a thread, the threads of a block, the chunks of a
// list. No atomics, and nothing depends on the grid.
#pragma once

#include <cstdint>

#include "stream.cuh"

namespace vdu {

// Adds the terms of a place item by item, those that belong to an element.
template <int kLanes, typename T, typename Place>
__device__ __forceinline__ void add_terms(double& sum, const T (&terms)[kLanes], const Place& place) {
  constexpr int kItem = kLanes / Place::kTogether;
#pragma unroll
  for (int first = 0; first < kLanes; first += kItem) {
    T total = T(0);
    VDU_LANES total = total + (first + i < place.count ? terms[first + i] : T(0));
    sum += static_cast<double>(total);
  }
}

// The sums over a block's threads; thread k returns that of sums[k]. From call to call `turn` is 0 and 1 by turns: the
// numbers of one call may still be read when those of the next are written.
template <int kSums>
__device__ __forceinline__ double sums_of_block(const double (&sums)[kSums], int turn) {
  __shared__ double warps[2][kSums][kThreads / 32];
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    double sum = sums[k];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(0xFFFFFFFFu, sum, distance);
    if (threadIdx.x % 32 == 0) warps[turn][k][threadIdx.x / 32] = sum;
  }
  __syncthreads();
  double total = 0;
  if (threadIdx.x < kSums) {
#pragma unroll
    for (int w = 0; w < kThreads / 32; ++w) total += warps[turn][threadIdx.x][w];
  }
  return total;
}

// out[row] = sum of the row's partial sums. Eight at a time are on their way from memory.
template <typename Out>
__global__ void __launch_bounds__(kThreads) fold_partials(const double* partials, int64_t per_row, Out* out) {
  const double* row = partials + blockIdx.x * per_row;
  double sums[8] = {};
  for (int64_t first = threadIdx.x; first < per_row; first += 8 * kThreads) {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (first + k * kThreads < per_row) sums[k] += row[first + k * kThreads];
    }
  }
  const double pairs[4] = {sums[0] + sums[1], sums[2] + sums[3], sums[4] + sums[5], sums[6] + sums[7]};
  const double sum = sums_of_block<1>({(pairs[0] + pairs[1]) + (pairs[2] + pairs[3])}, 0);
  if (threadIdx.x == 0) out[blockIdx.x] = static_cast<Out>(sum);
}

}  // namespace vdu
