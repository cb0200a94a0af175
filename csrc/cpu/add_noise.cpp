#include "../core/noise_prediction.h"
#include "samples.h"

namespace vdu {

// x_t = signal x_0 + noise n with coefficients per sample, [B].
Tensor mix_noise(Tensor x0, Tensor signal, Tensor noise, Tensor seed, Tensor step) {
  x0 = torch::stable::contiguous(x0);
  Tensor out = torch::stable::empty_like(x0);
  const Batch batch(x0);
  const auto signals = per_sample(signal, batch.samples, "signal"), noises = per_sample(noise, batch.samples, "noise");
  const Draw draw = draw_of(seed, step, kImageNoiseStream);
  const Operand in = operand(x0, "x0"), to = operand(out, "out", Access::write);
  with_compute_type(is_wide(x0), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    if (batch.small()) {
      for_each_pack<T, 2>(batch, {to, in}, [&](const Stream<T, 2>& elements, int64_t b) {
        alignas(64) T n[kBlock];
        elements.for_each_block(0, [&](const auto& p, int64_t first, int64_t count) {
          blocks.normals(draw, static_cast<uint64_t>(b * batch.elements + first), n);
          for_each_sample(batch, first, count, [&](int64_t sample, int64_t from, int64_t end) {
            const auto at = static_cast<size_t>(b + sample);
            const T scale = static_cast<T>(signals[at]), noise_scale = static_cast<T>(noises[at]);
            for (int64_t i = from; i < end; ++i) p[0][i] = portable::mixed(p[1][i], n[i], scale, noise_scale);
          });
        });
      });
      return;
    }
    for_each_chunk_of_samples(batch, [&](int64_t chunk) {
      const int64_t b = chunk / batch.chunks, start = b * batch.elements;
      const Stream<T, 2> elements(isa(), {0, batch.elements},
                                  {sample_of(to, b, batch.elements), sample_of(in, b, batch.elements)});
      alignas(64) T n[kBlock];
      elements.for_each_block(chunk % batch.chunks, [&](const auto& p, int64_t first, int64_t) {
        blocks.normals(draw, static_cast<uint64_t>(start + first), n);
        blocks.mix(p[1], n, static_cast<T>(signals[static_cast<size_t>(b)]),
                   static_cast<T>(noises[static_cast<size_t>(b)]), p[0]);
      });
    });
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CPU, m) { m.impl("mix_noise", TORCH_BOX(&mix_noise)); }

}  // namespace vdu
