// gram, style_loss, style_fwd: G = scale * F^T F of F [pixels, channels], the loss w * |G - A|^2 and its difference.
//
// F is long and thin (64 to 512 channels, up to millions of pixels), so the work is cut over pixels. `multiply` sums
// the products of a slice of pixels per block, for all layers and jobs at once, so that layers that wait for memory
// (few channels) run beside layers that wait for tensor cores (many). `finish` adds the slices in their order and does
// the rest. A single kernel whose last block adds the slices would save one launch, about 2 us, and cost far more: one
// block takes 20 to 40 us for 15 slices of 256 x 256, where hundreds of blocks take 3.
#include "device.cuh"
#include "style.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kStagesBytes = 96 * 1024;  // sm_86 has 99 KB, and 80 KB in flight fill the memory's queue
constexpr int kTileFloats = kTile * kTile;

__device__ constexpr int tile_at(int row, int column, int side) {
  return row * side - row * (row - 1) / 2 + column - row;
}

// Multiply
// ------------------------------------------------------------------------------------------------------------------
//
// A warp owns one 64x64 tile off the diagonal (8 loads and 32 products per 16 pixels), or two on it, of which only the
// 16x16 blocks on and above the diagonal are multiplied (8 loads, 40 products; at 64 channels there is only one).

// The A fragments of 64 channels x 16 pixels. `at`: this lane's pixel and the first channel; `turn`: its swizzle.
GRAMOPHONE_DEVICE void load_channels(uint32_t (&a)[4][4], const unsigned char* at, unsigned turn) {
#pragma unroll
  for (unsigned i = 0; i < 4; ++i) ldmatrix_transposed(a[i], at + (turn ^ (32 * i)));
}

template <typename T>
GRAMOPHONE_DEVICE void add_tile(float (&sum)[40][4], const unsigned char* row, const unsigned char* column,
                                unsigned turn) {
  uint32_t a[4][4], b[4][4];
  load_channels(a, row, turn);
  load_channels(b, column, turn);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 0; n < 8; ++n) mma<T>(sum[8 * i + n], a[i], b[n / 2][n % 2], b[n / 2][2 + n % 2]);
}

template <typename T, int kFirst>
GRAMOPHONE_DEVICE void add_diagonal(float (&sum)[40][4], const unsigned char* at, unsigned turn) {
  uint32_t a[4][4];
  load_channels(a, at, turn);
  int s = kFirst;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int n = 2 * i; n < 8; ++n) mma<T>(sum[s++], a[i], a[n / 2][n % 2], a[n / 2][2 + n % 2]);
}

GRAMOPHONE_DEVICE void store_fragment(float* tile, const float (&sum)[4], int i, int n) {
  const int lane = threadIdx.x % kWarp;
  float* to = tile + (16 * i + lane / 4) * kTile + 8 * n + 2 * (lane % 4);
  *reinterpret_cast<float2*>(to) = make_float2(sum[0], sum[1]);
  *reinterpret_cast<float2*>(to + 8 * kTile) = make_float2(sum[2], sum[3]);
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

// One unit's tiles of the slice of `pixels` pixels at `features`. The block holds kBlocks blocks of 64 channels: all of
// a triangle from channel `first` on (1, 2 or 4), or, of 512 channels, the two from `first` on and the last four (6),
// whose 2x4 products are the unit. With few channels the warps share the pixels of a stage, in kGroups groups.
template <typename T, int kBlocks, int kGroups>
GRAMOPHONE_DEVICE void multiply_slice(const T* features, int pixels, int channels, int first, float* tiles) {
  constexpr bool kRectangle = kBlocks == 6;
  constexpr int kRowBytes = kBlocks * kTile * 2;
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
  // The tile (row, column), or the two tiles (row, row) and (column, column), in blocks of the unit.
  int row = 2 * (role - kOff), column = row + 1;
  if (kRectangle) {
    row = role / 4, column = 2 + role % 4;
  } else if (off) {  // 01 02 03 12 13 23
    row = role < 3 ? 0 : role < 5 ? 1 : 2;
    column = role < 3 ? role + 1 : role < 5 ? role - 1 : 3;
  }
  const auto channel_of = [&](int block) {
    return kRectangle && block >= 2 ? 128 + kTile * block : first + kTile * block;
  };

  // 8 threads copy the 128 bytes of a block of channels of a pixel; chunks of 16 bytes are swizzled by the pixel.
  const int copy_pixel = thread / 8, copy_chunk = thread % 8;
  const T* const from = features + int64_t{copy_pixel} * channels + 8 * copy_chunk;
  unsigned char* const to = shared + copy_pixel * kRowBytes + (copy_chunk ^ (copy_pixel % 8)) * 16;
  const auto load = [&](int start, int stage) {
#pragma unroll
    for (int p = 0; p < kPixels; p += 32)
#pragma unroll
      for (int block = 0; block < kBlocks; ++block) {
        unsigned char* const chunk = to + stage * kStageBytes + p * kRowBytes + block * kTile * 2;
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
  // This lane's row of the four 8x8 tiles of an A fragment: pixels along k in the second half of the lanes, channels in
  // every second quarter.
  const unsigned char* const mine = shared + (16 * kSteps * group + lane % 8 + lane / 16 * 8) * kRowBytes;
  const unsigned turn = ((lane / 8 % 2) ^ (lane % 8)) * 16;
  float sum[40][4] = {};
  for (int done = 0, stage = 0; done < pixels; done += kPixels, loaded += kPixels) {
    copy_wait<kStages - 2>();
    __syncthreads();  // the stage has landed for all, and all have left the one before it, which is loaded next
    if (loaded < pixels) load(loaded, stage == 0 ? kStages - 1 : stage - 1);
    copy_commit();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const unsigned char* const at = mine + stage * kStageBytes + 16 * step * kRowBytes;
      if (off) {
        add_tile<T>(sum, at + row * kTile * 2, at + column * kTile * 2, turn);
      } else {
        add_diagonal<T, 0>(sum, at + row * kTile * 2, turn);
        if (kBlocks > 1) add_diagonal<T, 20>(sum, at + column * kTile * 2, turn);
      }
    }
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }

  // The groups' sums, halved until one is left; at most 80 KB are parked.
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
  const int side = channels / kTile, r = channel_of(row) / kTile, c = channel_of(column) / kTile;
  if (off) {
    store_tile(tiles + tile_at(r, c, side) * kTileFloats, sum);
  } else {
    store_diagonal<0>(tiles + tile_at(r, r, side) * kTileFloats, sum);
    if (kBlocks > 1) store_diagonal<20>(tiles + tile_at(c, c, side) * kTileFloats, sum);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) multiply(const StyleLaunch launch) {
  const int block = static_cast<int>(blockIdx.x);
  int l = 0;
  while (l + 1 < launch.count && block >= launch.layers[l + 1].first_item) ++l;
  const StyleLayer& layer = launch.layers[l];
  const int channels = layer.channels, units = units_of(channels), slices = layer.slices;
  const int item = block - layer.first_item;  // units fastest: those of a slice read the same pixels
  const int unit = item % units, slice = item / units % slices, job = item / units / slices;
  if (unit == 0 && slice == 0 && threadIdx.x == 0) launch.arrived[l * launch.jobs + job] = 0;  // for `finish`

  const int64_t start = int64_t{slice} * layer.slice_pixels, left = layer.pixels - start;
  const int pixels = left < layer.slice_pixels ? static_cast<int>(left) : layer.slice_pixels;
  const T* const features = static_cast<const T*>(layer.features) + (job * layer.pixels + start) * channels;
  float* const tiles =
      launch.partials + (layer.first_tile + (int64_t{job} * slices + slice) * tiles_of(channels)) * kTileFloats;
  if (channels == 64) {
    multiply_slice<T, 1, 8>(features, pixels, channels, 0, tiles);
  } else if (channels == 128) {
    multiply_slice<T, 2, 4>(features, pixels, channels, 0, tiles);
  } else if (unit < 2) {  // all of 256 channels, or either half of 512
    multiply_slice<T, 4, 1>(features, pixels, channels, 256 * unit, tiles);
  } else {  // the first half by the second, a quarter of the channels at a time
    multiply_slice<T, 6, 1>(features, pixels, channels, 128 * (unit - 2), tiles);
  }
}

// Finish
// --------------------------------------------------------------------------------------------------------------------

// Four rows of a tile. First each quarter of the threads adds every fourth slice, 16 bytes per load; then each thread
// has one value. Four blocks per multiprocessor, or the compiler makes room for eight and waits for one load after the
// other.
__global__ void __launch_bounds__(kThreads, 4) finish(const StyleLaunch launch) {
  constexpr int kRows = kTile / kBands, kValues = kRows * kTile, kShares = 4;
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
  while (tile >= tile_at(tile_row + 1, tile_row + 1, channels / kTile)) ++tile_row;
  const int tile_column = tile_row + tile - tile_at(tile_row, tile_row, channels / kTile);

  float4 sum = make_float4(0, 0, 0, 0);
  {
    const int share = thread / (kValues / 4), value = 4 * (thread % (kValues / 4));
    // On the diagonal 16x16 blocks below it were not multiplied, and their memory was not written.
    if (tile_row < tile_column || value % kTile + 3 >= first_row + value / kTile) {
      const auto* const from = reinterpret_cast<const float4*>(
          launch.partials + (layer.first_tile + int64_t{job} * slices * tiles + tile) * kTileFloats +
          first_row * kTile + value);
      const int64_t stride = int64_t{tiles} * kTileFloats / 4;
      constexpr int kAtOnce = 8;  // loads on their way
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

  const int i = tile_row * kTile + first_row + thread / kTile, j = tile_column * kTile + thread % kTile;
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
  sums[thread] = value;  // where this thread alone has read
  const auto put = [&](int64_t at, float x) {
    if (layer.target) {
      static_cast<Bf16*>(layer.out)[matrix + at] = from_float<Bf16>(x);
    } else {
      static_cast<float*>(layer.out)[matrix + at] = x;
    }
  };
  if (i <= j) put(int64_t{i} * channels + j, value);
  __syncthreads();
  {  // mirrored, again with neighbours in neighbouring threads
    const int row = thread % kRows, column = thread / kRows;
    const int to_row = tile_column * kTile + column, to_column = tile_row * kTile + first_row + row;
    if (to_row > to_column) put(int64_t{to_row} * channels + to_column, sums[row * kTile + column]);
  }
  if (!layer.target) return;

  // The last block of a job and layer to arrive adds what all have left, in the order of their numbers.
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
void style_forward(const StyleLaunch& work, cudaStream_t stream) {
  gramophone::launch("style_fwd, multiply", &multiply<T>, dim3(work.items), kThreads, kStagesBytes, stream, work);
  gramophone::launch("style_fwd, finish", &finish, dim3(work.bands), kThreads, (4 * kThreads + kWarps + 1) * 4, stream,
                     work);
}
template void style_forward<Fp16>(const StyleLaunch&, cudaStream_t);
template void style_forward<Bf16>(const StyleLaunch&, cudaStream_t);

}  // namespace gramophone
