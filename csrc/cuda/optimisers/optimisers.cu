// check_finite_, descent_, adam_, lbfgs_: the in-place update of the images after an evaluation. check_finite_, plain
// descent and Adam take one launch each, normalised descent two, L-BFGS three. The arithmetic is in optimiser_math.h.
//
// All kernels are bound by memory. Sums are computed per part of a job and then over the parts, both in a fixed order,
// and no result depends on the order of the blocks. The kernels initialise or restore their scratch memory themselves,
// so a captured graph can be replayed as it is.
#include "cuda/common/device.cuh"
#include "cuda/optimisers/optimisers.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1024;  // per job; an H200 runs 8 on each of its 132 multiprocessors at once

// Adjacent values that one thread reads or writes at once.
template <int kWide>
struct alignas(4 * kWide) Run {
  float at[kWide];
};

template <int kWide>
GRAMOPHONE_DEVICE Run<kWide> load(const float* from) {
  return *reinterpret_cast<const Run<kWide>*>(from);
}

template <int kWide>
GRAMOPHONE_DEVICE void store(Run<kWide> run, float* to) {
  *reinterpret_cast<Run<kWide>*>(to) = run;
}

GRAMOPHONE_DEVICE double warp_total(double x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

// The sum over the block's kThreads threads, returned to all of them. Uses kThreads / 32 doubles of dynamic shared
// memory.
GRAMOPHONE_DEVICE double block_total(double x) {
  auto* scratch = reinterpret_cast<double*>(shared_memory());
  x = warp_total(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  double sum = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) sum += scratch[i];
  return sum;
}

constexpr size_t kTotalBytes = kThreads / kWarp * sizeof(double);

// Detection of values that are not finite

// While the kernel runs, the upper half of a job's count holds two counters: the finished parts, from bit kFinishedAt,
// and those of them with a value that is not finite, from bit kBadAt. The last part to finish decides and replaces all
// of it by the new count.
constexpr int kFinishedAt = 32, kBadAt = 48;

template <int kWide>
__global__ void __launch_bounds__(kThreads)
    check_finite_kernel(const float* terms, int64_t term_count, const float* grad, bool* alive, int64_t* diverged_at,
                        int64_t* count, int64_t values, int64_t part_size) {
  const int64_t b = blockIdx.y, first = blockIdx.x * part_size;
  const int64_t last = first + part_size < values ? first + part_size : values;
  bool good = true;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x * kWide; i < last; i += kThreads * kWide) {
    const Run<kWide> run = load<kWide>(grad + b * values + i);
#pragma unroll
    for (int w = 0; w < kWide; ++w) good &= is_finite(run.at[w]);
  }
  if (blockIdx.x == 0)
    for (int64_t t = threadIdx.x; t < term_count; t += kThreads) good &= is_finite(terms[t * gridDim.y + b]);

  auto* bad = reinterpret_cast<int*>(shared_memory());  // one per warp
  const int any = __any_sync(kAllLanes, !good);
  if (threadIdx.x % kWarp == 0) bad[threadIdx.x / kWarp] = any;
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned long long mine = 1ull << kFinishedAt;
  for (int i = 0; i < kThreads / kWarp; ++i)
    if (bad[i]) mine |= 1ull << kBadAt;
  auto* job_count = reinterpret_cast<unsigned long long*>(count + b);
  const unsigned long long all = atomicAdd(job_count, mine) + mine;
  if ((all >> kFinishedAt & 0xffff) != gridDim.x) return;
  const unsigned long long now = (all & 0xffffffff) + 1;
  *job_count = now;
  if (alive[b] && all >> kBadAt) {
    alive[b] = false;
    diverged_at[b] = static_cast<int64_t>(now);
  }
}

// Steps
//
// A Move is one optimiser's formula. All threads of a block of a live job call `job(images, b)` once, for the per-job
// values of the formula, and then `propose(job, at, image)` for each run of values, with `at` counted over the batch.

struct Descent {
  const float* grad;
  using Job = float;  // the rate

  GRAMOPHONE_DEVICE Job job(const ImageBatch& images, int64_t b) const { return images.step[b]; }

  template <int kWide>
  GRAMOPHONE_DEVICE Run<kWide> propose(Job rate, int64_t at, Run<kWide> image) const {
    const Run<kWide> g = load<kWide>(grad + at);
#pragma unroll
    for (int w = 0; w < kWide; ++w) image.at[w] = descent_proposal(image.at[w], g.at[w], rate);
    return image;
  }
};

struct NormalisedDescent : Descent {
  const double* squares;
  int parts;

  GRAMOPHONE_DEVICE Job job(const ImageBatch& images, int64_t b) const {
    static_assert(kMaxParts <= kThreads, "a thread takes one part");
    const int part = static_cast<int>(threadIdx.x);
    const double sum = block_total(part < parts ? squares[b * parts + part] : 0.0);
    return to_finite_float(images.step[b] / root_mean_square(sum, images.values));
  }
};

struct Adam {
  const float* grad;
  const int64_t* count;
  float *first, *second;
  using Job = AdamRates;

  // One thread computes the powers, because a multiprocessor of a small GPU does only two float64 products at a time.
  GRAMOPHONE_DEVICE Job job(const ImageBatch& images, int64_t b) const {
    auto* rates = reinterpret_cast<AdamRates*>(shared_memory());
    if (threadIdx.x == 0) *rates = adam_rates(images.step[b], count[b]);
    __syncthreads();
    return *rates;
  }

  template <int kWide>
  GRAMOPHONE_DEVICE Run<kWide> propose(Job rates, int64_t at, Run<kWide> image) const {
    const Run<kWide> g = load<kWide>(grad + at);
    Run<kWide> m = load<kWide>(first + at), v = load<kWide>(second + at);
#pragma unroll
    for (int w = 0; w < kWide; ++w) image.at[w] = adam_proposal(image.at[w], g.at[w], rates, m.at[w], v.at[w]);
    store(m, first + at);
    store(v, second + at);
    return image;
  }
};

struct Lbfgs {
  const float* grad;
  const float* history;
  const StepPlan* plans;
  int64_t all;  // number of values in the batch
  using Job = const StepPlan*;

  GRAMOPHONE_DEVICE Job job(const ImageBatch&, int64_t b) const { return plans + b; }

  template <int kWide>
  GRAMOPHONE_DEVICE Run<kWide> propose(Job plan, int64_t at, Run<kWide> image) const {
    Run<kWide> sum = {};
    const int count = plan->count;
#pragma unroll 7
    for (int i = 0; i < count; ++i) {
      const int vector = plan->vector[i];
      const float weight = plan->weight[i];
      const Run<kWide> x = load<kWide>(vector == kGrad ? grad + at : history + vector * all + at);
#pragma unroll
      for (int w = 0; w < kWide; ++w) sum.at[w] = fmaf(weight, x.at[w], sum.at[w]);
    }
#pragma unroll
    for (int w = 0; w < kWide; ++w) sum.at[w] = image.at[w] + sum.at[w];
    return sum;
  }
};

template <int kWide, typename Move>
__global__ void __launch_bounds__(kThreads) optimiser_step_kernel(ImageBatch images, Move move) {
  const int64_t b = blockIdx.y, start = b * images.values;
  const bool alive = images.alive[b];
  typename Move::Job job{};
  if (alive) job = move.job(images, b);  // the gradient of a diverged job is not read: it may be NaN
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kWide;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWide; i < images.values;
       i += stride) {
    const int64_t at = start + i;
    Run<kWide> image = load<kWide>(images.image + at), last_good = image, proposal = image;
    if (alive) {
      proposal = move.propose(job, at, image);
    } else {
      last_good = load<kWide>(images.last_good + at);
    }
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
      const Pixel now = apply_proposal({image.at[w], last_good.at[w]}, proposal.at[w], alive);
      image.at[w] = now.image;
      last_good.at[w] = now.last_good;
    }
    store(image, images.image + at);
    if (alive) store(last_good, images.last_good + at);
    if (images.mean) {
      Run<kWide> mean = load<kWide>(images.mean + at);
#pragma unroll
      for (int w = 0; w < kWide; ++w) mean.at[w] = running_mean(mean.at[w], image.at[w], images.average);
      store(mean, images.mean + at);
    }
  }
}

template <int kWide>
__global__ void __launch_bounds__(kThreads)
    descent_squares_kernel(const float* grad, const bool* alive, double* squares, int64_t values, int64_t part_size) {
  const int64_t b = blockIdx.y, first = blockIdx.x * part_size;
  const int64_t last = first + part_size < values ? first + part_size : values;
  if (!alive[b]) return;
  double sum = 0;
#pragma unroll 4
  for (int64_t i = first + threadIdx.x * kWide; i < last; i += kThreads * kWide) {
    const Run<kWide> run = load<kWide>(grad + b * values + i);
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
      const double x = run.at[w];
      sum = fma(x, x, sum);
    }
  }
  sum = block_total(sum);
  if (threadIdx.x == 0) squares[b * gridDim.x + blockIdx.x] = sum;
}

// L-BFGS

constexpr int kPairThreads = kPairs * kWarp;  // a warp per pair
constexpr size_t kFreshBytes = 3 * kTileValues * sizeof(double);

// Forms the new pair, writes it to its slot, and computes the inner products of it and the gradient with all of the
// history. A tile of s, y and g is in shared memory as doubles, because converting them for every pair would take as
// long as the memory accesses.
template <int kWide>
__global__ void __launch_bounds__(kPairThreads, 2)
    lbfgs_dots_kernel(ImageBatch images, LbfgsState state, const float* grad, double* sums, int64_t part_size) {
  const int64_t b = blockIdx.y, all = images.jobs * images.values;
  if (!images.alive[b]) return;
  const Ring ring = ring_of(state.seen[b], state.seen[images.jobs + b]);
  const int k = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = blockIdx.x * part_size;
  const int64_t last = first + part_size < images.values ? first + part_size : images.values;
  auto* s = reinterpret_cast<double*>(shared_memory());
  double *y = s + kTileValues, *g = y + kTileValues;
  double dots[kDots] = {};
  for (int64_t tile = first; tile < last; tile += kTileValues) {
    const int64_t at = b * images.values + tile;
    const int size = static_cast<int>(last - tile < kTileValues ? last - tile : kTileValues);
    for (int i = static_cast<int>(threadIdx.x) * kWide; i < size; i += kPairThreads * kWide) {
      const Run<kWide> now = load<kWide>(grad + at + i);
      Run<kWide> ds = {}, dy = {};
      if (ring.forms) {
        const Run<kWide> image = load<kWide>(images.image + at + i), from = load<kWide>(images.last_good + at + i);
        const Run<kWide> before = load<kWide>(state.before + at + i);
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
          ds.at[w] = image.at[w] - from.at[w];
          dy.at[w] = now.at[w] - before.at[w];
        }
        store(ds, state.history + ring.newest * all + at + i);
        store(dy, state.history + (kPairs + ring.newest) * all + at + i);
      }
      store(now, state.before + at + i);
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        s[i + w] = ds.at[w];
        y[i + w] = dy.at[w];
        const double x = now.at[w];
        g[i + w] = x;
        dots[6] = fma(x, x, dots[6]);
      }
    }
    __syncthreads();  // also for the new slot, which its warp reads like every other slot
    if (k < ring.held) {
      const float* s_k = state.history + k * all + at;
      const float* y_k = state.history + (kPairs + k) * all + at;
#pragma unroll 4
      for (int i = lane * kWide; i < size; i += kWarp * kWide) {
        const Run<kWide> s_run = load<kWide>(s_k + i), y_run = load<kWide>(y_k + i);
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
          const double fresh[3] = {s[i + w], y[i + w], g[i + w]};
          const double s_old = s_run.at[w], y_old = y_run.at[w];
#pragma unroll
          for (int f = 0; f < 3; ++f) {
            dots[f] = fma(fresh[f], s_old, dots[f]);
            dots[3 + f] = fma(fresh[f], y_old, dots[3 + f]);
          }
        }
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kDots; ++i) {
    const double total = warp_total(dots[i]);
    if (lane == 0) sums[((b * kPairs + k) * kDots + i) * gridDim.x + blockIdx.x] = total;
  }
}

// `plan_step` on the lanes of a warp.
struct WarpLanes {
  template <typename F>
  GRAMOPHONE_DEVICE void each(int n, F f) const {
    __syncwarp();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kWarp) f(i);
    __syncwarp();
  }
};

struct PlanScratch {
  double sums[kSums], products[kVectors * kVectors];
  LoopScratch loops;
};

__global__ void __launch_bounds__(kPairThreads)
    lbfgs_plan_kernel(ImageBatch images, LbfgsState state, const double* sums, int parts, StepPlan* plans) {
  const int64_t b = blockIdx.x;
  if (!images.alive[b]) return;
  auto* scratch = reinterpret_cast<PlanScratch*>(shared_memory());
  double* products = state.products + b * kVectors * kVectors;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  for (int i = thread; i < kVectors * kVectors; i += kPairThreads) scratch->products[i] = products[i];
  for (int i = thread / kWarp; i < kSums; i += kPairs) {
    double sum = 0;
    for (int part = lane; part < parts; part += kWarp) sum += sums[(b * kSums + i) * parts + part];
    sum = warp_total(sum);
    if (lane == 0) scratch->sums[i] = sum;
  }
  __syncthreads();
  if (thread < kWarp) {
    int64_t *pairs = state.seen + b, *gradients = state.seen + images.jobs + b;
    const Ring ring = ring_of(*pairs, *gradients);
    plan_step(WarpLanes{}, scratch->sums, ring, images.step[b], images.values, scratch->products,
              state.inverse + b * kPairs, state.scale + b, scratch->loops, plans[b]);
    if (lane == 0) {
      *pairs += ring.forms;
      ++*gradients;
    }
  }
  __syncthreads();
  for (int i = thread; i < kVectors * kVectors; i += kPairThreads) products[i] = scratch->products[i];
}

dim3 part_blocks(int64_t jobs, int64_t values) {
  return {static_cast<unsigned>(sum_parts(values).count), static_cast<unsigned>(jobs)};
}

template <typename Move>
void launch_step(const char* name, const ImageBatch& images, const Move& move, bool aligned, cudaStream_t stream) {
  const int64_t blocks = ceil_div(images.values, kThreads * (aligned ? 4 : 1));
  const dim3 grid(static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), static_cast<unsigned>(images.jobs));
  launch(name, aligned ? optimiser_step_kernel<4, Move> : optimiser_step_kernel<1, Move>, grid, kThreads, kTotalBytes,
         stream, images, move);
}

}  // namespace

void launch_check_finite(const float* terms, int64_t term_count, const float* grad, bool* alive, int64_t* diverged_at,
                         int64_t* count, int64_t jobs, int64_t values, bool aligned, cudaStream_t stream) {
  launch("check_finite", aligned ? check_finite_kernel<4> : check_finite_kernel<1>, part_blocks(jobs, values), kThreads,
         kTotalBytes, stream, terms, term_count, grad, alive, diverged_at, count, values, sum_parts(values).size);
}

void launch_descent(const ImageBatch& images, const float* grad, double* squares, bool aligned, cudaStream_t stream) {
  if (!squares) return launch_step("descent", images, Descent{grad}, aligned, stream);
  const SumParts parts = sum_parts(images.values);
  launch("descent_squares", aligned ? descent_squares_kernel<4> : descent_squares_kernel<1>,
         part_blocks(images.jobs, images.values), kThreads, kTotalBytes, stream, grad, images.alive, squares,
         images.values, parts.size);
  launch_step("normalised descent", images, NormalisedDescent{{grad}, squares, parts.count}, aligned, stream);
}

void launch_adam(const ImageBatch& images, float* first, float* second, const float* grad, const int64_t* count,
                 bool aligned, cudaStream_t stream) {
  launch_step("adam", images, Adam{grad, count, first, second}, aligned, stream);
}

void launch_lbfgs(const ImageBatch& images, const LbfgsState& state, const float* grad, double* sums, StepPlan* plans,
                  bool aligned, cudaStream_t stream) {
  const SumParts parts = sum_parts(images.values);
  // Two values per access: then the doubles that a warp accesses in shared memory have no bank conflicts.
  launch("lbfgs_dots", aligned ? lbfgs_dots_kernel<2> : lbfgs_dots_kernel<1>, part_blocks(images.jobs, images.values),
         kPairThreads, kFreshBytes, stream, images, state, grad, sums, parts.size);
  launch("lbfgs_plan", lbfgs_plan_kernel, dim3(static_cast<unsigned>(images.jobs)), kPairThreads, sizeof(PlanScratch),
         stream, images, state, sums, parts.count, plans);
  launch_step("lbfgs", images, Lbfgs{grad, state.history, plans, images.jobs * images.values}, aligned, stream);
}

}  // namespace gramophone
