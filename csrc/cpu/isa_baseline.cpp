// The block functions for the instruction set that every machine of the platform has.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

#define VDU_ISA baseline
#include "blocks_impl.h"

namespace vdu {
extern const Isa isa_baseline;
// Constant-initialised: no code of this instruction set may run while the library is loaded.
constinit const Isa isa_baseline = baseline::make_isa("baseline");
}  // namespace vdu
