// The two kernels that every op runs in: over the elements of lists, and over a batch sample by sample.
//
// An op is a struct that travels as a kernel parameter. kSums says how many sums it has; prepare() reads what may lie
// in device memory (seeds, constants), once per thread; and item<kItem>() handles one item.
#pragma once

#include <cstdint>

#include "reduce.cuh"
#include "stream.cuh"

namespace vdu {

// What elements are computed in, how many make an item, and how many blocks a multiprocessor is to hold: 4, 3 or 2 of
// them bound the registers at 64, 80 or 128.
template <typename T, int kSize,
          int kBlocks = sizeof(T) == 8 ? 2
                        : kSize == 8   ? 3
                                       : 4>
struct Items {
  using Type = T;
  static constexpr int size = kSize;
  static constexpr int blocks = kBlocks;
};

// What prepare() returns where there is nothing to read.
struct Nothing {};

// Writes the sums of one chunk to its place in `partials`, [kSums, slots].
template <int kSums>
__device__ __forceinline__ void write_partials(const double (&sums)[kSums], double* partials, int64_t slot,
                                               int64_t slots) {
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
    const double total = sum_of_block(sums[k]);
    if (threadIdx.x == 0) partials[k * slots + slot] = total;
  }
}

// The first tensor of the table that ends after an element.
template <typename Operands>
__device__ __forceinline__ int tensor_of(const Operands& table, int64_t element) {
  int low = 0, high = table.tensors - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (element < table.starts[middle + 1]) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

// op.item(prepared, place, sums) for every item of table.begin .. table.end - 1.
template <typename ItemsOf, typename Op, typename Operands>
__global__ void __launch_bounds__(kThreads, ItemsOf::blocks)
    over_elements(const __grid_constant__ Operands table, const __grid_constant__ Op op, double* partials,
                  int64_t first_slot, int64_t slots) {
  constexpr int kItem = ItemsOf::size;
  const auto prepared = op.prepare();
  const int64_t first_chunk = table.begin / kChunk, chunks = chunks_of(table.end) - first_chunk;
  for (int64_t at = blockIdx.x; at < chunks; at += gridDim.x) {
    const int64_t start = (first_chunk + at) * kChunk;
    const int64_t end = start + kChunk < table.end ? start + kChunk : table.end;
    double sums[Op::kSums > 0 ? Op::kSums : 1] = {};
    int tensor = tensor_of(table, start > table.begin ? start : table.begin);
#pragma unroll 1
    for (int64_t first = start + threadIdx.x * kItem; first < end; first += kThreads * kItem) {
      if (first < table.begin) continue;
      while (first >= table.starts[tensor + 1]) ++tensor;
      const int count = end - first < kItem ? static_cast<int>(end - first) : kItem;
      op.template item<kItem>(prepared, Place<Operands>{table, first, 0, count, tensor}, sums);
    }
    if constexpr (Op::kSums > 0) write_partials(sums, partials, first_slot + at, slots);
  }
}

// The same for a batch [samples, elements]: coefficients(sample) are read once per chunk, and no chunk crosses into the
// next sample. op.item(prepared, coefficients, place, index of its first element in the batch, sums).
template <typename ItemsOf, typename Op, typename Operands>
__global__ void __launch_bounds__(kThreads, ItemsOf::blocks)
    over_samples(const __grid_constant__ Operands table, const __grid_constant__ Op op, double* partials,
                 int64_t samples) {
  constexpr int kItem = ItemsOf::size;
  const auto prepared = op.prepare();
  const int64_t elements = table.end, chunks = chunks_of(elements);
  for (int64_t at = blockIdx.x; at < samples * chunks; at += gridDim.x) {
    const int64_t sample = at / chunks, start = at % chunks * kChunk, skipped = sample * elements;
    const int64_t end = start + kChunk < elements ? start + kChunk : elements;
    const auto coefficients = op.coefficients(sample);
    double sums[Op::kSums > 0 ? Op::kSums : 1] = {};
#pragma unroll 1
    for (int64_t first = start + threadIdx.x * kItem; first < end; first += kThreads * kItem) {
      const int count = end - first < kItem ? static_cast<int>(end - first) : kItem;
      const Place<Operands> place{table, first, skipped, count, 0};
      op.template item<kItem>(prepared, coefficients, place, skipped + first, sums);
    }
    if constexpr (Op::kSums > 0) write_partials(sums, partials, at, samples * chunks);
  }
}

}  // namespace vdu
