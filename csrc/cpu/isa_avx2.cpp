// The block functions for avx2.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx2,f16c")
#define VDU_ISA avx2
#define VDU_AVX2  // g++ reads the whole file before it heeds the pragma, so it does not set __AVX2__
#include "blocks_impl.h"

namespace vdu {
extern const Isa isa_avx2;
// Constant-initialised: no code of this instruction set may run while the library is loaded.
constinit const Isa isa_avx2 = avx2::make_isa("avx2");
}  // namespace vdu
#endif
