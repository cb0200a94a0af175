#include "op.cuh"

namespace vdu {

namespace {

template <typename T>
struct StandardNormal {
  static constexpr int kSums = 0, kTogether = 2;
  Noise noise;

  __device__ NoiseKey prepare() const { return noise.key(); }

  __device__ int64_t first_normal() const { return noise.offset; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(const NoiseKey& key, const Place& place, double*) const {
    T n[kItem];
    place.draw(key, noise.offset, n);
    place.store(0, n);
  }
};

}  // namespace

// Fills out with the normals of elements offset, offset + 1, ...
void standard_normal_(Tensor out, Tensor seed, Tensor step, int64_t stream, int64_t offset) {
  const auto guard = on_device_of(out);
  const Noise noise = noise_of(seed, step, stream, offset, out);
  const Lists<1, 1> lists(out, is_wide(out), {Operand{{out}, "out"}});
  with_items(lists, [&](auto items) {
    over_lists<decltype(items)>(lists, StandardNormal<typename decltype(items)::Type>{noise});
  });
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CUDA, m) { m.impl("standard_normal_", TORCH_BOX(&standard_normal_)); }

}  // namespace vdu
