#include "op.h"

namespace vdu {

// Fills out with the normals of elements offset, offset + 1, ...
void standard_normal_(Tensor out, Tensor seed, Tensor step, int64_t stream, int64_t offset) {
  const Draw draw = draw_of(seed, step, stream);
  with_compute_type(is_wide(out), [&](auto zero) {
    using T = decltype(zero);
    const auto& blocks = isa().blocks<T>();
    const Stream<T, 1> elements(isa(), starts_of({out.numel()}), {operand(out, "out", Access::write)});
    for_each_chunk(chunks_of(out.numel()), [&](int64_t chunk) {
      elements.for_each_block(chunk, [&](const auto& p, int64_t first, int64_t) {
        blocks.normals(draw, static_cast<uint64_t>(offset + first), p[0]);
      });
    });
  });
}

STABLE_TORCH_LIBRARY_IMPL(vdu_fast, CPU, m) { m.impl("standard_normal_", TORCH_BOX(&standard_normal_)); }

}  // namespace vdu
