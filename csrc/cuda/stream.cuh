// Device side of every op: items of a few contiguous elements, read and written 16 bytes at a time where that is
// possible.
//
// Element g of a list is element g of its tensors laid end to end, as in csrc/cpu/stream.h. An item is kItem elements
// that start at a multiple of kItem in that numbering, so how a list is cut into items, and with it every sum, depends
// neither on where its tensors lie in memory nor on how many there are.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../core/normal.h"
#include "../core/storage.h"
#include "runtime.cuh"

namespace vdu {

using portable::NoiseKey;

constexpr int kThreads = 256;
// Chunks are the unit of reduction: one partial sum per chunk, whatever the grid.
constexpr int64_t kChunk = 4096;

__host__ __device__ inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// A kernel's parameters may take 4 KiB on every driver; the rest is left to the op.
template <int kOperands>
constexpr int kTensorsAtOnce = (3400 / (8 * (kOperands + 1))) < 64 ? 3400 / (8 * (kOperands + 1)) : 64;

// The tensors of one launch. An absent optional operand has null pointers.
template <int kOperands, int kTensors>
struct Table {
  static_assert(kTensors <= 64, "`aligned` has a bit for each");
  char* data[kOperands][kTensors];
  int64_t starts[kTensors + 1];  // in the numbering of the whole list
  int64_t begin, end;            // the elements of this launch
  uint64_t aligned;              // bit t: items of tensor t lie on multiples of their size, in every operand
  Storage storage[kOperands];
  int tensors;
};

// A number of 16 bits in the low half of a word.
__device__ __forceinline__ float widen(uint32_t bits, Storage storage) {
  return storage == Storage::float16 ? __half2float(__ushort_as_half(static_cast<unsigned short>(bits)))
                                     : __uint_as_float(bits << 16);
}

__device__ __forceinline__ uint32_t narrow(float value, Storage storage) {
  return storage == Storage::float16 ? __half_as_ushort(__float2half_rn(value))
                                     : __bfloat16_as_ushort(__float2bfloat16_rn(value));
}

__device__ __forceinline__ void read_state(const char* from, float (&to)[4]) {
  const float4 v = *reinterpret_cast<const float4*>(from);
  to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
}

__device__ __forceinline__ void read_state(const char* from, double (&to)[4]) {
  const double2 a = reinterpret_cast<const double2*>(from)[0], b = reinterpret_cast<const double2*>(from)[1];
  to[0] = a.x, to[1] = a.y, to[2] = b.x, to[3] = b.y;
}

__device__ __forceinline__ void write_state(const float (&from)[4], char* to) {
  *reinterpret_cast<float4*>(to) = make_float4(from[0], from[1], from[2], from[3]);
}

__device__ __forceinline__ void write_state(const double (&from)[4], char* to) {
  reinterpret_cast<double2*>(to)[0] = make_double2(from[0], from[1]);
  reinterpret_cast<double2*>(to)[1] = make_double2(from[2], from[3]);
}

// An item as it was read, not yet numbers: a conversion would wait for memory, so it has to come after all reads. Items
// of 8 are for calls whose operands all have 16 bits; then, too, they fill 16 bytes.
template <typename T, int kItem>
struct Raw {
  uint32_t words[4];

  static constexpr bool always_narrow = kItem == 8;

  __device__ __forceinline__ void read(const char* from, Storage storage) {
    if (always_narrow || storage == Storage::float32) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    } else {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      words[0] = v.x, words[1] = v.y;
    }
  }

  __device__ __forceinline__ void read_lane(int lane, const char* from, Storage storage) {
    if (!always_narrow && storage == Storage::float32) {
      words[lane % 4] = *reinterpret_cast<const uint32_t*>(from);
    } else {
      put_half(lane, *reinterpret_cast<const unsigned short*>(from));
    }
  }

  __device__ __forceinline__ void set_lane(int lane, float value, Storage storage) {
    if (!always_narrow && storage == Storage::float32) {
      words[lane % 4] = __float_as_uint(value);
    } else {
      put_half(lane, narrow(value, storage));
    }
  }

  __device__ __forceinline__ void decode(T (&to)[kItem], Storage storage) const {
#pragma unroll
    for (int i = 0; i < kItem; ++i) {
      const bool whole = !always_narrow && storage == Storage::float32;
      to[i] = whole ? __uint_as_float(words[i % 4]) : widen((words[i / 2] >> (i % 2 * 16)) & 0xFFFFu, storage);
    }
  }

 private:
  __device__ __forceinline__ void put_half(int lane, uint32_t bits) {
    words[lane / 2] = lane % 2 == 0 ? bits : words[lane / 2] | (bits << 16);
  }
};

__device__ __forceinline__ double read_one(const char* from, Storage storage) {
  switch (storage) {
    case Storage::float64:
      return *reinterpret_cast<const double*>(from);
    case Storage::float32:
      return static_cast<double>(*reinterpret_cast<const float*>(from));
    default:
      return static_cast<double>(widen(*reinterpret_cast<const unsigned short*>(from), storage));
  }
}

// Where float64 is computed in, speed comes second: only float64 itself is read 16 bytes at a time.
template <int kItem>
struct Raw<double, kItem> {
  double values[kItem];

  __device__ __forceinline__ void read(const char* from, Storage storage) {
    if (storage == Storage::float64) {
      read_state(from, values);
    } else {
#pragma unroll
      for (int i = 0; i < kItem; ++i) values[i] = read_one(from + i * bytes_of(storage), storage);
    }
  }

  __device__ __forceinline__ void read_lane(int lane, const char* from, Storage storage) {
    values[lane] = read_one(from, storage);
  }

  __device__ __forceinline__ void set_lane(int lane, double value, Storage) { values[lane] = value; }

  __device__ __forceinline__ void decode(double (&to)[kItem], Storage) const {
#pragma unroll
    for (int i = 0; i < kItem; ++i) to[i] = values[i];
  }
};

template <typename T>
__device__ __forceinline__ void write_one(T value, char* to, Storage storage) {
  switch (storage) {
    case Storage::float32:
      *reinterpret_cast<float*>(to) = static_cast<float>(value);
      break;
    case Storage::float64:
      *reinterpret_cast<double*>(to) = static_cast<double>(value);
      break;
    default:
      *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(narrow(static_cast<float>(value), storage));
  }
}

template <int kItem, typename T>
__device__ __forceinline__ void write_narrow(const T (&from)[kItem], char* to, Storage storage) {
  const auto pair = [&](int i) {
    return narrow(static_cast<float>(from[i]), storage) | narrow(static_cast<float>(from[i + 1]), storage) << 16;
  };
  if constexpr (kItem == 8) {
    *reinterpret_cast<uint4*>(to) = make_uint4(pair(0), pair(2), pair(4), pair(6));
  } else {
    *reinterpret_cast<uint2*>(to) = make_uint2(pair(0), pair(2));
  }
}

template <int kItem, typename T>
__device__ __forceinline__ void write_item(const T (&from)[kItem], char* to, Storage storage) {
  if constexpr (kItem == 4) {
    if (storage == Storage::float32) {
      const float values[4] = {static_cast<float>(from[0]), static_cast<float>(from[1]), static_cast<float>(from[2]),
                               static_cast<float>(from[3])};
      return write_state(values, to);
    }
    if (sizeof(T) == 8 && storage == Storage::float64) return write_state(from, to);
  }
  write_narrow(from, to, storage);
}

// The normals of elements index .. index + kItem - 1. Philox gives four at a time; an index between two groups costs a
// call more.
template <int kItem, typename T>
__device__ __forceinline__ void normals(const NoiseKey& key, int64_t index, T (&n)[kItem]) {
  const auto group = static_cast<uint64_t>(index) / 4;
  float all[kItem + 4];
#pragma unroll
  for (int g = 0; g < kItem / 4; ++g) {
    portable::four_normals(key, group + g, all[4 * g], all[4 * g + 1], all[4 * g + 2], all[4 * g + 3]);
  }
  const int skip = static_cast<int>(index & 3);
  if (skip != 0) {
    portable::four_normals(key, group + kItem / 4, all[kItem], all[kItem + 1], all[kItem + 2], all[kItem + 3]);
    // Two conditional shifts: registers cannot be indexed by a variable.
#pragma unroll
    for (int i = 0; i < kItem + 3; ++i) all[i] = (skip & 1) != 0 ? all[i + 1] : all[i];
#pragma unroll
    for (int i = 0; i < kItem; ++i) all[i] = (skip & 2) != 0 ? all[i + 2] : all[i];
  }
#pragma unroll
  for (int i = 0; i < kItem; ++i) n[i] = static_cast<T>(all[i]);
}

// A thread's place in the operands: elements first .. first + count - 1, which begin in tensor `tensor` of the table.
// `skipped` is what lies before element 0 in memory: the samples before this one, where a batch is walked by samples.
// kPlain says that all operands are float32.
template <typename Operands, bool kPlain>
struct Place {
  static constexpr int kTogether = 1;  // items
  const Operands& table;
  int64_t first, skipped;
  int count, tensor;

  __device__ __forceinline__ bool has(int operand) const { return table.data[operand][0] != nullptr; }

  // The normals of these elements; that of element 0 of the list has index `offset`.
  template <int kItem, typename T>
  __device__ __forceinline__ void draw(const NoiseKey& key, int64_t offset, T (&n)[kItem]) const {
    normals(key, offset + skipped + first, n);
  }

  // load(operand, values, operand, values, ...): all are read before the first is converted. Lanes past the item's
  // end are ones, harmless as values, logarithms or divisors.
  template <int kItem, typename T, typename... Rest>
  __device__ __forceinline__ void load(int operand, T (&to)[kItem], Rest&&... rest) const {
    const Storage storage = storage_of(operand);
    const char* from = address(operand, tensor, first);
    Raw<T, kItem> raw;
    if (vectorises<kItem>(from, storage)) {
      raw.read(from, storage);
    } else {
      each_lane<kItem>([&](int lane, int t) { raw.read_lane(lane, address(operand, t, first + lane), storage); },
                       [&](int lane) { raw.set_lane(lane, T(1), storage); });
    }
    if constexpr (sizeof...(rest) > 0) load(rest...);
    raw.decode(to, storage);
  }

  // The same for an operand that is stored as T: state, which only ever is.
  template <int kItem, typename T>
  __device__ __forceinline__ void load_state(int operand, T (&to)[kItem]) const {
    const char* from = address<sizeof(T)>(operand, tensor, first);
    if (vectorises<kItem, sizeof(T)>(from)) {
      read_state(from, to);
    } else {
      each_lane<kItem>(
          [&](int lane, int t) {
            to[lane] = *reinterpret_cast<const T*>(address<sizeof(T)>(operand, t, first + lane));
          },
          [&](int lane) { to[lane] = T(1); });
    }
  }

  template <int kItem, typename T>
  __device__ __forceinline__ void store_state(int operand, const T (&from)[kItem]) const {
    char* to = address<sizeof(T)>(operand, tensor, first);
    if (vectorises<kItem, sizeof(T)>(to)) {
      write_state(from, to);
    } else {
      each_lane<kItem>(
          [&](int lane, int t) { *reinterpret_cast<T*>(address<sizeof(T)>(operand, t, first + lane)) = from[lane]; },
          [](int) {});
    }
  }

  template <int kItem, typename T>
  __device__ __forceinline__ void store(int operand, const T (&from)[kItem]) const {
    const Storage storage = storage_of(operand);
    char* to = address(operand, tensor, first);
    if (vectorises<kItem>(to, storage)) {
      write_item(from, to, storage);
    } else {
      each_lane<kItem>([&](int lane, int t) { write_one(from[lane], address(operand, t, first + lane), storage); },
                       [](int) {});
    }
  }

 private:
  __device__ __forceinline__ Storage storage_of(int operand) const {
    return kPlain ? Storage::float32 : table.storage[operand];
  }

  __device__ __forceinline__ char* address(int operand, int t, int64_t element) const {
    return table.data[operand][t] + (skipped + element - table.starts[t]) * bytes_of(storage_of(operand));
  }

  template <int kBytes>
  __device__ __forceinline__ char* address(int operand, int t, int64_t element) const {
    return table.data[operand][t] + (skipped + element - table.starts[t]) * kBytes;
  }

  __device__ __forceinline__ bool is_aligned(const char* at, uintptr_t item_bytes) const {
    const uintptr_t alignment = item_bytes < 16 ? item_bytes : 16;
    return (reinterpret_cast<uintptr_t>(at) & (alignment - 1)) == 0;
  }

  template <int kItem>
  __device__ __forceinline__ bool vectorises(const char* at, Storage storage) const {
    return is_whole<kItem>() && is_aligned(at, kItem * bytes_of(storage));
  }

  template <int kItem, int kBytes>
  __device__ __forceinline__ bool vectorises(const char* at) const {
    return is_whole<kItem>() && is_aligned(at, kItem * kBytes);
  }

  // Whether all lanes belong to elements of one tensor.
  template <int kItem>
  __device__ __forceinline__ bool is_whole() const {
    return count == kItem && first + kItem <= table.starts[tensor + 1];
  }

  // inside(lane, its tensor) for every lane of the item, outside(lane) for the rest.
  template <int kItem, typename Inside, typename Outside>
  __device__ __forceinline__ void each_lane(const Inside& inside, const Outside& outside) const {
    int t = tensor;
#pragma unroll
    for (int lane = 0; lane < kItem; ++lane) {
      if (lane >= count) {
        outside(lane);
        continue;
      }
      while (first + lane >= table.starts[t + 1]) ++t;
      inside(lane, t);
    }
  }
};

// The same interface for kTogether items, kThreads items apart, of which nothing has to be asked: they are whole,
// aligned and in one tensor, and begin with a group of normals. Most of the work is done here; two items at a time keep
// a multiprocessor busy while each waits for its own arithmetic.
template <typename Operands, typename ItemsOf, int kItems>
struct Run {
  static constexpr int kTogether = kItems, kItem = ItemsOf::size, kLanes = kItems * kItem, count = kLanes;
  using T = typename ItemsOf::Type;
  const Operands& table;
  int64_t first, skipped;
  int tensor;

  __device__ __forceinline__ bool has(int operand) const { return table.data[operand][0] != nullptr; }

  __device__ __forceinline__ void draw(const NoiseKey& key, int64_t offset, T (&n)[kLanes]) const {
    const uint64_t group = static_cast<uint64_t>(offset + skipped + first) / 4;
#pragma unroll
    for (int i = 0; i < kLanes; i += 4) {
      const uint64_t skip = i / kItem * (kThreads * kItem / 4) + i % kItem / 4;
      portable::four_normals(key, group + skip, n[i], n[i + 1], n[i + 2], n[i + 3]);
    }
  }

  template <typename... Rest>
  __device__ __forceinline__ void load(int operand, T (&to)[kLanes], Rest&&... rest) const {
    const Storage storage = storage_of(operand);
    Raw<T, kItem> raw[kItems];
#pragma unroll
    for (int k = 0; k < kItems; ++k) raw[k].read(address(operand, k), storage);
    if constexpr (sizeof...(rest) > 0) load(rest...);
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      T item[kItem];
      raw[k].decode(item, storage);
#pragma unroll
      for (int i = 0; i < kItem; ++i) to[k * kItem + i] = item[i];
    }
  }

  __device__ __forceinline__ void load_state(int operand, T (&to)[kLanes]) const { load(operand, to); }

  __device__ __forceinline__ void store(int operand, const T (&from)[kLanes]) const {
#pragma unroll
    for (int k = 0; k < kItems; ++k) {
      T item[kItem];
#pragma unroll
      for (int i = 0; i < kItem; ++i) item[i] = from[k * kItem + i];
      write_item(item, address(operand, k), storage_of(operand));
    }
  }

  __device__ __forceinline__ void store_state(int operand, const T (&from)[kLanes]) const { store(operand, from); }

 private:
  __device__ __forceinline__ Storage storage_of(int operand) const {
    return ItemsOf::plain ? Storage::float32 : table.storage[operand];
  }

  __device__ __forceinline__ char* address(int operand, int item) const {
    const int64_t element = skipped + first - table.starts[tensor] + item * (kThreads * kItem);
    return table.data[operand][tensor] + element * bytes_of(storage_of(operand));
  }
};

// An int64 scalar that is known at launch, or lies in device memory: a captured graph then replays with new values.
struct Integer {
  int64_t value;
  const int64_t* pointer;

  __device__ __forceinline__ int64_t get() const { return pointer == nullptr ? value : *pointer; }
};

// A floating-point vector in device memory, or absent.
struct Reals {
  const void* data;
  bool wide;

  template <typename T>
  __device__ __forceinline__ T get(int64_t k) const {
    return wide ? static_cast<T>(static_cast<const double*>(data)[k])
                : static_cast<T>(static_cast<const float*>(data)[k]);
  }
};

// Which normals an op draws; `offset` is the index of the list's first element.
struct Noise {
  Integer seed, step;
  int64_t stream, offset;

  __device__ __forceinline__ NoiseKey key() const {
    const NoiseKey read = portable::noise_key(seed.get(), step.get(), stream);
    return {same_in_warp(read.seed_low), same_in_warp(read.seed_high), read.stream, same_in_warp(read.step)};
  }
};

#define VDU_LANES _Pragma("unroll") for (int i = 0; i < kItem; ++i)

}  // namespace vdu
