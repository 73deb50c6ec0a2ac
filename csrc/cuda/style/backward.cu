// style_bwd_: grad <- (grad + F D) where F > 0, in place, F [pixels, C] and D [C, C] symmetric.
//
// A block computes the product for 128 pixels x min(C, 128) channels. It multiplies in bfloat16 for every type of F,
// because gradients need its range. Up to 256 channels the kernel is bound by memory. Therefore a block starts all its
// reads of F and grad at once, reads F once as operand and as mask, and the blocks for the columns of the same pixels
// are adjacent, so that F comes from L2.
#include "cuda/common/device.cuh"
#include "cuda/style/style.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 128;
constexpr int kDepth = 64;  // channels per stage: rows of 128 bytes
constexpr int kRowBytes = kDepth * 2;
constexpr int kMaskThreads = 256;

// The offset of chunk `chunk` (8 values) of row `row` in rows of kBytes. It is swizzled, so that 8 rows of one chunk,
// which ldmatrix reads at once, are in 8 different bank groups. To move by a multiple of 8 rows, add the same multiple
// of 8 * kBytes to the result; to move by an even number of chunks, xor it with a multiple of 32 bytes.
template <int kBytes>
GRAMOPHONE_DEVICE unsigned chunk_at(unsigned row, unsigned chunk) {
  return row * kBytes + (chunk ^ (row % 8)) * 16;
}

// kColumns, columns per block: 64 or 128. A multiprocessor of sm_90 has room for three blocks (40 KB each) or two (96
// KB).
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 64 ? 3 : 2)
    style_bwd_kernel(Bf16* __restrict__ grad, const T* __restrict__ features, const Bf16* __restrict__ diff,
                     int64_t pixels, int channels, unsigned tiles, bool relu_mask) {
  constexpr int kStages = kColumns == 64 ? 1 : 2;  // with 64 channels one stage holds all of them
  constexpr int kFeatureBytes = kPixels * kRowBytes, kStageBytes = kFeatureBytes + kColumns * kRowBytes;
  constexpr int kTiles = kColumns / 16;  // of 8 columns; a warp computes 32 pixels x kColumns / 2 columns
  unsigned char* const shared = shared_memory();
  unsigned char* const gradients = shared + kStages * kStageBytes;  // [kPixels, kColumns]

  const unsigned thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const unsigned column_blocks = channels / kColumns;
  const unsigned first_column = blockIdx.x % column_blocks * kColumns;
  const unsigned tile = blockIdx.x / column_blocks % tiles;
  const int64_t job = blockIdx.x / column_blocks / tiles;
  const int64_t start = int64_t{tile} * kPixels;
  const unsigned rows = pixels - start < kPixels ? static_cast<unsigned>(pixels - start) : kPixels;
  features += (job * pixels + start) * channels;
  grad += (job * pixels + start) * channels + first_column;
  diff += (job * channels + first_column) * channels;

  // D is symmetric, so its rows are loaded as its columns.
  const auto load = [&](unsigned depth, unsigned stage) {
    unsigned char* const to = shared + stage * kStageBytes;
    const unsigned chunk = thread % 8;
#pragma unroll
    for (unsigned row = thread / 8; row < kPixels; row += kThreads / 8) {
      unsigned char* const at = to + chunk_at<kRowBytes>(row, chunk);
      if (row < rows) {
        copy_async(at, features + int64_t{row} * channels + depth + 8 * chunk);
      } else {
        *reinterpret_cast<uint4*>(at) = make_uint4(0, 0, 0, 0);
      }
    }
#pragma unroll
    for (unsigned row = thread / 8; row < kColumns; row += kThreads / 8)
      copy_async(to + kFeatureBytes + chunk_at<kRowBytes>(row, chunk),
                 diff + int64_t{row} * channels + depth + 8 * chunk);
  };
  load(0, 0);
  copy_commit();
  if (kStages > 1) load(kDepth, 1);
  constexpr unsigned kChunks = kColumns / 8;
#pragma unroll
  for (unsigned row = thread / kChunks; row < kPixels; row += kThreads / kChunks)
    if (row < rows)
      copy_async(gradients + chunk_at<kColumns * 2>(row, thread % kChunks),
                 grad + int64_t{row} * channels + 8 * (thread % kChunks));
  copy_commit();

  const unsigned warp_row = warp / 2 * 32, warp_column = warp % 2 * (kColumns / 2);
  // This lane's row of the four 8x8 tiles of an operand. For F every second quarter of the lanes has the later 8
  // pixels, and the second half the later 8 channels; for D it is the other way round. mask_at and grad_at: this lane's
  // first value of a sum, in F and in grad.
  const unsigned f_at = chunk_at<kRowBytes>(warp_row + lane % 16, lane / 16);
  const unsigned d_at = chunk_at<kRowBytes>(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const unsigned mask_at = chunk_at<kRowBytes>(warp_row + lane / 4, warp_column % kDepth / 8) + lane % 4 * 4;
  const unsigned grad_at = chunk_at<kColumns * 2>(warp_row + lane / 4, warp_column / 8) + lane % 4 * 4;
  float sum[2][kTiles][4] = {};
  uint32_t masked[2] = {};  // one bit per value: F <= 0
  for (unsigned depth = 0, stage = 0; depth < static_cast<unsigned>(channels);
       depth += kDepth, stage = kStages - 1 - stage) {
    copy_wait<1>();
    __syncthreads();
    const unsigned char* const f = shared + stage * kStageBytes;
    const unsigned char* const d = f + kFeatureBytes;
#pragma unroll
    for (unsigned k = 0; k < kDepth / 16; ++k) {
      uint32_t a[2][4];
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        ldmatrix(a[m], f + (f_at ^ (32 * k)) + 16 * m * kRowBytes);
#pragma unroll
        for (int i = 0; i < 4; ++i) a[m][i] = converted<Bf16, T>(a[m][i]);
      }
#pragma unroll
      for (int n = 0; n < kTiles; n += 2) {
        uint32_t b[4];
        ldmatrix(b, d + (d_at ^ (32 * k)) + 8 * n * kRowBytes);
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          mma<Bf16>(sum[m][n], a[m], b[0], b[1]);
          mma<Bf16>(sum[m][n + 1], a[m], b[2], b[3]);
        }
      }
    }
    // The stage with the warp's own columns also has their mask. The condition is "not <= 0", so that the mask does not
    // hide a NaN in F.
    if (relu_mask && depth == (first_column + warp_column) / kDepth * kDepth) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto both =
                *reinterpret_cast<const uint32_t*>(f + (mask_at ^ (16 * n)) + (16 * m + 8 * half) * kRowBytes);
            if (to_float(low<T>(both)) <= 0) masked[m] |= 1u << (4 * n + 2 * half);
            if (to_float(high<T>(both)) <= 0) masked[m] |= 2u << (4 * n + 2 * half);
          }
    }
    if (kStages > 1 && depth + 2 * kDepth < static_cast<unsigned>(channels)) {
      __syncthreads();  // no warp still reads the stage
      load(depth + 2 * kDepth, stage);
    }
    copy_commit();
  }
  copy_wait<0>();
  __syncthreads();

#pragma unroll
  for (int m = 0; m < 2; ++m)
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        auto* const both =
            reinterpret_cast<uint32_t*>(gradients + (grad_at ^ (16 * n)) + (16 * m + 8 * half) * kColumns * 2);
        float first = to_float(low<Bf16>(*both)) + sum[m][n][2 * half];
        float second = to_float(high<Bf16>(*both)) + sum[m][n][2 * half + 1];
        if (masked[m] & 1u << (4 * n + 2 * half)) first = 0;
        if (masked[m] & 2u << (4 * n + 2 * half)) second = 0;
        *both = pair(from_float<Bf16>(first), from_float<Bf16>(second));
      }
  __syncthreads();
#pragma unroll
  for (unsigned row = thread / kChunks; row < kPixels; row += kThreads / kChunks)
    if (row < rows)
      *reinterpret_cast<uint4*>(grad + int64_t{row} * channels + 8 * (thread % kChunks)) =
          *reinterpret_cast<const uint4*>(gradients + chunk_at<kColumns * 2>(row, thread % kChunks));
}

// Each thread takes eight values; the last one takes what is left one by one.
template <typename T>
__global__ void __launch_bounds__(kMaskThreads)
    style_bwd_mask_kernel(Bf16* __restrict__ grad, const T* __restrict__ features, int64_t n) {
  const int64_t at = (int64_t{blockIdx.x} * kMaskThreads + threadIdx.x) * 8;
  if (at + 8 <= n) {
    const auto f = *reinterpret_cast<const Eight<T>*>(features + at);
    auto g = *reinterpret_cast<Eight<Bf16>*>(grad + at);
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (to_float(f.at[i]) <= 0) g.at[i] = Bf16{0};
    *reinterpret_cast<Eight<Bf16>*>(grad + at) = g;
  } else {
    for (int64_t i = at; i < n; ++i)
      if (to_float(features[i]) <= 0) grad[i] = Bf16{0};
  }
}

template <typename T, int kColumns>
void add(Bf16* grad, const T* features, const Bf16* diff, int64_t jobs, int64_t pixels, int channels, bool relu_mask,
         cudaStream_t stream) {
  constexpr int kShared = (kColumns == 64 ? 1 : 2) * (kPixels + kColumns) * kRowBytes + kPixels * kColumns * 2;
  static_assert(kShared <= 99 * 1024);  // the limit of sm_86
  const int64_t tiles = ceil_div(pixels, kPixels), blocks = jobs * tiles * (channels / kColumns);
  launch("style_bwd", &style_bwd_kernel<T, kColumns>, dim3(static_cast<unsigned>(blocks)), kThreads, kShared, stream,
         grad, features, diff, pixels, channels, static_cast<unsigned>(tiles), relu_mask);
}

}  // namespace

template <typename T>
void launch_style_bwd(Bf16* grad, const T* features, const Bf16* diff, int64_t jobs, int64_t pixels, int channels,
                      bool relu_mask, cudaStream_t stream) {
  if (channels == 64) {
    add<T, 64>(grad, features, diff, jobs, pixels, channels, relu_mask, stream);
  } else {
    add<T, 128>(grad, features, diff, jobs, pixels, channels, relu_mask, stream);
  }
}
template void launch_style_bwd(Bf16*, const Fp16*, const Bf16*, int64_t, int64_t, int, bool, cudaStream_t);
template void launch_style_bwd(Bf16*, const Bf16*, const Bf16*, int64_t, int64_t, int, bool, cudaStream_t);

template <typename T>
void launch_style_bwd_mask(Bf16* grad, const T* features, int64_t n, cudaStream_t stream) {
  launch("style_bwd_mask", &style_bwd_mask_kernel<T>, dim3(static_cast<unsigned>(ceil_div(n, 8 * kMaskThreads))),
         kMaskThreads, 0, stream, grad, features, n);
}
template void launch_style_bwd_mask(Bf16*, const Fp16*, int64_t, cudaStream_t);
template void launch_style_bwd_mask(Bf16*, const Bf16*, int64_t, cudaStream_t);

}  // namespace gramophone
