#include "isa.h"

#include <atomic>

namespace vdu {

extern const Isa isa_baseline;
#if defined(__x86_64__)
extern const Isa isa_avx2;
extern const Isa isa_avx512;
#endif

namespace {

std::vector<const Isa*> available() {
  std::vector<const Isa*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("f16c")) {
    found.push_back(&isa_avx512);
  }
  // Every processor with AVX2 also converts half precision (F16C), but a virtual machine may hide it.
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")) found.push_back(&isa_avx2);
#endif
  found.push_back(&isa_baseline);
  return found;
}

std::atomic<const Isa*>& chosen() {
  static std::atomic<const Isa*> current{available().front()};
  return current;
}

}  // namespace

const Isa& isa() { return *chosen().load(std::memory_order_relaxed); }

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (const Isa* one : available()) names.emplace_back(one->name);
  return names;
}

bool choose_isa(const std::string& name) {
  for (const Isa* one : available()) {
    if (name == one->name) {
      chosen() = one;
      return true;
    }
  }
  return false;
}

}  // namespace vdu
