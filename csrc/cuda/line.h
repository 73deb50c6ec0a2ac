// Launchers of the kernels of the network's line and of the content and TV terms: plain pointers, so that the kernels
// see nothing of torch and the bindings nothing of CUDA's language. All maps are dense.
#pragma once

#include <cstdint>

#ifdef GRAMOPHONE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace gramophone {

struct Fp16;
struct Bf16;

// Values of a map as a window meets them. channels_last: a plane is a job; contiguous: a channel of a job, channels 1.
struct Map {
  int64_t planes;
  int height, width, channels;
};

// pool.cu. The map is always the larger one. T: float, double, Fp16, Bf16; G: T, or Bf16 where T is Fp16.
template <typename T>
void launch_max_pool(const T* features, const Map& map, T* pooled, cudaStream_t stream);
template <typename G, typename T>
void launch_max_pool_bwd(const G* grad, const T* features, const T* pooled, const Map& map, bool relu_mask, G* out,
                         cudaStream_t stream);

// pool.cu. Channels last and a multiple of 8, all pointers aligned to 16 bytes. T: Fp16, Bf16.
template <typename T>
void launch_bias_relu(T* features, const float* bias, int64_t pixels, int channels, cudaStream_t stream);
template <typename T>
void launch_bias_relu_pool(const T* features, const float* bias, const Map& map, T* pooled, uint8_t* codes,
                           cudaStream_t stream);
void launch_pool_codes_bwd(const uint16_t* grad, const uint8_t* codes, const Map& map, uint16_t* out,
                           cudaStream_t stream);

// first_layer.cu. The network's channel c is colour order[c] of the picture, times scale[c], plus shift[c].
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

// terms.cu. `partials` holds content_blocks or tv_blocks sums per job. S: double where T is, else float.
int64_t content_blocks(int64_t elements);
template <typename G, typename T, typename S>
void launch_content(G* grad, const T* features, const T* target, const S* weight, int64_t batch, int64_t elements,
                    bool relu_mask, S* partials, S* loss, cudaStream_t stream);
int64_t tv_blocks(int height, int width);
void launch_tv(float* grad, const float* image, const float* weight, int64_t batch, int height, int width,
               float* partials, float* loss, cudaStream_t stream);

}  // namespace gramophone
