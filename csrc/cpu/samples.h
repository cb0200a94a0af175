// Walks a batch sample by sample: every sample has coefficients of its own, and its elements are numbered within the
// whole batch.
#pragma once

#include "op.h"

namespace vdu {

// A per-sample vector [B] as doubles.
inline std::vector<double> per_sample(const Tensor& tensor, int64_t batch, const char* name) {
  VDU_CHECK(tensor.numel() == batch, name, " must have one element per sample");
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

  // Samples smaller than a block are worked on several at a time: a block each would be mostly padding.
  bool small() const { return 0 < elements && elements < kBlock; }
};

inline Operand sample_of(const Operand& whole, int64_t sample, int64_t elements) {
  Operand one = whole;
  for (char*& data : one.data) data += sample * elements * bytes_of(whole.storage);
  return one;
}

// body(chunk of chunks per sample * samples), for samples of a block or more.
template <typename Body>
void for_each_chunk_of_samples(const Batch& batch, const Body& body) {
  for_each_chunk(batch.samples * batch.chunks, body, std::min(batch.elements, kChunk));
}

// For small samples: body(elements of a pack of whole samples, first sample of the pack).
template <typename T, size_t N, typename Body>
void for_each_pack(const Batch& batch, const std::array<Operand, N>& operands, const Body& body) {
  const int64_t packed = kChunk / batch.elements;
  for_each_chunk((batch.samples + packed - 1) / packed, [&](int64_t pack) {
    const int64_t first = pack * packed, samples = std::min(packed, batch.samples - first);
    std::array<Operand, N> mine;
    for (size_t k = 0; k < N; ++k) mine[k] = sample_of(operands[k], first, batch.elements);
    body(Stream<T, N>(isa(), {0, samples * batch.elements}, std::move(mine)), first);
  });
}

// body(sample, from, to) for every sample that elements first .. first + count - 1 of a pack belong to; from and to are
// places in the block.
template <typename Body>
void for_each_sample(const Batch& batch, int64_t first, int64_t count, const Body& body) {
  int64_t sample = first / batch.elements;
  for (int64_t from = 0; from < count; ++sample) {
    const int64_t to = std::min(count, (sample + 1) * batch.elements - first);
    body(sample, from, to);
    from = to;
  }
}

}  // namespace vdu
