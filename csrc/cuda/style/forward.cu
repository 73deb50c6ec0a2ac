// gram, style_loss, style_fwd: G = scale * F^T F of F [pixels, channels], the loss w * |G - A|^2 and its difference.
//
// F is long and thin (64 to 512 channels, up to millions of pixels), so the work is divided over pixels. In the
// partials kernel each block sums the products of one slice of pixels. It runs all layers and jobs in one launch, so
// that layers that are bound by memory (few channels) overlap with layers that are bound by tensor cores (many
// channels). The reduce kernel adds the slices in order and computes the results. A single kernel whose last block adds
// the slices would save one launch, about 2 us, but cost far more: one block takes 20 to 40 us for 15 slices of 256 x
// 256, hundreds of blocks take 3.
#include "cuda/common/device.cuh"
#include "cuda/style/style.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStagesBytes = 96 * 1024;  // sm_86 has 99 KB, and 80 KB in flight saturate the memory
constexpr int kTileFloats = kTileChannels * kTileChannels;

// The number of tile (row, column), row <= column, in a matrix of side x side tiles.
__device__ constexpr int tile_at(int row, int column, int side) {
  return row * side - row * (row - 1) / 2 + column - row;
}

// Partial sums
//
// A warp computes one 64x64 tile off the diagonal (8 loads and 32 products per 16 pixels), or two tiles on the
// diagonal, of which only the 16x16 blocks on and above the diagonal are multiplied (8 loads, 40 products; one tile at
// 64 channels).

// The A fragments of 64 channels x 16 pixels. `at`: this lane's pixel and the first channel; `swizzle`: of that pixel.
GRAMOPHONE_DEVICE void load_channels(uint32_t (&a)[4][4], const unsigned char* at, unsigned swizzle) {
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) ldmatrix_transposed(a[i], at + (swizzle ^ (32 * i)));
}

template <typename T>
GRAMOPHONE_DEVICE void add_tile(float (&sum)[40][4], const unsigned char* row, const unsigned char* column,
                                unsigned swizzle) {
  uint32_t a[4][4], b[4][4];
  load_channels(a, row, swizzle);
  load_channels(b, column, swizzle);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < 8; ++n) mma<T>(sum[8 * i + n], a[i], b[n / 2][n % 2], b[n / 2][2 + n % 2]);
}

template <typename T, int kFirst>
GRAMOPHONE_DEVICE void add_diagonal(float (&sum)[40][4], const unsigned char* at, unsigned swizzle) {
  uint32_t a[4][4];
  load_channels(a, at, swizzle);
  int s = kFirst;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 2 * i; n < 8; ++n) mma<T>(sum[s++], a[i], a[n / 2][n % 2], a[n / 2][2 + n % 2]);
}

GRAMOPHONE_DEVICE void store_fragment(float* tile, const float (&sum)[4], int i, int n) {
  const int lane = threadIdx.x % kWarp;
  float* to = tile + (16 * i + lane / 4) * kTileChannels + 8 * n + 2 * (lane % 4);
  *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
  *reinterpret_cast<float2*>(to + 8 * kTileChannels) = make_float2(sum[2], sum[3]);
}

GRAMOPHONE_DEVICE void store_tile(float* tile, const float (&sum)[40][4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < 8; ++n) store_fragment(tile, sum[8 * i + n], i, n);
}

template <int kFirst>
GRAMOPHONE_DEVICE void store_diagonal(float* tile, const float (&sum)[40][4]) {
  int s = kFirst;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 2 * i; n < 8; ++n) store_fragment(tile, sum[s++], i, n);
}

// Computes one unit's tiles for the slice of `pixels` pixels at `features`. The unit reads kBlocks blocks of 64
// channels. With 1, 2 or 4 these are the blocks of a triangle of tiles, starting at channel `first`. With 6, for 512
// channels, they are the two blocks from `first` and the last four blocks, and the unit is the rectangle of their 2x4
// tiles. With few channels the pixels of a stage are distributed over kGroups groups of warps.
template <typename T, int kBlocks, int kGroups>
GRAMOPHONE_DEVICE void multiply_slice(const T* features, int pixels, int channels, int first, float* tiles) {
  constexpr bool kRectangle = kBlocks == 6;
  constexpr int kRowBytes = kBlocks * kTileChannels * 2;
  constexpr int kSteps = kGroups == 1 ? 2 : 1;  // of 16 pixels, per stage and warp
  constexpr int kPixels = 16 * kSteps * kGroups;
  constexpr int kStageBytes = kPixels * kRowBytes;  // 16 KB; the rectangle's 24
  constexpr int kStages = kStagesBytes / kStageBytes;
  constexpr int kFragments = kBlocks == 1 ? 20 : 40;
  constexpr int kRoles = kWarps / kGroups;
  constexpr int kOff = kRectangle ? 8 : kBlocks * (kBlocks - 1) / 2;  // roles off the diagonal
  static_assert(kPixels % 32 == 0 && kStageBytes * kStages == kStagesBytes && kStagesBytes <= 99 * 1024);
  static_assert(kGroups / 2 * kRoles * kFragments * 512 <= kStagesBytes);  // parked sums

  unsigned char* const shared = shared_memory();
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int group = warp / kRoles, role = warp % kRoles;
  const bool off = role < kOff;
  // This warp's tile (row, column), or its two tiles (row, row) and (column, column), in blocks of the unit.
  int row = 2 * (role - kOff), column = row + 1;
  if (kRectangle) {
    row = role / 4, column = 2 + role % 4;
  } else if (off) {  // 01 02 03 12 13 23
    row = role < 3 ? 0 : role < 5 ? 1 : 2;
    column = role < 3 ? role + 1 : role < 5 ? role - 1 : 3;
  }
  const auto channel_of = [&](int block) {
    return kRectangle && block >= 2 ? 128 + kTileChannels * block : first + kTileChannels * block;
  };

  // 8 threads copy the 128 bytes of one pixel and one block of channels. Chunks of 16 bytes are swizzled by the pixel.
  const int copy_pixel = thread / 8, copy_chunk = thread % 8;
  const T* const from = features + int64_t{copy_pixel} * channels + 8 * copy_chunk;
  unsigned char* const to = shared + copy_pixel * kRowBytes + (copy_chunk ^ (copy_pixel % 8)) * 16;
  const auto load = [&](int start, int stage) {
#pragma unroll
    for (int p = 0; p < kPixels; p += 32)
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        unsigned char* const chunk = to + stage * kStageBytes + p * kRowBytes + block * kTileChannels * 2;
        if (start + p + copy_pixel < pixels) {
          copy_async(chunk, from + int64_t{start + p} * channels + channel_of(block));
        } else {
          *reinterpret_cast<uint4*>(chunk) = make_uint4(0, 0, 0, 0);
        }
      }
  };

  int loaded = 0;  // pixels
  for (int stage = 0; stage < kStages - 1; ++stage, loaded += kPixels) {
    if (loaded < pixels) load(loaded, stage);
    copy_commit();
  }
  // This lane's row of the four 8x8 tiles of an A fragment: the second half of the lanes has the later 8 pixels (k),
  // every second quarter the later 8 channels.
  const unsigned char* const mine = shared + (16 * kSteps * group + lane % 8 + lane / 16 * 8) * kRowBytes;
  const unsigned swizzle = ((lane / 8 % 2) ^ (lane % 8)) * 16;
  float sum[40][4] = {};
  for (int done = 0, stage = 0; done < pixels; done += kPixels, loaded += kPixels) {
    copy_wait<kStages - 2>();
    // Now every thread's copies of this stage are complete, and no thread still reads the previous stage, which is
    // loaded next.
    __syncthreads();
    if (loaded < pixels) load(loaded, stage == 0 ? kStages - 1 : stage - 1);
    copy_commit();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned char* const at = mine + stage * kStageBytes + 16 * step * kRowBytes;
      if (off) {
        add_tile<T>(sum, at + row * kTileChannels * 2, at + column * kTileChannels * 2, swizzle);
      } else {
        add_diagonal<T, 0>(sum, at + row * kTileChannels * 2, swizzle);
        if (kBlocks > 1) add_diagonal<T, 20>(sum, at + column * kTileChannels * 2, swizzle);
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  // Add the groups' sums pairwise until one group is left. At most 80 KB of sums are in shared memory.
  auto* const parked = reinterpret_cast<float4*>(shared);
#pragma unroll
  for (int half = kGroups / 2; half > 0; half /= 2) {
    float4* const park = parked + (group % half * kRoles + role) * kFragments * kWarp + lane;
    __syncthreads();
    if (group >= half && group < 2 * half) {
#pragma unroll
      for (int s = 0; s < kFragments; ++s) park[s * kWarp] = make_float4(sum[s][0], sum[s][1], sum[s][2], sum[s][3]);
    }
    __syncthreads();
    if (group < half) {
#pragma unroll
      for (int s = 0; s < kFragments; ++s) {
        const float4 other = park[s * kWarp];
        sum[s][0] += other.x, sum[s][1] += other.y, sum[s][2] += other.z, sum[s][3] += other.w;
      }
    }
  }
  if (group > 0) return;
  const int side = channels / kTileChannels, r = channel_of(row) / kTileChannels,
            c = channel_of(column) / kTileChannels;
  if (off) {
    store_tile(tiles + tile_at(r, c, side) * kTileFloats, sum);
  } else {
    store_diagonal<0>(tiles + tile_at(r, r, side) * kTileFloats, sum);
    if (kBlocks > 1) store_diagonal<20>(tiles + tile_at(c, c, side) * kTileFloats, sum);
  }
}

template <typename T>
GRAMOPHONE_DEVICE void multiply_item(const StyleLaunch& launch, int number) {
  int l = 0;
  while (l + 1 < launch.count && number >= launch.layers[l + 1].first_item) ++l;
  const StyleLayer& layer = launch.layers[l];
  const int channels = layer.channels, units = units_of(channels), slices = layer.slices;
  const int item = number - layer.first_item;  // the unit varies fastest: the units of a slice read the same pixels
  const int unit = item % units, slice = item / units % slices, job = item / units / slices;
  if (unit == 0 && slice == 0 && threadIdx.x == 0) launch.arrived[l * launch.jobs + job] = 0;

  const int64_t start = int64_t{slice} * layer.slice_pixels, left = layer.pixels - start;
  const int pixels = left < layer.slice_pixels ? static_cast<int>(left) : layer.slice_pixels;
  const T* const features = static_cast<const T*>(layer.features) + (job * layer.pixels + start) * channels;
  float* const tiles =
      launch.partials + (layer.first_tile + (int64_t{job} * slices + slice) * tiles_of(channels)) * kTileFloats;
  if (channels == 64) {
    multiply_slice<T, 1, 8>(features, pixels, channels, 0, tiles);
  } else if (channels == 128) {
    multiply_slice<T, 2, 4>(features, pixels, channels, 0, tiles);
  } else if (unit < 2) {  // the triangle of 256 channels, or of either half of 512
    multiply_slice<T, 4, 1>(features, pixels, channels, 256 * unit, tiles);
  } else {  // 512 channels: a rectangle, a quarter of the channels by the second half
    multiply_slice<T, 6, 1>(features, pixels, channels, 128 * (unit - 2), tiles);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) style_gram_partials_kernel(const StyleLaunch launch) {
  for (int item = static_cast<int>(blockIdx.x); item < launch.items; item += static_cast<int>(gridDim.x)) {
    multiply_item<T>(launch, item);
    __syncthreads();  // no warp still reads the shared memory that the next item fills
  }
}

// Reduction

// A block computes four rows of a tile. First each quarter of the threads adds every fourth slice, with loads of 16
// bytes; then each thread has one value. The bound of four blocks per multiprocessor is needed because the compiler
// would otherwise use few enough registers for eight, and then each load would wait for the previous one.
__global__ void __launch_bounds__(kThreads, 4) style_gram_reduce_kernel(const StyleLaunch launch) {
  constexpr int kRows = kTileChannels / kBands, kValues = kRows * kTileChannels, kShares = 4;
  static_assert(kValues == kThreads && kShares * kValues == 4 * kThreads);
  auto* const sums = reinterpret_cast<float*>(shared_memory());  // [kShares, kValues]
  float* const scratch = sums + kShares * kValues;               // one per warp, and a flag
  const int block = static_cast<int>(blockIdx.x), thread = static_cast<int>(threadIdx.x);
  int l = 0;
  while (l + 1 < launch.count && block >= launch.layers[l + 1].first_band) ++l;
  const StyleLayer& layer = launch.layers[l];
  const int channels = layer.channels, tiles = tiles_of(channels), bands = tiles * kBands, slices = layer.slices;
  const int job = (block - layer.first_band) / bands, tile = (block - layer.first_band) % bands / kBands;
  const int first_row = block % kBands * kRows;  // first_band is a multiple of kBands
  int tile_row = 0;
  while (tile >= tile_at(tile_row + 1, tile_row + 1, channels / kTileChannels)) ++tile_row;
  const int tile_column = tile_row + tile - tile_at(tile_row, tile_row, channels / kTileChannels);

  float4 sum = make_float4(0, 0, 0, 0);
  {
    const int share = thread / (kValues / 4), value = 4 * (thread % (kValues / 4));
    // In tiles on the diagonal the 16x16 blocks below it were not computed, and their memory was not written.
    if (tile_row < tile_column || value % kTileChannels + 3 >= first_row + value / kTileChannels) {
      const auto* const from = reinterpret_cast<const float4*>(
          launch.partials + (layer.first_tile + int64_t{job} * slices * tiles + tile) * kTileFloats +
          first_row * kTileChannels + value);
      const int64_t stride = int64_t{tiles} * kTileFloats / 4;
      constexpr int kAtOnce = 8;  // loads in flight
      for (int slice = share; slice < slices; slice += kAtOnce * kShares) {
        float4 parts[kAtOnce];
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
          parts[n] =
              slice + n * kShares < slices ? __ldg(from + (slice + n * kShares) * stride) : make_float4(0, 0, 0, 0);
#pragma unroll
        for (const float4& part : parts) sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
      }
    }
    *reinterpret_cast<float4*>(sums + share * kValues + value) = sum;
  }
  __syncthreads();

  const int i = tile_row * kTileChannels + first_row + thread / kTileChannels,
            j = tile_column * kTileChannels + thread % kTileChannels;
  const int64_t matrix = int64_t{job} * channels * channels;
  float value = 0, square = 0;
  for (int share = 0; share < kShares; ++share) value += sums[share * kValues + thread];
  value *= layer.scale;
  const float weight = layer.target ? layer.weight[job] : 0;
  if (layer.target && i <= j) {
    const float difference = value - layer.target[matrix + int64_t{i} * channels + j];
    square = difference * difference * (i < j ? 2 : 1);
    value = 4 * layer.scale * weight * difference;
  }
  sums[thread] = value;  // only this thread has read this place
  const auto put = [&](int64_t at, float x) {
    if (layer.target) {
      static_cast<Bf16*>(layer.out)[matrix + at] = from_float<Bf16>(x);
    } else {
      static_cast<float*>(layer.out)[matrix + at] = x;
    }
  };
  if (i <= j) put(int64_t{i} * channels + j, value);
  __syncthreads();
  {  // the mirrored values, again with adjacent values in adjacent threads
    const int row = thread % kRows, column = thread / kRows;
    const int to_row = tile_column * kTileChannels + column, to_column = tile_row * kTileChannels + first_row + row;
    if (to_row > to_column) put(int64_t{to_row} * channels + to_column, sums[row * kTileChannels + column]);
  }
  if (!layer.target) return;

  // The last block of a job and layer to finish adds the sums of all of them, in the order of their numbers.
  square = block_sum(square, scratch);
  bool* const last = reinterpret_cast<bool*>(scratch + kWarps);
  if (thread == 0) {
    launch.band_sums[block] = square;
    __threadfence();
    *last = atomicAdd(&launch.arrived[l * launch.jobs + job], 1u) + 1 == static_cast<unsigned>(bands);
  }
  __syncthreads();
  if (!*last) return;
  __threadfence();
  const volatile float* const of_job = launch.band_sums + layer.first_band + job * bands;
  float loss = 0;
  for (int band = thread; band < bands; band += kThreads) loss += of_job[band];
  loss = block_sum(loss, scratch);
  if (thread == 0) layer.loss[job] = weight * loss;
}

}  // namespace

template <typename T>
void launch_style_fwd(const StyleLaunch& style, cudaStream_t stream) {
  launch("style_gram_partials", &style_gram_partials_kernel<T>, dim3(style.blocks), kThreads, kStagesBytes, stream,
         style);
  launch("style_gram_reduce", &style_gram_reduce_kernel, dim3(style.bands), kThreads, (4 * kThreads + kWarps + 1) * 4,
         stream, style);
}
template void launch_style_fwd<Fp16>(const StyleLaunch&, cudaStream_t);
template void launch_style_fwd<Bf16>(const StyleLaunch&, cudaStream_t);

}  // namespace gramophone
