// Launchers of the style kernels, and `schedule`, which divides their work into blocks: plain host arithmetic. The
// launchers take plain pointers, so that the kernels do not depend on torch and the bindings not on CUDA's language.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/common/launch_types.h"

namespace gramophone {

// Gram matrices and style terms: forward.cu. The partials kernel (style_gram_partials_kernel) sums products of slices
// of pixels, the reduce kernel (style_gram_reduce_kernel) adds the slices.

constexpr int kLayersPerLaunch = 8;  // layers are kernel parameters, so nothing is copied to the device before a launch
// A Gram matrix is divided into tiles of kTileChannels x kTileChannels; only those with row <= column are computed.
constexpr int kTileChannels = 64;
constexpr int kBands = 16;         // per tile, 4 rows each; a block of the reduce kernel computes one band
constexpr int kMaxPixels = 16384;  // per slice: tensor cores truncate their float32 sums, so the sums are kept short
// Minimum work of a slice, in 16-bit values that it reads: 4 of the 6 stages of shared memory.
constexpr int64_t kMinWork = 32768;

struct StyleLayer {
  const void* features = nullptr;  // [jobs, pixels, channels] in 16 bits, aligned to 16 bytes
  const float* target = nullptr;   // [jobs, channels, channels]; null if only the Gram matrix is wanted
  const float* weight = nullptr;   // [jobs]
  void* out = nullptr;             // [jobs, channels, channels]: the difference in Bf16; the Gram matrix in float
  float* loss = nullptr;           // [jobs]
  int64_t pixels = 0;
  int channels = 0;  // 64, 128, 256 or 512
  float scale = 1;
  // Set by `schedule`. A slice is a range of pixels whose products one block sums.
  int slice_pixels = 0, slices = 0;
  int first_item = 0;      // first item of the partials kernel: (job, slice, unit)
  int first_band = 0;      // first block of the reduce kernel: (job, tile, band)
  int64_t first_tile = 0;  // first tile of the partial sums: [jobs, slices, tiles] tiles of float
};

struct StyleLaunch {
  StyleLayer layers[kLayersPerLaunch];
  int count = 0, jobs = 0;
  // Set by `schedule`: the sums over the layers.
  int items = 0, bands = 0;
  int64_t tiles = 0;
  int blocks = 0;  // of the partials kernel; a block computes every blocks-th item
  // Workspace, uninitialised
  float* partials = nullptr;    // [tiles, kTileChannels, kTileChannels]
  float* band_sums = nullptr;   // [bands]: sum of squares of a band
  unsigned* arrived = nullptr;  // [count, jobs]: number of finished bands
};

__host__ __device__ constexpr int tiles_of(int channels) {
  return channels / kTileChannels * (channels / kTileChannels + 1) / 2;
}
// Blocks of the partials kernel that share the tiles of a slice: two triangles and two rectangles at 512 channels.
__host__ __device__ constexpr int units_of(int channels) {
  return channels == 512 ? 4 : 1;
}
constexpr int stage_pixels(int channels) {
  return std::max(32, 8192 / channels);
}

// Divides the layers into slices so that one job fills the device once, or as often as kMaxPixels requires, with items
// of equal cost. More jobs mean more items but the same slices, so a job's sums do not depend on its batch.
//
// The cost of an item is the number of values that it reads per pixel, min(channels, 256). Up to 256 channels the
// kernel is bound by memory, at 256 the memory and the tensor cores of an H200 take about the same time, and a unit of
// 512 channels multiplies as much.
//
// If `persistent`, as many blocks as run at once share the items of the partials kernel; else each item has a block.
inline void schedule(StyleLaunch& launch, int multiprocessors, bool persistent) {
  const auto width = [](const StyleLayer& layer) { return std::min(layer.channels, 256); };
  int64_t total = 0, min_items = 0;
  for (int l = 0; l < launch.count; ++l) {
    const StyleLayer& layer = launch.layers[l];
    total += layer.pixels * width(layer) * units_of(layer.channels);
    min_items += ceil_div(layer.pixels, kMaxPixels) * units_of(layer.channels);
  }
  const int64_t max_items = ceil_div(min_items, multiprocessors) * multiprocessors;
  for (int64_t work = std::max(kMinWork, total / max_items);; work += work / 32) {
    int64_t items = 0;
    for (int l = 0; l < launch.count; ++l) {
      StyleLayer& layer = launch.layers[l];
      const int step = stage_pixels(layer.channels);
      const auto rounded = [&](int64_t pixels) {
        return static_cast<int>(std::min<int64_t>(kMaxPixels, ceil_div(pixels, step) * step));
      };
      layer.slice_pixels = rounded(work / width(layer));
      layer.slice_pixels =
          rounded(ceil_div(layer.pixels, ceil_div(layer.pixels, layer.slice_pixels)));  // of equal length
      layer.slices = static_cast<int>(ceil_div(layer.pixels, layer.slice_pixels));
      items += int64_t{layer.slices} * units_of(layer.channels);
    }
    if (items <= max_items) break;
  }
  launch.items = launch.bands = 0, launch.tiles = 0;
  for (int l = 0; l < launch.count; ++l) {
    StyleLayer& layer = launch.layers[l];
    layer.first_item = launch.items, layer.first_band = launch.bands, layer.first_tile = launch.tiles;
    launch.items += launch.jobs * layer.slices * units_of(layer.channels);
    launch.bands += launch.jobs * tiles_of(layer.channels) * kBands;
    launch.tiles += int64_t{launch.jobs} * layer.slices * tiles_of(layer.channels);
  }
  launch.blocks = persistent ? std::min(launch.items, multiprocessors) : launch.items;
}

// Launches two kernels: the products of all layers and jobs, then their sums and the style terms. T: Fp16 or Bf16.
template <typename T>
void launch_style_fwd(const StyleLaunch& launch, cudaStream_t stream);

// The gradient: backward.cu

// grad [jobs, pixels, channels] <- (grad + features diff), 0 where features <= 0 if relu_mask. All pointers are aligned
// to 16 bytes; channels is 64, 128, 256 or 512; diff [jobs, channels, channels] is symmetric. T: Fp16 or Bf16.
template <typename T>
void launch_style_bwd(Bf16* grad, const T* features, const Bf16* diff, int64_t jobs, int64_t pixels, int channels,
                      bool relu_mask, cudaStream_t stream);

// grad <- 0 where features <= 0, for n values, aligned to 16 bytes. T: Fp16 or Bf16.
template <typename T>
void launch_style_bwd_mask(Bf16* grad, const T* features, int64_t n, cudaStream_t stream);

}  // namespace gramophone
