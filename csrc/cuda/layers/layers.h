// Launchers of the kernels in pooling.cu and first_layer.cu. They take plain pointers, so that the kernels do not
// depend on torch and the bindings not on CUDA's language. All maps are dense.
#pragma once

#include <cstdint>

#include "cuda/common/launch_types.h"

namespace gramophone {

// The shape of a feature map as planes of windows. channels_last: one plane per job. contiguous: one plane per channel
// of a job, and channels is 1.
struct Map {
  int64_t planes;
  int height, width, channels;
};

// pooling.cu. `map` is the shape before pooling. T: float, double, Fp16, Bf16; G: T, or Bf16 if T is Fp16.
template <typename T>
void launch_max_pool(const T* features, const Map& map, T* pooled, cudaStream_t stream);
template <typename G, typename T>
void launch_max_pool_bwd(const G* grad, const T* features, const T* pooled, const Map& map, bool relu_mask, G* out,
                         cudaStream_t stream);

// pooling.cu. Maps are channels_last with a multiple of 8 channels, and all pointers are aligned to 16 bytes. T: Fp16,
// Bf16.
template <typename T>
void launch_bias_relu(T* features, const float* bias, int64_t pixels, int channels, cudaStream_t stream);
template <typename T>
void launch_bias_relu_pool(const T* features, const float* bias, const Map& map, T* pooled, uint8_t* codes,
                           cudaStream_t stream);
void launch_pool_codes_bwd(const uint16_t* grad, const uint8_t* codes, const Map& map, uint16_t* out,
                           cudaStream_t stream);

// first_layer.cu. The network's channel c is the image's channel order[c], times scale[c], plus shift[c]. T: Fp16,
// Bf16.
struct Colours {
  float scale[3], shift[3];
  int order[3];
};
template <typename T>
void launch_first_layer(const float* image, const T* weight, const float* bias, const Colours& colours, int64_t batch,
                        int height, int width, int multiprocessors, T* out, cudaStream_t stream);
template <typename T>
void launch_first_layer_bwd(const T* grad, const T* weight, const Colours& colours, int64_t batch, int height,
                            int width, float* image_grad, cudaStream_t stream);

}  // namespace gramophone
