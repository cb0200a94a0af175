// The two kernels that every op runs in: over the elements of lists, and over a batch sample by sample.
//
// An op is a struct that travels as a kernel parameter. kSums says how many sums it has; prepare() reads what may lie
// in device memory (seeds, constants), once per thread; and item<kItem>() handles one item. An op that does little but
// draw noise has kTogether as well, how many items of float32 it is given at a time (one less of anything narrower, and
// in float64 one by one), and first_normal(), the index of the normal of element 0.
#pragma once

#include <cstdint>

#include "reduce.cuh"
#include "stream.cuh"

namespace vdu {

// What elements are computed in, how many make an item, whether all operands are float32, and how many blocks a
// multiprocessor is to hold: 4, 3 or 2 of them bound the registers at 64, 80 or 128.
template <typename T, int kSize, bool kPlain = false,
          int kBlocks = sizeof(T) == 8 ? 2
                        : kPlain       ? 4
                                       : 3>
struct Items {
  using Type = T;
  static constexpr int size = kSize;
  static constexpr bool plain = kPlain;
  static constexpr int blocks = kBlocks;
};

// How many items of which nothing has to be asked an op is given at a time; 0 where it gets every item by itself.
template <typename Op, typename ItemsOf>
constexpr int items_together() {
  if constexpr (requires { Op::kTogether; }) {
    if constexpr (sizeof(typename ItemsOf::Type) == 8) return 0;
    // Narrower operands need registers for their conversion.
    return ItemsOf::plain ? Op::kTogether : Op::kTogether - 1;
  }
  return 0;
}

// What prepare() returns where there is nothing to read.
struct Nothing {};

// Writes the sums of one chunk to its place in `partials`, [kSums, slots].
template <int kSums>
__device__ __forceinline__ void write_partials(const double (&sums)[kSums], int turn, double* partials, int64_t slot,
                                               int64_t slots) {
  const double total = sums_of_block(sums, turn);
  if (threadIdx.x < kSums) partials[threadIdx.x * slots + slot] = total;
}

// What a launch (in a batch every sample) is cut into: `count` pieces of `size` elements from `begin` on, one for a
// block at a time. They are chunks where there are sums, else some chunks long, so that what a block has to find out
// first costs little.
struct Spans {
  int64_t begin, size, count;
};

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

// Whether elements start .. end - 1 may go through a Run: they lie in one tensor, on multiples of an item's size, and
// the first has the first normal of a group.
template <typename Operands, typename Op>
__device__ __forceinline__ bool is_run(const Operands& table, const Op& op, int tensor, int64_t start, int64_t end,
                                       int64_t skipped, int item) {
  return start >= table.begin && end <= table.starts[tensor + 1] && (table.aligned >> tensor & 1) != 0 &&
         (skipped & (item - 1)) == 0 && ((op.first_normal() + skipped) & 3) == 0;
}

// op.item(prepared, place, sums) for every item of table.begin .. table.end - 1.
template <typename ItemsOf, typename Op, typename Operands>
__global__ void __launch_bounds__(kThreads, ItemsOf::blocks)
    over_elements(const __grid_constant__ Operands table, const __grid_constant__ Op op, Spans spans, double* partials,
                  int64_t first_slot, int64_t slots) {
  constexpr int kItem = ItemsOf::size, kTogether = items_together<Op, ItemsOf>();
  constexpr int64_t kStep = kThreads * kItem;
  const int64_t span = Op::kSums > 0 ? kChunk : spans.size;
  const auto prepared = op.prepare();
  int turn = 0;
  for (int64_t at = blockIdx.x; at < spans.count; at += gridDim.x, turn ^= 1) {
    const int64_t start = spans.begin + at * span;
    const int64_t end = start + span < table.end ? start + span : table.end;
    double sums[Op::kSums > 0 ? Op::kSums : 1] = {};
    int tensor = tensor_of(table, start > table.begin ? start : table.begin);
    int64_t first = start + threadIdx.x * kItem;
    if constexpr (kTogether > 0) {
      if (is_run(table, op, tensor, start, end, 0, kItem)) {
#pragma unroll 1
        for (; first + (kTogether - 1) * kStep + kItem <= end; first += kTogether * kStep) {
          op.template item<kTogether * kItem>(prepared, Run<Operands, ItemsOf, kTogether>{table, first, 0, tensor},
                                              sums);
        }
      }
    }
#pragma unroll 1
    for (; first < end; first += kStep) {
      if (first < table.begin) continue;
      while (first >= table.starts[tensor + 1]) ++tensor;
      const int count = end - first < kItem ? static_cast<int>(end - first) : kItem;
      op.template item<kItem>(prepared, Place<Operands, ItemsOf::plain>{table, first, 0, count, tensor}, sums);
    }
    if constexpr (Op::kSums > 0) write_partials(sums, turn, partials, first_slot + at, slots);
  }
}

// The same for a batch [samples, elements], a sample in every row of blocks: coefficients(sample) are read once per
// sample, and no span crosses into the next. op.item(prepared, coefficients, place, sums).
template <typename ItemsOf, typename Op, typename Operands>
__global__ void __launch_bounds__(kThreads, ItemsOf::blocks)
    over_samples(const __grid_constant__ Operands table, const __grid_constant__ Op op, Spans spans, double* partials,
                 int64_t samples) {
  constexpr int kItem = ItemsOf::size, kTogether = items_together<Op, ItemsOf>();
  constexpr int64_t kStep = kThreads * kItem;
  const int64_t span = Op::kSums > 0 ? kChunk : spans.size, elements = table.end;
  const auto prepared = op.prepare();
  int turn = 0;
  for (int64_t sample = blockIdx.y; sample < samples; sample += gridDim.y) {
    const int64_t skipped = sample * elements;
    const auto coefficients = op.coefficients(sample);
    for (int64_t at = blockIdx.x; at < spans.count; at += gridDim.x, turn ^= 1) {
      const int64_t start = at * span;
      const int64_t end = start + span < elements ? start + span : elements;
      double sums[Op::kSums > 0 ? Op::kSums : 1] = {};
      int64_t first = start + threadIdx.x * kItem;
      if constexpr (kTogether > 0) {
        if (is_run(table, op, 0, start, end, skipped, kItem)) {
#pragma unroll 1
          for (; first + (kTogether - 1) * kStep + kItem <= end; first += kTogether * kStep) {
            const Run<Operands, ItemsOf, kTogether> place{table, first, skipped, 0};
            op.template item<kTogether * kItem>(prepared, coefficients, place, sums);
          }
        }
      }
#pragma unroll 1
      for (; first < end; first += kStep) {
        const int count = end - first < kItem ? static_cast<int>(end - first) : kItem;
        const Place<Operands, ItemsOf::plain> place{table, first, skipped, count, 0};
        op.template item<kItem>(prepared, coefficients, place, sums);
      }
      if constexpr (Op::kSums > 0) {
        write_partials(sums, turn, partials, sample * spans.count + at, samples * spans.count);
      }
    }
  }
}

}  // namespace vdu
