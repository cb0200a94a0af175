// What every op shares: reading torch tensors into operands, and running chunks on ATen's thread pool.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../tensors.h"
#include "isa.h"
#include "stream.h"

namespace vdu {

inline int64_t integer(const Tensor& scalar, const char* name) {
  VDU_CHECK(scalar.scalar_type() == ScalarType::Long && scalar.numel() == 1 && scalar.is_cpu(), name,
            " must be an int64 tensor of one element on the CPU");
  return *static_cast<const int64_t*>(scalar.const_data_ptr());
}

inline Draw draw_of(const Tensor& seed, const Tensor& step, int64_t stream) {
  const auto s = static_cast<uint64_t>(integer(seed, "seed"));
  return {static_cast<uint32_t>(s), static_cast<uint32_t>(s >> 32), static_cast<uint32_t>(stream),
          static_cast<uint32_t>(integer(step, "step"))};
}

enum class Access { read, write, update };

// In-place operands must be contiguous: a copy would be written and lost.
inline Operand operand(const Tensors& tensors, const char* name, Access access = Access::read) {
  Operand result;
  result.read = access != Access::write;
  result.write = access != Access::read;
  for (const Tensor& tensor : tensors) {
    VDU_CHECK(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() on it first");
    VDU_CHECK(tensor.is_cpu(), name, " must be on the CPU like the other tensors of this call");
    const Storage storage = storage_of(tensor, name);
    VDU_CHECK(result.data.empty() || storage == result.storage, name, " must be of one dtype");
    result.storage = storage;
    result.data.push_back(static_cast<char*>(tensor.data_ptr()));
  }
  return result;
}

inline Operand operand(const Tensor& tensor, const char* name, Access access = Access::read) {
  return operand(Tensors{tensor}, name, access);
}

// Runs body(chunk) for every chunk; chunks are independent. A second thread is woken only for work that outlasts the
// waking: two full chunks, or as many smaller ones.
template <typename Body>
void for_each_chunk(int64_t chunks, const Body& body, int64_t elements = kChunk) {
  const int64_t grain = std::max<int64_t>(2, 2 * kChunk / std::max<int64_t>(1, elements));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
  });
}

// The same, and adds the K sums that every body(chunk) returns, in the order of the chunks.
template <size_t K, typename Body>
std::array<double, K> sum_chunks(int64_t chunks, const Body& body) {
  std::vector<std::array<double, K>> partial(static_cast<size_t>(chunks));
  for_each_chunk(chunks, [&](int64_t chunk) { partial[static_cast<size_t>(chunk)] = body(chunk); });
  std::array<double, K> total{};
  for (const auto& one : partial) {
    for (size_t k = 0; k < K; ++k) total[k] += one[k];
  }
  return total;
}

// A float64 tensor [K] on the CPU.
template <size_t K>
Tensor doubles(const std::array<double, K>& values) {
  Tensor result = torch::stable::empty({static_cast<int64_t>(K)}, ScalarType::Double);
  std::copy(values.begin(), values.end(), static_cast<double*>(result.mutable_data_ptr()));
  return result;
}

// A scalar tensor in the dtype of sums over elements of `like`.
inline Tensor sum_like(double value, const Tensor& like) {
  Tensor wide = torch::stable::empty({}, ScalarType::Double);
  *static_cast<double*>(wide.mutable_data_ptr()) = value;
  return torch::stable::to(wide, sum_dtype(like));
}

// The value of a floating-point tensor of one element.
inline double value_of(const Tensor& scalar) {
  const Tensor wide = torch::stable::to(scalar, ScalarType::Double);
  return *static_cast<const double*>(wide.const_data_ptr());
}

}  // namespace vdu
