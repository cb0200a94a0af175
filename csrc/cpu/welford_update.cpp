#include "op.h"

namespace vdu {

// Takes one more value into a running mean and sum of squared deviations, `count` being the number of values with it.
// Returns [2] in float64: the sums of (value - mean before)^2 and of value^2.
Tensor welford_update_(Tensor mean, Tensor squares, Tensor value, int64_t count) {
  check_same_sizes({mean.numel()}, {squares}, "squares");
  check_same_sizes({mean.numel()}, {value}, "value");
  VDU_CHECK(count >= 1, "count must be at least 1, the number of values with this one");
  value = torch::stable::contiguous(value);
  const auto sums = with_compute_type(is_wide(mean), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const T inverse_count = static_cast<T>(1.0 / static_cast<double>(count));
    const Stream<T, 3> elements(
        isa(), starts_of({mean.numel()}),
        {operand(mean, "mean", Access::update), operand(squares, "squares", Access::update), operand(value, "value")});
    return sum_chunks<2>(chunks_of(elements.numel()), [&](int64_t chunk) {
      std::array<double, 2> sum{};
      elements.for_each_block(chunk, [&](const auto& p, int64_t, int64_t n) {
        double distance, length;
        blocks.welford(p[0], p[1], p[2], inverse_count, n, distance, length);
        sum[0] += distance;
        sum[1] += length;
      });
      return sum;
    });
  });
  return doubles(sums);
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CPU, m) { m.impl("welford_update_", TORCH_BOX(&welford_update_)); }

}  // namespace vdu
