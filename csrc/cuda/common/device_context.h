// The device of a kernel launch: guard, stream and properties. Only this part of the bindings differs in the emulator
// (tests/emulator), which registers the same bindings for CPU tensors under another library name.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#ifdef GRAMOPHONE_EMULATED

#include "emulator.h"

#define GRAMOPHONE_CUDA_KERNELS(m) TORCH_LIBRARY_IMPL(gramophone_emulated, CPU, m)

namespace gramophone {

struct DeviceContext {
  explicit DeviceContext(const at::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
  int multiprocessors() const { return 6; }
  bool has_tensor_cores() const { return true; }
};

}  // namespace gramophone

#else

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#define GRAMOPHONE_CUDA_KERNELS(m) TORCH_LIBRARY_IMPL(gramophone, CUDA, m)

namespace gramophone {

// Makes the tensor's device the current device for the lifetime of this object.
class DeviceContext {
 public:
  explicit DeviceContext(const at::Tensor& tensor) : guard_(tensor.device()), device_(tensor.get_device()) {}

  cudaStream_t stream() const { return c10::cuda::getCurrentCUDAStream(device_).stream(); }
  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // sm_80 and later have bfloat16 tensor cores and asynchronous copies; on older devices the ops use torch's library.
  bool has_tensor_cores() const { return attribute(cudaDevAttrComputeCapabilityMajor) >= 8; }

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device_));
    return value;
  }

  c10::cuda::CUDAGuard guard_;
  int device_;
};

}  // namespace gramophone

#endif
