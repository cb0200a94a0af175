// What the ops of every native backend share: torch's tensors by their stable ABI, and the checks on them.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "check.h"
#include "core/storage.h"

namespace vdu {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;

// Values of vdu_fast.rng.Stream.
constexpr int64_t kWeightsStream = 0, kImageNoiseStream = 1;

inline Storage storage_of(const Tensor& tensor, const char* name) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Storage::float32;
    case ScalarType::Double:
      return Storage::float64;
    case ScalarType::Half:
      return Storage::float16;
    case ScalarType::BFloat16:
      return Storage::bfloat16;
    default:
      VDU_CHECK(false, name, " must be float32, float64, float16 or bfloat16");
  }
  return Storage::float32;
}

inline std::vector<int64_t> numels_of(const Tensors& tensors) {
  std::vector<int64_t> numels;
  for (const Tensor& tensor : tensors) numels.push_back(tensor.numel());
  return numels;
}

// Refuses a list that does not match the first one; an optional list may be empty.
inline void check_same_sizes(const std::vector<int64_t>& numels, const Tensors& tensors, const char* name,
                             bool optional = false) {
  if (optional && tensors.empty()) return;
  VDU_CHECK(numels_of(tensors) == numels, name, " must have as many elements, tensor by tensor, as the first list");
}

inline void check_same_shape(const Tensor& a, const Tensor& b, const char* name) {
  const auto x = a.sizes(), y = b.sizes();
  VDU_CHECK(x.size() == y.size() && std::equal(x.begin(), x.end(), y.begin()), name,
            " must have the shape of the first tensor");
  VDU_CHECK(a.scalar_type() == b.scalar_type(), name, " must have the dtype of the first tensor");
}

// Refuses operands of variational_step_ that do not go together; returns the sizes of its tensors. Empty lists are
// absent.
inline std::vector<int64_t> check_step(const Tensors& theta, const Tensors& grad, const Tensors& center,
                                       const Tensors& prior_std, const Tensors& z, const Tensors& first,
                                       const Tensors& second, const Tensors& log_std, const Tensors& std_first,
                                       const Tensors& std_second, const Tensors& noise_grad, int64_t rule) {
  const auto numels = numels_of(theta);
  check_same_sizes(numels, grad, "grad");
  check_same_sizes(numels, center, "center");
  check_same_sizes(numels, prior_std, "prior_std");
  check_same_sizes(numels, z, "z");
  check_same_sizes(numels, first, "first", true);
  check_same_sizes(numels, second, "second", true);
  check_same_sizes(numels, log_std, "log_std", true);
  check_same_sizes(numels, std_first, "std_first", true);
  check_same_sizes(numels, std_second, "std_second", true);
  check_same_sizes(numels, noise_grad, "noise_grad", true);
  VDU_CHECK(rule >= 0 && rule <= 3, "rule must be 0 to 3");
  VDU_CHECK(rule < 2 || (first.size() == z.size() && second.size() == z.size()),
            "the Adam rules need first and second");
  VDU_CHECK(log_std.size() == std_first.size() && log_std.size() == std_second.size(),
            "log_std, std_first and std_second go together");
  return numels;
}

// Calls body with a value of the type that tensors of this dtype are computed in.
template <typename Body>
auto with_compute_type(bool wide, const Body& body) {
  return wide ? body(double{}) : body(float{});
}

inline bool is_wide(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Double; }

inline bool is_wide(const Tensors& tensors) { return !tensors.empty() && is_wide(tensors.front()); }

// The dtype of sums over elements of this tensor: at least float32.
inline ScalarType sum_dtype(const Tensor& tensor) { return is_wide(tensor) ? ScalarType::Double : ScalarType::Float; }

}  // namespace vdu
