#include "../core/noise_prediction.h"
#include "op.cuh"

namespace vdu {

namespace {

template <typename T>
struct MixNoise {
  static constexpr int kSums = 0, kTogether = 2;
  enum : int { kOut, kX0, kOperands };
  struct Coefficients {
    T signal, noise;
  };
  Noise image_noise;
  Reals signal, noise;

  __device__ NoiseKey prepare() const { return image_noise.key(); }

  __device__ int64_t first_normal() const { return image_noise.offset; }

  __device__ Coefficients coefficients(int64_t sample) const {
    return {signal.get<T>(sample), noise.get<T>(sample)};
  }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Coefficients& k, const Place& place, double*) const {
    T x0[kItem], n[kItem];
    place.load(kX0, x0);
    place.draw(key, image_noise.offset, n);
    VDU_LANES x0[i] = portable::mixed(x0[i], n[i], k.signal, k.noise);
    place.store(kOut, x0);
  }
};

}  // namespace

// x_t = signal x_0 + noise n with coefficients per sample, [B].
Tensor mix_noise(Tensor x0, Tensor signal, Tensor noise, Tensor seed, Tensor step) {
  const auto guard = on_device_of(x0);
  x0 = torch::stable::contiguous(x0);
  Tensor out = torch::stable::empty_like(x0);
  const int64_t samples = samples_of(x0);
  signal = reals_beside(signal, samples, "signal", x0);
  noise = reals_beside(noise, samples, "noise", x0);
  const Noise image_noise = noise_of(seed, step, kImageNoiseStream, 0, x0);
  const Lists<2, 1> lists(x0, is_wide(x0), {Operand{{out}, "out"}, Operand{{x0}, "x0"}});
  with_items(lists, [&](auto items) {
    using T = typename decltype(items)::Type;
    over_batch<decltype(items)>(lists, samples, MixNoise<T>{image_noise, reals_of(signal), reals_of(noise)});
  });
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CUDA, m) { m.impl("mix_noise", TORCH_BOX(&mix_noise)); }

}  // namespace vdu
