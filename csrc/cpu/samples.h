// Walks a batch sample by sample: every sample has coefficients of its own, and its elements are numbered within the
// whole batch.
#pragma once

#include "op.h"

namespace vdu {

// A per-sample vector [B] as doubles.
inline std::vector<double> per_sample(const Tensor& tensor, int64_t batch, const char* name) {
  STD_TORCH_CHECK(tensor.numel() == batch, name, " must have one element per sample");
  const Tensor wide = torch::stable::contiguous(torch::stable::to(tensor, ScalarType::Double));
  const auto* values = static_cast<const double*>(wide.const_data_ptr());
  return {values, values + batch};
}

inline std::vector<double> per_sample(const std::optional<Tensor>& tensor, int64_t batch, double otherwise,
                                      const char* name) {
  if (!tensor.has_value()) return std::vector<double>(static_cast<size_t>(batch), otherwise);
  return per_sample(*tensor, batch, name);
}

// Elements of one sample, in chunks that never cross into the next sample.
struct Batch {
  int64_t samples, elements, chunks;

  explicit Batch(const Tensor& tensor)
      : samples(tensor.dim() == 0 ? 1 : tensor.size(0)),
        elements(samples == 0 ? 0 : tensor.numel() / samples),
        chunks(chunks_of(elements)) {}
};

inline Operand sample_of(const Operand& whole, int64_t sample, int64_t elements) {
  Operand one = whole;
  for (char*& data : one.data) data += sample * elements * bytes_of(whole.storage);
  return one;
}

}  // namespace vdu
