// The block functions for avx512.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,f16c,prefer-vector-width=512")
#define VDU_ISA avx512
#define VDU_AVX512  // g++ reads the whole file before it heeds the pragma, so it does not set __AVX512F__
// g++ 12 finds its own intrinsics uninitialised where they mean it (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include "blocks_impl.h"

namespace vdu {
extern const Isa isa_avx512;
// Constant-initialised: no code of this instruction set may run while the library is loaded.
constinit const Isa isa_avx512 = avx512::make_isa("avx512");
}  // namespace vdu
#endif
