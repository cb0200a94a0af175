#include "../core/moments.h"
#include "op.cuh"

namespace vdu {

namespace {

template <typename T>
struct WelfordUpdate {
  static constexpr int kSums = 2;
  enum : int { kMean, kSquares, kValue, kOperands };
  T inverse_count;

  __device__ Nothing prepare() const { return {}; }

  template <int kItem, typename Place>
  __device__ __forceinline__ void item(Nothing, const Place& place, double* sums) const {
    T mean[kItem], squares[kItem], value[kItem], apart[kItem];
    place.load_state(kMean, mean);
    place.load_state(kSquares, squares);
    place.load(kValue, value);
    VDU_LANES {
      const T delta = portable::welford_step(mean[i], squares[i], value[i], inverse_count);
      apart[i] = delta * delta;
      value[i] = value[i] * value[i];
    }
    place.store_state(kMean, mean);
    place.store_state(kSquares, squares);
    add_terms(sums[0], apart, place);
    add_terms(sums[1], value, place);
  }
};

}  // namespace

// Takes one more value into a running mean and sum of squared deviations, `count` being the number of values with it.
// Returns [2] in float64, on the device: the sums of (value - mean before)^2 and of value^2.
Tensor welford_update_(Tensor mean, Tensor squares, Tensor value, int64_t count) {
  check_same_sizes({mean.numel()}, {squares}, "squares");
  check_same_sizes({mean.numel()}, {value}, "value");
  VDU_CHECK(count >= 1, "count must be at least 1, the number of values with this one");
  const auto guard = on_device_of(mean);
  value = torch::stable::contiguous(value);
  Tensor sums = doubles_beside(mean, 2);
  const Lists<3, 1> lists(mean, is_wide(mean),
                          {state({mean}, "mean"), state({squares}, "squares"), Operand{{value}, "value"}});
  with_compute_type(lists.wide, [&](auto zero) {
    using T = decltype(zero);
    over_lists<Items<T, 4>>(lists, WelfordUpdate<T>{static_cast<T>(1.0 / static_cast<double>(count))}, sums);
  });
  return sums;
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CUDA, m) { m.impl("welford_update_", TORCH_BOX(&welford_update_)); }

}  // namespace vdu
