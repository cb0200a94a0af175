// The block functions for avx2.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#pragma GCC target("avx2,f16c")
#define VDU_ISA avx2
#include "blocks_impl.h"

namespace vdu {
extern const Isa isa_avx2;
// Constant-initialised: no code of this instruction set may run while the library is loaded.
constinit const Isa isa_avx2 = avx2::make_isa("avx2");
}  // namespace vdu
#endif
