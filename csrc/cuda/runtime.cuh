// All that the ops need of CUDA's runtime and of torch's idea of a device. tests/emulation has a stand-in for it, in
// which threads of the host run the kernels: nothing else here may call the runtime.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../tensors.h"

namespace vdu {

using torch::stable::accelerator::DeviceGuard;

// Makes the device of a tensor current; an op holds one for as long as it allocates and launches.
inline DeviceGuard on_device_of(const Tensor& tensor) { return DeviceGuard(tensor.get_device_index()); }

inline bool is_beside(const Tensor& tensor, const Tensor& like) {
  return tensor.is_cuda() && tensor.get_device_index() == like.get_device_index();
}

// Whether the host may read a tensor's elements; otherwise kernels do.
inline bool is_readable(const Tensor& tensor) { return tensor.is_cpu(); }

// Tells the compiler that a number is the same in all threads of a warp, so that it may lie in a uniform register. All
// of them must be here.
__device__ __forceinline__ uint32_t same_in_warp(uint32_t value) { return __shfl_sync(0xFFFFFFFFu, value, 0); }

// More blocks than this, in either direction, walk in strides.
constexpr int64_t kMostBlocks = 65535;
// A block takes several chunks where at least so many blocks are left: sixteen for every one that a large GPU runs at a
// time, so that the last ones to finish leave little of it idle.
constexpr int64_t kEnoughBlocks = 8192;

struct Grid {
  int64_t x, y = 1;
};

// Runs a kernel on torch's current stream of the device that `like` is on.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), Grid grid, int threads, const Tensor& like, const Arguments&... arguments) {
  void* stream = nullptr;
  const auto found = aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream);
  VDU_CHECK(found == AOTI_TORCH_SUCCESS, "torch's current CUDA stream cannot be had");
  const dim3 blocks(static_cast<unsigned int>(grid.x), static_cast<unsigned int>(grid.y));
  kernel<<<blocks, threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();  // torch's macro for this is not in torch 2.11
  VDU_CHECK(error == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace vdu
