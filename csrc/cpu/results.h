// Memory for results that an op makes itself.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "../tensors.h"

namespace vdu {

// Allocations of at least this many bytes always come fresh from the system (glibc's largest M_MMAP_THRESHOLD).
constexpr int64_t kFreshBytes = 32 << 20;

// An uninitialised tensor like another. Fresh memory is mapped page by page as it is first written, which takes longer
// than computing what is written; pages of 2 MiB, where the system grants them, are 512 times fewer.
inline Tensor result_like(const Tensor& like) {
  Tensor result = torch::stable::empty_like(like);
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 2 << 20;
  const int64_t bytes = result.numel() * static_cast<int64_t>(bytes_of(storage_of(result, "result")));
  if (bytes >= kFreshBytes) {
    const auto begin = reinterpret_cast<uintptr_t>(result.mutable_data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page, last = (begin + static_cast<uintptr_t>(bytes)) / page * page;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // advice: refused, it costs time only
  }
#endif
  return result;
}

}  // namespace vdu
