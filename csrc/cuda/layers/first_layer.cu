// first_layer, first_layer_bwd: conv1_1 with the normalisation before it and the bias and ReLU after it, from the image
// to a map of 64 channels, and its gradient.
//
// In a library's convolution three channels do not fill a tensor core, and the separate passes before and after it cost
// as much as the map does. These kernels move each byte of the map once (134 MB at 1024 x 1024: 31 us on an H200), 16
// bytes per thread, without a copy through shared memory: the order of an mma's columns, and of its summands, is free.
// It is chosen so that the values of a pixel that one thread holds are adjacent in memory.
#include "cuda/common/device.cuh"
#include "cuda/layers/layers.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kChannels = 64;  // channels of the layer
constexpr int kWeights = 32;   // per channel: 9 taps of 3 colours, 5 zeros
constexpr int kTaps = 9, kColours = 3;
constexpr int kWeightBytes = kChannels * kWeights * 2;
constexpr int kColumns = 32;  // pixels per row of a tile

// The channel of row r of the 8 x 8 tile of weights that is multiplied with pairs i. Lane t of a quad holds channels 8t
// to 8t + 7 of each half of the 64 channels, as eight pairs i.
GRAMOPHONE_DEVICE int channel(int i, int r) {
  return kChannels / 2 * (i / 4) + 8 * (r / 2) + 2 * (i % 4) + r % 2;
}

struct Tiles {
  int64_t count;
  int across, down, height, width;
};

struct Corner {
  int64_t job;
  int y, x;
};

template <int kRows>
GRAMOPHONE_DEVICE Corner corner(const Tiles& tiles, int64_t tile) {
  const int64_t row = tile / tiles.across;
  return {row / tiles.down, static_cast<int>(row % tiles.down) * kRows,
          static_cast<int>(tile % tiles.across) * kColumns};
}

Tiles tiles_of(int64_t batch, int height, int width, int rows) {
  const auto across = static_cast<int>(ceil_div(width, kColumns)), down = static_cast<int>(ceil_div(height, rows));
  return {batch * down * across, across, down, height, width};
}

// Forward
//
// A row of the product is a pixel. Its 32 summands are 16 pairs, each in one word of shared memory. The words of the
// first plane hold a pixel's first two colours, those of the second plane its third colour and the third colour of the
// pixel to the right. Pairs 0 to 8 are the nine taps in the first plane. Pairs 9 to 14 are the taps in the second
// plane, two per row: taps 0 and 1, then 1 again, with weight 0, and 2. All of them are in the pixel's own 3 x 3, so a
// NaN elsewhere has no effect.

constexpr int kRows = kWarps;  // per tile, one per warp
constexpr int kHaloRows = kRows + 2, kHaloColumns = kColumns + 2;
// In words. A warp reads 8 pixels of 4 pairs at once: rows are 10 banks apart, planes 0, so there are no bank
// conflicts.
constexpr int kPitch = 42, kPlane = 448;
static_assert(kPitch >= kHaloColumns && kPitch % 32 == 10 && kPlane >= kPitch * kHaloRows && kPlane % 32 == 0);

struct Pair {
  int first, second;  // indices of its weights
  int word;           // offset from the word of the upper left pixel of the 3 x 3
};

GRAMOPHONE_DEVICE Pair pair_of(int q) {
  constexpr int kNone = kWeights - 1;
  if (q < kTaps) return {3 * q, 3 * q + 1, q / 3 * kPitch + q % 3};
  const int row = (q - kTaps) / 2, right = (q - kTaps) % 2;
  if (row == 3) return {kNone, kNone, kPlane};
  return {right ? kNone : 9 * row + 2, 9 * row + (right ? 8 : 5), kPlane + row * kPitch + right};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    first_layer_kernel(const float* __restrict__ image, const T* __restrict__ weight, const float* __restrict__ bias,
                       Colours colours, Tiles tiles, T* __restrict__ out) {
  T* const ordered = reinterpret_cast<T*>(shared_memory());  // weights [maps, pairs]
  uint32_t* const planes = reinterpret_cast<uint32_t*>(shared_memory() + kWeightBytes);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;

  {
    const T* of_map = weight + threadIdx.x / 4 * kWeights;
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Pair p = pair_of(4 * t + i);
      pairs[i] = pair(of_map[p.first], of_map[p.second]);
    }
    reinterpret_cast<uint4*>(ordered)[threadIdx.x] = make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
  }
  __syncthreads();
  uint32_t b[8][4];  // fragments [8 channels, 8 summands], for all channels and summands
#pragma unroll
  for (int j = 0; j < 8; ++j) ldmatrix(b[j], ordered + channel(j, lane % 8) * kWeights + 8 * (lane / 8));
  float add[8][2];
#pragma unroll
  for (int j = 0; j < 8; ++j) add[j][0] = bias[channel(j, 2 * t)], add[j][1] = bias[channel(j, 2 * t + 1)];
  int word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) word[i] = pair_of(4 * i + t).word;

  for (int64_t tile = blockIdx.x; tile < tiles.count; tile += gridDim.x) {
    const Corner at = corner<kRows>(tiles, tile);
    __syncthreads();  // the previous tile has been read
    for (int i = threadIdx.x; i < kHaloRows * kHaloColumns; i += kThreads) {
      const int row = i / kHaloColumns, column = i % kHaloColumns, y = at.y + row - 1, x = at.x + column - 1;
      T value[kColours] = {};
      if (y >= 0 && y < tiles.height && x >= 0 && x < tiles.width) {
#pragma unroll
        for (int c = 0; c < kColours; ++c) {
          const int64_t from = ((at.job * kColours + colours.order[c]) * tiles.height + y) * tiles.width + x;
          value[c] = from_float<T>(image[from] * colours.scale[c] + colours.shift[c]);
        }
      }
      uint32_t* const to = planes + row * kPitch + column;
      to[0] = pair(value[0], value[1]);
      T* const third = reinterpret_cast<T*>(to + kPlane);
      third[0] = value[2];
      if (column > 0) third[-1] = value[2];
    }
    __syncthreads();

    const int y = at.y + warp;
#pragma unroll
    for (int half = 0; half < kColumns / 16; ++half) {
      const uint32_t* const from = planes + warp * kPitch + 16 * half + g;
      float sum[8][4];
#pragma unroll
      for (int j = 0; j < 8; ++j) sum[j][0] = sum[j][2] = add[j][0], sum[j][1] = sum[j][3] = add[j][1];
#pragma unroll
      for (int s = 0; s < 2; ++s) {
        const uint32_t a[4] = {from[word[2 * s]], from[word[2 * s] + 8], from[word[2 * s + 1]],
                               from[word[2 * s + 1] + 8]};
#pragma unroll
        for (int j = 0; j < 8; ++j) mma<T>(sum[j], a, b[j][2 * s], b[j][2 * s + 1]);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        const int x = at.x + 16 * half + 8 * row + g;
        if (y >= tiles.height || x >= tiles.width) continue;
        T* const to = out + ((at.job * tiles.height + y) * tiles.width + x) * kChannels + 8 * t;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
          uint32_t values[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const float first = sum[4 * k + i][2 * row], second = sum[4 * k + i][2 * row + 1];
            values[i] = pair(from_float<T>(first <= 0 ? 0 : first), from_float<T>(second <= 0 ? 0 : second));
          }
          *reinterpret_cast<uint4*>(to + kChannels / 2 * k) = make_uint4(values[0], values[1], values[2], values[3]);
        }
      }
    }
  }
}

// Backward
//
// First every pixel of the gradient is multiplied with all 27 columns of the weights, in mma chains of 64 summands.
// Then every pixel of the image gradient adds nine of these products, one from each pixel of its 3 x 3. If the taps
// were summands instead, as in a transposed convolution, only 3 of the 8 columns of the mma would be used, and each
// pixel would be read nine times from shared memory.

constexpr int kBackRows = 16;
constexpr int kBackHalo = (kBackRows + 2) * kHaloColumns;  // pixels
constexpr int kBackBytes = kWeightBytes + kTaps * kColours * kBackHalo * static_cast<int>(sizeof(float));
static_assert(kBackHalo % 16 == 4, "columns 2t of lanes t lie 8 banks apart, so that a warp writes without conflict");

template <typename T>
__global__ void __launch_bounds__(kThreads, 2)
    first_layer_bwd_kernel(const T* __restrict__ grad, const T* __restrict__ weight, Colours colours, Tiles tiles,
                           float* __restrict__ image_grad) {
  T* const weights = reinterpret_cast<T*>(shared_memory());
  float* const products = reinterpret_cast<float*>(shared_memory() + kWeightBytes);  // [27, pixels]
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, g = lane / 4, t = lane % 4;
  const Corner at = corner<kBackRows>(tiles, blockIdx.x);

  // Reads 16 pixels starting at `first`: rows g and g + 8 of an mma, both halves of their channels. They are read one
  // step ahead, so that a warp has 2 KB in flight while it multiplies.
  const auto read = [&](int first, uint4(&pixels)[2][2]) {
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int i = first + 8 * row + g, y = at.y + i / kHaloColumns - 1, x = at.x + i % kHaloColumns - 1;
      pixels[row][0] = pixels[row][1] = make_uint4(0, 0, 0, 0);
      if (i < kBackHalo && y >= 0 && y < tiles.height && x >= 0 && x < tiles.width) {
        const T* const from = grad + ((at.job * tiles.height + y) * tiles.width + x) * kChannels + 8 * t;
#pragma unroll
        for (int k = 0; k < 2; ++k) pixels[row][k] = __ldg(reinterpret_cast<const uint4*>(from + kChannels / 2 * k));
      }
    }
  };
  uint4 next[2][2];
  read(16 * warp, next);

  static_assert(kWeightBytes == 16 * kThreads);
  reinterpret_cast<uint4*>(weights)[threadIdx.x] = reinterpret_cast<const uint4*>(weight)[threadIdx.x];
  __syncthreads();
  uint32_t b[4][2][4];  // fragments of 8 columns, for the channels of each half
#pragma unroll
  for (int j = 0; j < 4; ++j)
#pragma unroll
    for (int k = 0; k < 2; ++k)
      ldmatrix_transposed(b[j][k], weights + channel(4 * k + lane / 8, lane % 8) * kWeights + 8 * j);

  for (int first = 16 * warp; first < kBackHalo; first += 16 * kWarps) {
    const uint4 pixels[2][2] = {{next[0][0], next[0][1]}, {next[1][0], next[1][1]}};
    read(first + 16 * kWarps, next);
    float sum[4][4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint4 upper = pixels[0][k], lower = pixels[1][k];
      const uint32_t a[2][4] = {{upper.x, lower.x, upper.y, lower.y}, {upper.z, lower.z, upper.w, lower.w}};
#pragma unroll
      for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int j = 0; j < 4; ++j) mma<T>(sum[j], a[s], b[j][k][2 * s], b[j][k][2 * s + 1]);
    }
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int column = 8 * j + 2 * t + e % 2, i = first + 8 * (e / 2) + g;
        if (column < kTaps * kColours && i < kBackHalo) products[column * kBackHalo + i] = sum[j][e];
      }
  }
  __syncthreads();

  for (int i = threadIdx.x; i < kBackRows * kColumns; i += kThreads) {
    const int row = i / kColumns, column = i % kColumns, y = at.y + row, x = at.x + column;
    if (y >= tiles.height || x >= tiles.width) continue;
    const float* const from = products + row * kHaloColumns + column;
#pragma unroll
    for (int c = 0; c < kColours; ++c) {
      float sum = 0;
      // Tap (dy, dx) of an output reads the image at an offset of (dy - 1, dx - 1).
#pragma unroll
      for (int tap = 0; tap < kTaps; ++tap)
        sum += from[(3 * tap + c) * kBackHalo + (2 - tap / 3) * kHaloColumns + 2 - tap % 3];
      const int64_t to = ((at.job * kColours + colours.order[c]) * tiles.height + y) * tiles.width + x;
      image_grad[to] = colours.scale[c] * sum;
    }
  }
}

}  // namespace

template <typename T>
void launch_first_layer(const float* image, const T* weight, const float* bias, const Colours& colours, int64_t batch,
                        int height, int width, int multiprocessors, T* out, cudaStream_t stream) {
  const Tiles tiles = tiles_of(batch, height, width, kRows);
  const int64_t at_once = 2 * multiprocessors;  // a block loads the weights once for all its tiles
  launch("first_layer", first_layer_kernel<T>,
         dim3(static_cast<unsigned>(tiles.count < at_once ? tiles.count : at_once)), kThreads,
         kWeightBytes + 2 * kPlane * sizeof(uint32_t), stream, image, weight, bias, colours, tiles, out);
}

template <typename T>
void launch_first_layer_bwd(const T* grad, const T* weight, const Colours& colours, int64_t batch, int height,
                            int width, float* image_grad, cudaStream_t stream) {
  const Tiles tiles = tiles_of(batch, height, width, kBackRows);
  launch("first_layer_bwd", first_layer_bwd_kernel<T>, dim3(static_cast<unsigned>(tiles.count)), kThreads, kBackBytes,
         stream, grad, weight, colours, tiles, image_grad);
}

#define GRAMOPHONE_FIRST_LAYER(T)                                                                                    \
  template void launch_first_layer(const float*, const T*, const float*, const Colours&, int64_t, int, int, int, T*, \
                                   cudaStream_t);                                                                    \
  template void launch_first_layer_bwd(const T*, const T*, const Colours&, int64_t, int, int, float*, cudaStream_t);
GRAMOPHONE_FIRST_LAYER(Fp16)
GRAMOPHONE_FIRST_LAYER(Bf16)

}  // namespace gramophone
