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

// More blocks than this walk the chunks in strides.
constexpr int64_t kMostBlocks = 1 << 16;

// Runs a kernel on torch's current stream of the device that `like` is on.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t grid, int threads, const Tensor& like,
            const Arguments&... arguments) {
  void* stream = nullptr;
  const auto found = aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream);
  VDU_CHECK(found == AOTI_TORCH_SUCCESS, "torch's current CUDA stream cannot be had");
  kernel<<<static_cast<unsigned int>(grid), threads, 0, static_cast<cudaStream_t>(stream)>>>(arguments...);
  const cudaError_t error = cudaGetLastError();  // torch's macro for this is not in torch 2.11
  VDU_CHECK(error == cudaSuccess, "a CUDA kernel could not be launched: ", cudaGetErrorString(error));
}

}  // namespace vdu
