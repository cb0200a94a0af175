// Walks several lists of tensors side by side in blocks of kBlock elements.
//
// Element g of a list is element g of its tensors laid end to end, so a list of parameters and the flat arena that
// holds them give the same blocks, and with them the same noise, the same bits and the same sums. No torch in here.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#include "../core/storage.h"
#include "blocks.h"

namespace vdu {

template <typename T>
constexpr bool stored_as(Storage storage) {
  return storage == (std::is_same_v<T, double> ? Storage::float64 : Storage::float32);
}

// One list of tensors; `data` is empty where an optional operand is absent.
struct Operand {
  std::vector<char*> data;
  Storage storage = Storage::float32;
  bool read = true, write = false;
};

// Chunks are the unit of parallel work and of reduction: one partial sum per chunk, whatever the number of threads.
constexpr int64_t kChunk = 64 * kBlock;

inline int64_t chunks_of(int64_t numel) { return (numel + kChunk - 1) / kChunk; }

// Start of every tensor of a list in the global numbering, and the end of the last.
inline std::vector<int64_t> starts_of(const std::vector<int64_t>& numels) {
  std::vector<int64_t> starts(numels.size() + 1, 0);
  for (size_t k = 0; k < numels.size(); ++k) starts[k + 1] = starts[k] + numels[k];
  return starts;
}

// Index of the tensor that holds a global element; empty tensors hold none.
inline size_t tensor_of(const std::vector<int64_t>& starts, int64_t element) {
  return static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), element) - starts.begin()) - 1;
}

// Results of at least this many bytes go around the caches: they would be evicted before anyone reads them, and a store
// that goes through the cache first fetches the line that it is about to overwrite.
constexpr int64_t kStreamedBytes = 32 << 20;

// Makes what Isa::copy_around_caches wrote visible to other threads, before they are told that it is there.
inline void finish_copies() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

template <typename T, size_t N>
class Stream {
 public:
  Stream(const Isa& isa, std::vector<int64_t> starts, std::array<Operand, N> operands)
      : isa_(isa),
        starts_(std::move(starts)),
        operands_(std::move(operands)),
        around_caches_(numel() * static_cast<int64_t>(sizeof(T)) >= kStreamedBytes) {}

  int64_t numel() const { return starts_.back(); }

  // Calls body(pointers, first element, count) for every block of a chunk. Each pointer covers kBlock elements of T, of
  // which count are the stream's own; the rest are ones, harmless as values, logarithms or divisors.
  template <typename Body>
  void for_each_block(int64_t chunk, const Body& body) const {
    const int64_t begin = chunk * kChunk, end = std::min(begin + kChunk, numel());
    alignas(64) T scratch[N][kBlock];
    std::array<T*, N> pointers;
    for (int64_t first = begin; first < end; first += kBlock) {
      const int64_t count = std::min(kBlock, end - first);
      const size_t tensor = tensor_of(starts_, first);
      const bool whole = count == kBlock && first + kBlock <= starts_[tensor + 1];
      for (size_t k = 0; k < N; ++k) pointers[k] = fetch(operands_[k], tensor, first, count, whole, scratch[k]);
      body(pointers, first, count);
      for (size_t k = 0; k < N; ++k) {
        if (operands_[k].write && pointers[k] == scratch[k]) put(operands_[k], tensor, first, count, whole, scratch[k]);
      }
    }
    if (around_caches_) finish_copies();
  }

 private:
  T* fetch(const Operand& operand, size_t tensor, int64_t first, int64_t count, bool whole, T* scratch) const {
    if (operand.data.empty()) return nullptr;
    if (whole && stored_as<T>(operand.storage)) {
      T* place = reinterpret_cast<T*>(operand.data[tensor]) + (first - starts_[tensor]);
      return goes_around_caches(operand, place) ? scratch : place;
    }
    if (operand.read) {
      pieces(tensor, first, count, [&](size_t t, int64_t inside, int64_t at, int64_t n) {
        load(operand.storage, operand.data[t] + inside * bytes_of(operand.storage), scratch + at, n);
      });
    }
    std::fill(scratch + (operand.read ? count : 0), scratch + kBlock, T(1));
    return scratch;
  }

  bool goes_around_caches(const Operand& operand, const void* place) const {
    return around_caches_ && operand.write && !operand.read && reinterpret_cast<uintptr_t>(place) % 16 == 0;
  }

  void put(const Operand& operand, size_t tensor, int64_t first, int64_t count, bool whole, const T* scratch) const {
    if (whole && stored_as<T>(operand.storage)) {
      return isa_.copy_around_caches(reinterpret_cast<T*>(operand.data[tensor]) + (first - starts_[tensor]), scratch,
                                     kBlock * static_cast<int64_t>(sizeof(T)));
    }
    pieces(tensor, first, count, [&](size_t t, int64_t inside, int64_t at, int64_t n) {
      store(operand.storage, scratch + at, operand.data[t] + inside * bytes_of(operand.storage), n);
    });
  }

  // body(tensor, place inside it, place inside the block, length) for every tensor that a block touches.
  template <typename Body>
  void pieces(size_t tensor, int64_t first, int64_t count, const Body& body) const {
    for (int64_t at = 0; at < count; ++tensor) {
      const int64_t n = std::min(count - at, starts_[tensor + 1] - (first + at));
      if (n > 0) body(tensor, first + at - starts_[tensor], at, n);
      at += n;
    }
  }

  void load(Storage storage, const char* from, T* to, int64_t n) const {
    if (stored_as<T>(storage)) {
      std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    } else if constexpr (std::is_same_v<T, float>) {
      load_float(storage, from, to, n);
    } else {
      float narrow[kBlock];
      load_float(storage, from, narrow, n);
      for (int64_t i = 0; i < n; ++i) to[i] = narrow[i];
    }
  }

  void store(Storage storage, const T* from, char* to, int64_t n) const {
    if (stored_as<T>(storage)) {
      std::memcpy(to, from, static_cast<size_t>(n) * sizeof(T));
    } else if constexpr (std::is_same_v<T, float>) {
      store_float(storage, from, to, n);
    } else {
      float narrow[kBlock];
      for (int64_t i = 0; i < n; ++i) narrow[i] = static_cast<float>(from[i]);
      store_float(storage, narrow, to, n);
    }
  }

  void load_float(Storage storage, const char* from, float* to, int64_t n) const {
    const auto* words = reinterpret_cast<const uint16_t*>(from);
    switch (storage) {
      case Storage::float32:
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
        break;
      case Storage::float64:
        for (int64_t i = 0; i < n; ++i) {
          double wide;
          std::memcpy(&wide, from + i * bytes_of(storage), sizeof wide);
          to[i] = static_cast<float>(wide);
        }
        break;
      case Storage::float16:
        isa_.convert.from_half(words, to, n);
        break;
      case Storage::bfloat16:
        isa_.convert.from_bfloat16(words, to, n);
        break;
    }
  }

  void store_float(Storage storage, const float* from, char* to, int64_t n) const {
    auto* words = reinterpret_cast<uint16_t*>(to);
    switch (storage) {
      case Storage::float32:
        std::memcpy(to, from, static_cast<size_t>(n) * sizeof(float));
        break;
      case Storage::float64:
        for (int64_t i = 0; i < n; ++i) {
          const double wide = from[i];
          std::memcpy(to + i * bytes_of(storage), &wide, sizeof wide);
        }
        break;
      case Storage::float16:
        isa_.convert.to_half(from, words, n);
        break;
      case Storage::bfloat16:
        isa_.convert.to_bfloat16(from, words, n);
        break;
    }
  }

  const Isa& isa_;
  std::vector<int64_t> starts_;
  std::array<Operand, N> operands_;
  bool around_caches_;
};

}  // namespace vdu
