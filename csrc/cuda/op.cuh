// Host side of every op: reading torch tensors into tables of pointers, and launching on torch's current stream.
//
// Nothing here waits for the device or reads its memory, and what is allocated comes from torch's caching allocator, so
// every op can be captured in a CUDA graph.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "kernels.cuh"
#include "runtime.cuh"

namespace vdu {

// A scalar that is read now if it is on the CPU, and by the kernel if it is on the device.
inline Integer integer(const Tensor& scalar, const char* name, const Tensor& like) {
  VDU_CHECK(scalar.scalar_type() == ScalarType::Long && scalar.numel() == 1, name,
            " must be an int64 tensor of one element");
  const auto* data = static_cast<const int64_t*>(scalar.const_data_ptr());
  if (is_readable(scalar)) return {*data, nullptr};
  VDU_CHECK(is_beside(scalar, like), name, " must be on the CPU or on the device of the other tensors");
  return {0, data};
}

inline Noise noise_of(const Tensor& seed, const Tensor& step, int64_t stream, int64_t offset, const Tensor& like) {
  return {integer(seed, "seed", like), integer(step, "step", like), stream, offset};
}

// A floating-point vector of `count` elements as the kernels read it: contiguous, float32 or float64, on the device.
inline Tensor reals_beside(const Tensor& vector, int64_t count, const char* name, const Tensor& like) {
  VDU_CHECK(vector.numel() == count, name, " must have one element per sample");
  const ScalarType dtype = vector.scalar_type();
  Tensor result = is_beside(vector, like) ? vector : torch::stable::to(vector, like.device(), /*non_blocking=*/true);
  if (dtype != ScalarType::Float && dtype != ScalarType::Double) result = torch::stable::to(result, ScalarType::Double);
  return torch::stable::contiguous(result);
}

inline Reals reals_of(const Tensor& vector) { return {vector.const_data_ptr(), is_wide(vector)}; }

inline Reals reals_of(const std::optional<Tensor>& vector) {
  return vector.has_value() ? reals_of(*vector) : Reals{nullptr, false};
}

struct Operand {
  Tensors tensors;  // none where an optional operand is absent
  const char* name;
  bool state = false;  // stored in what the call is computed in
};

inline Operand state(const Tensors& tensors, const char* name) { return {tensors, name, true}; }

// The operands of a call, tensor by tensor; tensors without elements are left out. Up to kTensors go into one launch.
template <int kOperands, int kTensors = kTensorsAtOnce<kOperands>>
struct Lists {
  Tensor like;
  std::vector<int64_t> starts{0};
  std::array<std::vector<char*>, kOperands> data;
  std::array<Storage, kOperands> storage{};
  bool wide;           // computed in double
  bool narrow = true;  // all operands are 16-bit
  bool plain = true;   // all operands are float32

  Lists(const Tensor& first, bool computed_in_double, const std::array<Operand, kOperands>& operands)
      : like(first), wide(computed_in_double) {
    for (const Tensor& tensor : operands[0].tensors) {
      if (tensor.numel() > 0) starts.push_back(starts.back() + tensor.numel());
    }
    for (size_t k = 0; k < kOperands; ++k) add(k, operands[k]);
  }

  int64_t numel() const { return starts.back(); }

 private:
  // In-place operands must be contiguous, since a copy would be written and lost; functional ops have made theirs so.
  void add(size_t k, const Operand& operand) {
    for (const Tensor& tensor : operand.tensors) {
      VDU_CHECK(tensor.is_contiguous(), operand.name, " must be contiguous; call .contiguous() on it first");
      VDU_CHECK(is_beside(tensor, like), operand.name, " must be on the device of the other tensors of this call");
      const Storage now = storage_of(tensor, operand.name);
      VDU_CHECK(data[k].empty() || now == storage[k], operand.name, " must be of one dtype");
      VDU_CHECK(now != Storage::float64 || wide, operand.name,
                " must not be float64 where the state is not; convert it, or keep the state in float64");
      VDU_CHECK(!operand.state || now == (wide ? Storage::float64 : Storage::float32), operand.name,
                " is state and must be float32, or float64 like the rest of it");
      storage[k] = now;
      narrow = narrow && bytes_of(now) == 2;
      plain = plain && now == Storage::float32;
      if (tensor.numel() > 0) data[k].push_back(static_cast<char*>(tensor.data_ptr()));
    }
  }
};

// Calls body with the Items that suit the operands.
template <typename AnyLists, typename Body>
void with_items(const AnyLists& lists, const Body& body) {
  if (lists.wide) {
    body(Items<double, 4>{});
  } else if (lists.narrow) {
    body(Items<float, 8>{});
  } else if (lists.plain) {
    body(Items<float, 4, true>{});
  } else {
    body(Items<float, 4>{});
  }
}

// Part of a list that goes into one launch: elements begin .. end - 1, which lie in `tensors` tensors from `tensor` on.
struct Part {
  int64_t begin, end;
  size_t tensor, tensors;
  int64_t first_slot;  // of its partial sums
};

// Cuts between chunks, so that sums have the bits of the flat form. Only where more than kTensors tensors lie in one
// chunk is that chunk cut too, between items; its sum is then added up in another order.
inline std::vector<Part> parts_of(const std::vector<int64_t>& starts, size_t at_once, int64_t item, int64_t& slots) {
  std::vector<Part> parts;
  const size_t count = starts.size() - 1;
  slots = 0;
  for (int64_t begin = 0; begin < starts.back();) {
    const auto tensor = static_cast<size_t>(std::upper_bound(starts.begin(), starts.end(), begin) - starts.begin()) - 1;
    const size_t last = std::min(tensor + at_once, count);
    int64_t end = starts[last];
    if (last < count) {
      const int64_t chunked = end / kChunk * kChunk;
      end = chunked > begin ? chunked : end / item * item;
    }
    const auto after = static_cast<size_t>(std::lower_bound(starts.begin(), starts.end(), end) - starts.begin());
    parts.push_back({begin, end, tensor, after - tensor, slots});
    slots += chunks_of(end) - begin / kChunk;
    begin = end;
  }
  return parts;
}

template <int kOperands, int kTensors>
Table<kOperands, kTensors> table_of(const Lists<kOperands, kTensors>& lists, const Part& part, int64_t item) {
  Table<kOperands, kTensors> table{};
  for (size_t k = 0; k < kOperands; ++k) {
    table.storage[k] = lists.storage[k];
    if (lists.data[k].empty()) continue;
    std::copy_n(lists.data[k].begin() + static_cast<std::ptrdiff_t>(part.tensor), part.tensors, table.data[k]);
  }
  std::copy_n(lists.starts.begin() + static_cast<std::ptrdiff_t>(part.tensor), part.tensors + 1, table.starts);
  table.begin = part.begin;
  table.end = part.end;
  table.tensors = static_cast<int>(part.tensors);
  for (size_t t = 0; t < part.tensors; ++t) {
    const auto aligned = [&](size_t k) {
      if (lists.data[k].empty()) return true;
      const int64_t bytes = bytes_of(lists.storage[k]);
      const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(table.data[k][t])) - table.starts[t] * bytes;
      return at % std::min<int64_t>(16, item * bytes) == 0;
    };
    bool all = true;
    for (size_t k = 0; k < kOperands; ++k) all = all && aligned(k);
    table.aligned |= static_cast<uint64_t>(all) << t;
  }
  return table;
}

// Elements begin .. end - 1 in spans; longer than a chunk only where `all` elements of the call make blocks enough to
// even out.
template <typename Op>
Spans spans_of(int64_t begin, int64_t end, int64_t all, int item) {
  const int64_t unit = Op::kSums > 0 ? kChunk : item, first = begin / unit * unit;
  // From four chunks on, what a block has to find out first is below a hundredth of its work.
  const int64_t chunks = Op::kSums > 0 ? 1 : std::clamp<int64_t>(chunks_of(all) / kEnoughBlocks, 1, 4);
  const int64_t size = kChunk * std::min(chunks, std::max<int64_t>(chunks_of(end - first), 1));
  return {first, size, (end - first + size - 1) / size};
}

inline int64_t blocks_of(int64_t count) { return std::min(count, kMostBlocks); }

template <typename Op>
Tensor partials_of(const Tensor& like, int64_t slots) {
  return torch::stable::new_empty(like, {Op::kSums * slots}, ScalarType::Double);
}

// Adds up rows of partial sums into `out`, float32 or float64.
inline void fold(const Tensor& partials, int64_t rows, int64_t per_row, const Tensor& out) {
  if (rows == 0) return;
  const auto* data = static_cast<const double*>(partials.const_data_ptr());
  if (is_wide(out)) {
    launch(fold_partials<double>, {rows}, kThreads, out, data, per_row, static_cast<double*>(out.mutable_data_ptr()));
  } else {
    launch(fold_partials<float>, {rows}, kThreads, out, data, per_row, static_cast<float*>(out.mutable_data_ptr()));
  }
}

// Runs an op over the elements of lists; its sums, if it has any, go into `sums`, [Op::kSums].
template <typename ItemsOf, int kOperands, int kTensors, typename Op>
void over_lists(const Lists<kOperands, kTensors>& lists, const Op& op, const std::optional<Tensor>& sums = {}) {
  static_assert(sizeof(Table<kOperands, kTensors>) + sizeof(Op) + sizeof(Spans) + 24 <= 4096,
                "a kernel's parameters have 4 KiB");
  int64_t slots = 0;
  const auto parts = parts_of(lists.starts, kTensors, ItemsOf::size, slots);
  std::optional<Tensor> partials;
  if constexpr (Op::kSums > 0) partials = partials_of<Op>(lists.like, slots);
  double* places = partials.has_value() ? static_cast<double*>(partials->mutable_data_ptr()) : nullptr;
  for (const Part& part : parts) {
    const Spans spans = spans_of<Op>(part.begin, part.end, lists.numel(), ItemsOf::size);
    launch(over_elements<ItemsOf, Op, Table<kOperands, kTensors>>, {blocks_of(spans.count)}, kThreads, lists.like,
           table_of(lists, part, ItemsOf::size), op, spans, places, part.first_slot, slots);
  }
  if constexpr (Op::kSums > 0) fold(*partials, Op::kSums, slots, *sums);
}

// Runs an op over a batch, sample by sample; its sums, if it has any, go into `sums`, [samples].
template <typename ItemsOf, int kOperands, typename Op>
void over_batch(const Lists<kOperands, 1>& lists, int64_t samples, const Op& op,
                const std::optional<Tensor>& sums = {}) {
  const int64_t elements = samples == 0 ? 0 : lists.numel() / samples, chunks = chunks_of(elements);
  std::optional<Tensor> partials;
  if constexpr (Op::kSums > 0) partials = partials_of<Op>(lists.like, samples * chunks);
  double* places = partials.has_value() ? static_cast<double*>(partials->mutable_data_ptr()) : nullptr;
  if (lists.numel() > 0) {
    auto table = table_of(lists, {0, lists.numel(), 0, 1, 0}, ItemsOf::size);
    table.starts[1] = table.end = elements;
    const Spans spans = spans_of<Op>(0, elements, lists.numel(), ItemsOf::size);
    launch(over_samples<ItemsOf, Op, Table<kOperands, 1>>, {blocks_of(spans.count), blocks_of(samples)}, kThreads,
           lists.like, table, op, spans, places, samples);
  }
  if constexpr (Op::kSums > 0) fold(*partials, samples, chunks, *sums);
}

inline int64_t samples_of(const Tensor& tensor) { return tensor.dim() == 0 ? 1 : tensor.size(0); }

inline Tensor doubles_beside(const Tensor& like, int64_t count) {
  return torch::stable::new_empty(like, {count}, ScalarType::Double);
}

// A scalar in the dtype of sums over elements of `like`.
inline Tensor sum_beside(const Tensor& like) { return torch::stable::new_empty(like, {}, sum_dtype(like)); }

}  // namespace vdu
