// style_bwd_: grad <- (grad + F D) where F > 0, in place, F [pixels, C] and D [C, C] symmetric.
//
// A product of 128 pixels x min(C, 128) channels per block, multiplied in bfloat16 whatever F is: gradients need its
// range. Bound by memory up to 256 channels, so that all that a block reads of F and grad is on its way from the start,
// F serves as operand and as mask with one read, and the column blocks of the same pixels are neighbours, whose F is in
// L2.
#include "device.cuh"
#include "style.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int kPixels = 128;
constexpr int kDepth = 64;  // channels of a stage: rows of 128 bytes
constexpr int kRowBytes = kDepth * 2;
constexpr int kMaskThreads = 256;

// Where chunk `chunk` (8 values) of row `row` lies among rows of kBytes: swizzled, so that 8 rows of one chunk, which
// is what ldmatrix reads at once, are in 8 different bank groups. Constants that are multiples of 8 rows can be added
// to the result as multiples of 8 * kBytes, and even numbers of chunks xored to it as multiples of 32 bytes.
template <int kBytes>
GRAMOPHONE_DEVICE unsigned chunk_at(unsigned row, unsigned chunk) {
  return row * kBytes + (chunk ^ (row % 8)) * 16;
}

// kColumns: 64 or 128, columns per block. A multiprocessor of sm_90 holds three blocks (40 KB each) or two (96 KB).
template <typename T, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 64 ? 3 : 2)
    add_style(Bf16* __restrict__ grad, const T* __restrict__ features, const Bf16* __restrict__ diff, int64_t pixels,
              int channels, unsigned tiles, bool relu_mask) {
  constexpr int kStages = kColumns == 64 ? 1 : 2;  // at 64 channels there is one chunk of depth
  constexpr int kFeatureBytes = kPixels * kRowBytes, kStageBytes = kFeatureBytes + kColumns * kRowBytes;
  constexpr int kTiles = kColumns / 16;  // 8 columns each, of a warp's 32 pixels x kColumns / 2
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

  // Columns of D are its rows.
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
  // This lane's row of the four 8x8 tiles of an operand: of F pixels in every second quarter of the lanes, depth in the
  // second half; of D, 16 of its rows at once, the other way round. And its first value of a sum, in F and in grad.
  const unsigned f_at = chunk_at<kRowBytes>(warp_row + lane % 16, lane / 16);
  const unsigned d_at = chunk_at<kRowBytes>(warp_column + lane % 8 + lane / 16 * 8, lane / 8 % 2);
  const unsigned mask_at = chunk_at<kRowBytes>(warp_row + lane / 4, warp_column % kDepth / 8) + lane % 4 * 4;
  const unsigned grad_at = chunk_at<kColumns * 2>(warp_row + lane / 4, warp_column / 8) + lane % 4 * 4;
  float sum[2][kTiles][4] = {};
  uint32_t shut[2] = {};  // one bit per value: F <= 0
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
    // The stage that holds the warp's own columns also gives their mask. "Not <= 0", so that NaN in F is not hidden.
    if (relu_mask && depth == (first_column + warp_column) / kDepth * kDepth) {
#pragma unroll
      for (int m = 0; m < 2; ++m)
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const auto both =
                *reinterpret_cast<const uint32_t*>(f + (mask_at ^ (16 * n)) + (16 * m + 8 * half) * kRowBytes);
            if (to_float(low<T>(both)) <= 0) shut[m] |= 1u << (4 * n + 2 * half);
            if (to_float(high<T>(both)) <= 0) shut[m] |= 2u << (4 * n + 2 * half);
          }
    }
    if (kStages > 1 && depth + 2 * kDepth < static_cast<unsigned>(channels)) {
      __syncthreads();  // all have left the stage
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
        if (shut[m] & 1u << (4 * n + 2 * half)) first = 0;
        if (shut[m] & 2u << (4 * n + 2 * half)) second = 0;
        *both = pair(from_float<Bf16>(first), from_float<Bf16>(second));
      }
  __syncthreads();
#pragma unroll
  for (unsigned row = thread / kChunks; row < kPixels; row += kThreads / kChunks)
    if (row < rows)
      *reinterpret_cast<uint4*>(grad + int64_t{row} * channels + 8 * (thread % kChunks)) =
          *reinterpret_cast<const uint4*>(gradients + chunk_at<kColumns * 2>(row, thread % kChunks));
}

// Eight values per thread, and the rest one by one.
template <typename T>
__global__ void __launch_bounds__(kMaskThreads)
    mask(Bf16* __restrict__ grad, const T* __restrict__ features, int64_t n) {
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
  static_assert(kShared <= 99 * 1024);  // of sm_86
  const int64_t tiles = ceil_div(pixels, kPixels), blocks = jobs * tiles * (channels / kColumns);
  launch("style_bwd_", &add_style<T, kColumns>, dim3(static_cast<unsigned>(blocks)), kThreads, kShared, stream, grad,
         features, diff, pixels, channels, static_cast<unsigned>(tiles), relu_mask);
}

}  // namespace

template <typename T>
void style_backward(Bf16* grad, const T* features, const Bf16* diff, int64_t jobs, int64_t pixels, int channels,
                    bool relu_mask, cudaStream_t stream) {
  if (channels == 64) {
    add<T, 64>(grad, features, diff, jobs, pixels, channels, relu_mask, stream);
  } else {
    add<T, 128>(grad, features, diff, jobs, pixels, channels, relu_mask, stream);
  }
}
template void style_backward(Bf16*, const Fp16*, const Bf16*, int64_t, int64_t, int, bool, cudaStream_t);
template void style_backward(Bf16*, const Bf16*, const Bf16*, int64_t, int64_t, int, bool, cudaStream_t);

template <typename T>
void mask_backward(Bf16* grad, const T* features, int64_t n, cudaStream_t stream) {
  launch("style_bwd_, mask", &mask<T>, dim3(static_cast<unsigned>(ceil_div(n, 8 * kMaskThreads))), kMaskThreads, 0,
         stream, grad, features, n);
}
template void mask_backward(Bf16*, const Fp16*, int64_t, cudaStream_t);
template void mask_backward(Bf16*, const Bf16*, int64_t, cudaStream_t);

}  // namespace gramophone
