// content_, tv_, tv_check_finite_: a term of the objective and its gradient, in one pass over the maps.
//
// The sums do not depend on the run, the batch or the device: a job is divided into blocks by its size alone, each
// block writes its sum, and a second, small kernel adds the sums by index. A single kernel in which the last block adds
// the sums would need as many launches, because its counters must be cleared before each run, and a fence.
#include "cuda/common/device.cuh"
#include "cuda/terms/terms.h"
#include "optimiser_math.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int kAtOnce = 2;               // groups of 16 bytes per map that a thread has in flight
constexpr int64_t kContentBlock = 8192;  // values
constexpr int64_t kTvBlock = 4 * kThreads;

template <typename T, int kValues>
struct alignas(sizeof(T) * kValues) Values {
  T at[kValues];
};

// Conversions as in device.cuh, and none for float64, which gradient checks use.
template <typename S, typename T>
GRAMOPHONE_DEVICE S number(T x) {
  return to_float(x);
}
template <>
GRAMOPHONE_DEVICE double number<double>(double x) {
  return x;
}
template <typename T>
GRAMOPHONE_DEVICE void put(T& to, float x) {
  to = from_float<T>(x);
}
GRAMOPHONE_DEVICE void put(double& to, double x) {
  to = x;
}

// The sum over the block, valid in thread 0.
template <typename S>
GRAMOPHONE_DEVICE S total(S x) {
  __shared__ S of_warps[kThreads / kWarp];
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = x;
  __syncthreads();
  S sum = 0;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) sum += of_warps[i];
  return sum;
}

// Whether `x` holds in any thread of the block, valid in all of them.
GRAMOPHONE_DEVICE bool in_any_thread(bool x) {
  __shared__ int of_warps[kThreads / kWarp];
  const int any = __any_sync(kAllLanes, x);
  if (threadIdx.x % kWarp == 0) of_warps[threadIdx.x / kWarp] = any;
  __syncthreads();
  bool found = false;
#pragma unroll
  for (int i = 0; i < kThreads / kWarp; ++i) found |= of_warps[i] != 0;
  return found;
}

// The job of this thread block, and the block's number within the job.
struct Place {
  int64_t job, block;
};
GRAMOPHONE_DEVICE Place place(int64_t blocks) {
  return {blockIdx.x / blocks, blockIdx.x % blocks};
}

template <typename G, typename T, typename S, int kValues>
__global__ void __launch_bounds__(kThreads)
    content_kernel(Values<G, kValues>* __restrict__ grad, const Values<T, kValues>* __restrict__ features,
                   const Values<T, kValues>* __restrict__ target, const S* __restrict__ weight, int64_t groups,
                   int64_t blocks, bool mask, S* __restrict__ partials) {
  constexpr int kGroups = kContentBlock / kValues;  // per block
  const Place at = place(blocks);
  const int64_t start = at.job * groups, first = at.block * kGroups;
  const int count = static_cast<int>(groups - first < kGroups ? groups - first : kGroups);
  const S twice = 2 * weight[at.job];
  grad += start + first, features += start + first, target += start + first;
  S sum = 0;
  for (int from = threadIdx.x; from < count; from += kAtOnce * kThreads) {
    Values<G, kValues> g[kAtOnce];
    Values<T, kValues> f[kAtOnce], t[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = from + k * kThreads;
      if (i < count) f[k] = features[i], t[k] = target[i], g[k] = grad[i];
    }
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k) {
      const int i = from + k * kThreads;
      if (i >= count) break;
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const S value = number<S>(f[k].at[j]), difference = value - number<S>(t[k].at[j]);
        sum += difference * difference;
        const S updated = number<S>(g[k].at[j]) + twice * difference;
        put(g[k].at[j], mask && value <= 0 ? S(0) : updated);  // "not <= 0", so that the mask does not hide a NaN
      }
      grad[i] = g[k];
    }
  }
  sum = total(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// Each thread takes one pixel of one colour at a time; the values that adjacent threads also read come from the cache.
// With kCheck each block also writes to `bad` whether the gradient has a value that is not finite.
template <bool kCheck>
__global__ void __launch_bounds__(kThreads)
    tv_kernel(float* __restrict__ grad, const float* __restrict__ image, const float* __restrict__ weight, int height,
              int width, int64_t blocks, float* __restrict__ partials, uint8_t* __restrict__ bad) {
  const Place at = place(blocks);
  const unsigned pixels = static_cast<unsigned>(height) * width, count = 3 * pixels;
  const float per_x = 1 / (3.0f * height * (width - 1)), per_y = 1 / (3.0f * (height - 1) * width);
  const float twice = 2 * weight[at.job];
  grad += at.job * count, image += at.job * count;
  float sum = 0;
  bool good = true;
#pragma unroll
  for (int k = 0; k < kTvBlock / kThreads; ++k) {
    const unsigned i = static_cast<unsigned>(at.block * kTvBlock) + k * kThreads + threadIdx.x;
    if (i >= count) break;
    const unsigned x = i % width, y = i % pixels / width;
    const float here = image[i];
    const float left = x > 0 ? here - image[i - 1] : 0, right = x + 1 < width ? image[i + 1] - here : 0;
    const float up = y > 0 ? here - image[i - width] : 0, down = y + 1 < height ? image[i + width] - here : 0;
    sum += per_x * right * right + per_y * down * down;
    const float updated = grad[i] + twice * (per_x * (left - right) + per_y * (up - down));
    grad[i] = updated;
    if (kCheck) good &= is_finite(updated);
  }
  sum = total(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
  if (!kCheck) return;
  const bool any = in_any_thread(!good);
  if (threadIdx.x == 0) bad[blockIdx.x] = any;
}

// loss[b] = weight[b] * the sum of the job's partials, with one block per job.
template <typename S>
__global__ void __launch_bounds__(kThreads)
    term_loss_kernel(const S* __restrict__ partials, const S* __restrict__ weight, int64_t blocks,
                     S* __restrict__ loss) {
  S sum = 0;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) sum += partials[blockIdx.x * blocks + i];
  sum = total(sum);
  if (threadIdx.x == 0) loss[blockIdx.x] = weight[blockIdx.x] * sum;
}

// The loss as above, in the last row of the terms, and then what check_finite_ does, with one block per job.
__global__ void __launch_bounds__(kThreads)
    tv_verdict_kernel(const float* __restrict__ partials, const float* __restrict__ weight, int64_t blocks,
                      Verdicts verdicts) {
  const int64_t job = blockIdx.x, jobs = gridDim.x;
  float sum = 0;
  bool good = true;
  for (int64_t i = threadIdx.x; i < blocks; i += kThreads) {
    sum += partials[job * blocks + i];
    good &= !verdicts.bad[job * blocks + i];
  }
  for (int64_t t = threadIdx.x; t < verdicts.term_count - 1; t += kThreads)
    good &= is_finite(verdicts.terms[t * jobs + job]);
  sum = total(sum);
  const bool any = in_any_thread(!good);
  if (threadIdx.x != 0) return;
  const float loss = weight[job] * sum;
  verdicts.terms[(verdicts.term_count - 1) * jobs + job] = loss;
  const int64_t now = ++verdicts.count[job];
  if (verdicts.alive[job] && (any || !is_finite(loss))) {
    verdicts.alive[job] = false;
    verdicts.diverged_at[job] = now;
  }
}

template <int kValues, typename G, typename T, typename S>
void content(G* grad, const T* features, const T* target, const S* weight, int64_t batch, int64_t elements,
             bool relu_mask, S* partials, cudaStream_t stream) {
  const int64_t blocks = content_blocks(elements);
  launch("content_", content_kernel<G, T, S, kValues>, dim3(static_cast<unsigned>(batch * blocks)), kThreads, 0, stream,
         reinterpret_cast<Values<G, kValues>*>(grad), reinterpret_cast<const Values<T, kValues>*>(features),
         reinterpret_cast<const Values<T, kValues>*>(target), weight, elements / kValues, blocks, relu_mask, partials);
}

template <typename S>
void sum_up(const char* name, const S* partials, const S* weight, int64_t batch, int64_t blocks, S* loss,
            cudaStream_t stream) {
  launch(name, term_loss_kernel<S>, dim3(static_cast<unsigned>(batch)), kThreads, 0, stream, partials, weight, blocks,
         loss);
}

}  // namespace

int64_t content_blocks(int64_t elements) {
  return ceil_div(elements, kContentBlock);
}

template <typename G, typename T, typename S>
void launch_content(G* grad, const T* features, const T* target, const S* weight, int64_t batch, int64_t elements,
                    bool relu_mask, S* partials, S* loss, cudaStream_t stream) {
  static_assert(sizeof(G) == sizeof(T), "a gradient is as wide as its features");
  constexpr int kWide = 16 / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (elements % kWide == 0 && aligned(grad) && aligned(features) && aligned(target))
    content<kWide>(grad, features, target, weight, batch, elements, relu_mask, partials, stream);
  else
    content<1>(grad, features, target, weight, batch, elements, relu_mask, partials, stream);
  sum_up("content_", partials, weight, batch, content_blocks(elements), loss, stream);
}

int64_t tv_blocks(int height, int width) {
  return ceil_div(int64_t{3} * height * width, kTvBlock);
}

void launch_tv(float* grad, const float* image, const float* weight, int64_t batch, int height, int width,
               float* partials, float* loss, cudaStream_t stream) {
  const int64_t blocks = tv_blocks(height, width);
  launch("tv_", tv_kernel<false>, dim3(static_cast<unsigned>(batch * blocks)), kThreads, 0, stream, grad, image, weight,
         height, width, blocks, partials, nullptr);
  sum_up("tv_", partials, weight, batch, blocks, loss, stream);
}

void launch_tv_check_finite(float* grad, const float* image, const float* weight, int64_t batch, int height, int width,
                            float* partials, const Verdicts& verdicts, cudaStream_t stream) {
  const int64_t blocks = tv_blocks(height, width);
  launch("tv_check_finite_", tv_kernel<true>, dim3(static_cast<unsigned>(batch * blocks)), kThreads, 0, stream, grad,
         image, weight, height, width, blocks, partials, verdicts.bad);
  launch("tv_check_finite_", tv_verdict_kernel, dim3(static_cast<unsigned>(batch)), kThreads, 0, stream, partials,
         weight, blocks, verdicts);
}

#define GRAMOPHONE_CONTENT(G, T, S) \
  template void launch_content(G*, const T*, const T*, const S*, int64_t, int64_t, bool, S*, S*, cudaStream_t);
GRAMOPHONE_CONTENT(float, float, float)
GRAMOPHONE_CONTENT(double, double, double)
GRAMOPHONE_CONTENT(Fp16, Fp16, float)
GRAMOPHONE_CONTENT(Bf16, Bf16, float)
GRAMOPHONE_CONTENT(Bf16, Fp16, float)

}  // namespace gramophone
