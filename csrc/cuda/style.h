// The style kernels' launchers, on plain pointers, and how their work is cut: pure arithmetic on the host. The bindings
// include it too, and they are not compiled by nvcc.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef GRAMOPHONE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace gramophone {

struct Fp16;
struct Bf16;

// Gram matrices and style terms: style_fwd.cu
// -----------------------------------------------------------------------------------------------------------

constexpr int kLayersPerLaunch = 8;    // they travel in the kernel's parameters, so nothing is copied beforehand
constexpr int kTile = 64;              // channels; a Gram matrix is cut into tiles of kTile x kTile, row <= column kept
constexpr int kBands = 16;             // of a tile, 4 rows each: what one block of `finish` adds up
constexpr int kMostPixels = 16384;     // of a slice: tensor cores truncate their float32 sums, so chains are kept short
constexpr int64_t kLeastWork = 32768;  // of a slice, in 16-bit values that it reads: 4 of the 6 stages of shared memory

struct StyleLayer {
  const void* features = nullptr;  // [jobs, pixels, channels] in 16 bits, aligned to 16 bytes
  const float* target = nullptr;   // [jobs, channels, channels]; null: only the Gram matrix is wanted
  const float* weight = nullptr;   // [jobs]
  void* out = nullptr;             // [jobs, channels, channels]: the difference in Bf16; the Gram matrix in float
  float* loss = nullptr;           // [jobs]
  int64_t pixels = 0;
  int channels = 0;  // 64, 128, 256 or 512
  float scale = 1;
  // What `schedule` finds. A slice is a range of pixels whose products one block sums.
  int slice_pixels = 0, slices = 0;
  int first_item = 0;      // blocks of `multiply`: (job, slice, unit)
  int first_band = 0;      // blocks of `finish`: (job, tile, band)
  int64_t first_tile = 0;  // partial sums: [jobs, slices, tiles] tiles of float
};

struct StyleLaunch {
  StyleLayer layers[kLayersPerLaunch];
  int count = 0, jobs = 0;
  // What `schedule` finds: the sums over the layers.
  int items = 0, bands = 0;
  int64_t tiles = 0;
  // Workspace, uninitialised
  float* partials = nullptr;    // [tiles, kTile, kTile]
  float* band_sums = nullptr;   // [bands]: squares of a band
  unsigned* arrived = nullptr;  // [count, jobs]: bands that are done
};

__host__ __device__ constexpr int tiles_of(int channels) {
  return channels / kTile * (channels / kTile + 1) / 2;
}
// Blocks of `multiply` that share the tiles of a slice: at 512 channels two triangles and two rectangles.
__host__ __device__ constexpr int units_of(int channels) {
  return channels == 512 ? 4 : 1;
}
constexpr int stage_pixels(int channels) {
  return std::max(32, 8192 / channels);
}
constexpr int64_t parts_of(int64_t whole, int64_t part) {
  return (whole + part - 1) / part;
}

// Cuts the layers into slices so that one job fills the device once, or as often as kMostPixels demands, with items of
// equal length. Jobs multiply the items and change no slice, so a job's sums do not depend on its batch.
//
// The cost of an item is what it reads per pixel, min(channels, 256) values: up to 256 channels the kernel is bound by
// memory, at 256 memory and tensor cores of an H200 are about even, and a unit of 512 channels multiplies as much.
inline void schedule(StyleLaunch& launch, int multiprocessors) {
  const auto width = [](const StyleLayer& layer) { return std::min(layer.channels, 256); };
  int64_t total = 0, least = 0;
  for (int l = 0; l < launch.count; ++l) {
    const StyleLayer& layer = launch.layers[l];
    total += layer.pixels * width(layer) * units_of(layer.channels);
    least += parts_of(layer.pixels, kMostPixels) * units_of(layer.channels);
  }
  const int64_t most = parts_of(least, multiprocessors) * multiprocessors;
  for (int64_t work = std::max(kLeastWork, total / most);; work += work / 32) {
    int64_t items = 0;
    for (int l = 0; l < launch.count; ++l) {
      StyleLayer& layer = launch.layers[l];
      const int step = stage_pixels(layer.channels);
      const auto rounded = [&](int64_t pixels) {
        return static_cast<int>(std::min<int64_t>(kMostPixels, parts_of(pixels, step) * step));
      };
      layer.slice_pixels = rounded(work / width(layer));
      layer.slice_pixels = rounded(parts_of(layer.pixels, parts_of(layer.pixels, layer.slice_pixels)));  // even ones
      layer.slices = static_cast<int>(parts_of(layer.pixels, layer.slice_pixels));
      items += int64_t{layer.slices} * units_of(layer.channels);
    }
    if (items <= most) break;
  }
  launch.items = launch.bands = 0, launch.tiles = 0;
  for (int l = 0; l < launch.count; ++l) {
    StyleLayer& layer = launch.layers[l];
    layer.first_item = launch.items, layer.first_band = launch.bands, layer.first_tile = launch.tiles;
    launch.items += launch.jobs * layer.slices * units_of(layer.channels);
    launch.bands += launch.jobs * tiles_of(layer.channels) * kBands;
    launch.tiles += int64_t{launch.jobs} * layer.slices * tiles_of(layer.channels);
  }
}

// Two kernels: the products of all layers and jobs, then their sums and what follows from them. T: Fp16 or Bf16.
template <typename T>
void style_forward(const StyleLaunch& launch, cudaStream_t stream);

// The way back: style_bwd.cu
// -----------------------------------------------------------------------------------------------------------------

// grad [jobs, pixels, channels] <- (grad + features diff), 0 where features <= 0 if relu_mask. Aligned to 16 bytes;
// channels 64, 128, 256 or 512; diff [jobs, channels, channels] symmetric. T: Fp16 or Bf16.
template <typename T>
void style_backward(Bf16* grad, const T* features, const Bf16* diff, int64_t jobs, int64_t pixels, int channels,
                    bool relu_mask, cudaStream_t stream);

// grad <- 0 where features <= 0, n values of both, aligned to 16 bytes. T: Fp16 or Bf16.
template <typename T>
void mask_backward(Bf16* grad, const T* features, int64_t n, cudaStream_t stream);

}  // namespace gramophone
