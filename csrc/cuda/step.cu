// What follows an evaluation: one launch each for check_finite_, descent_ and adam_, two for normalised descent, three
// for L-BFGS. The mathematics: ../step.h.
//
// All of it is bound by memory. Sums are made per part of a job and then over the parts, both in a fixed order, and
// nothing depends on which block comes first; what must begin at zero is written or put back by the kernels themselves,
// so a captured graph can be replayed as it is.
#include "device.cuh"
#include "step_kernels.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 1024;  // per job: with 8 of them on each of an H200's 132 multiprocessors, one round

// Neighbours that one thread reads or writes at once.
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

// The sum over the block's kThreads threads, for all of them. Dynamic shared memory must hold kThreads / 32 doubles.
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

// Judgement
// ---------

// While the kernel runs, the upper half of a job's count is the number of parts that have arrived and, above that, of
// those that met a value that is not finite. The last to arrive decides and leaves the new count alone in its place.
constexpr int kArrivedAt = 32, kBadAt = 48;

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
    for (int w = 0; w < kWide; ++w) good &= finite(run.at[w]);
  }
  if (blockIdx.x == 0)
    for (int64_t t = threadIdx.x; t < term_count; t += kThreads) good &= finite(terms[t * gridDim.y + b]);

  auto* bad = reinterpret_cast<int*>(shared_memory());  // one per warp
  const int any = __any_sync(kAllLanes, !good);
  if (threadIdx.x % kWarp == 0) bad[threadIdx.x / kWarp] = any;
  __syncthreads();
  if (threadIdx.x != 0) return;
  unsigned long long mine = 1ull << kArrivedAt;
  for (int i = 0; i < kThreads / kWarp; ++i)
    if (bad[i]) mine |= 1ull << kBadAt;
  auto* job_count = reinterpret_cast<unsigned long long*>(count + b);
  const unsigned long long all = atomicAdd(job_count, mine) + mine;
  if ((all >> kArrivedAt & 0xffff) != gridDim.x) return;
  const unsigned long long now = (all & 0xffffffff) + 1;
  *job_count = now;
  if (alive[b] && all >> kBadAt) {
    alive[b] = false;
    diverged_at[b] = static_cast<int64_t>(now);
  }
}

// Steps
// -----
//
// A move is what an optimiser does with a run of values: `job(canvas, b)` once per thread, called by whole blocks of a
// living job, then `propose(job, at, image)` with `at` counted over the batch.

struct Plain {
  const float* grad;
  using Job = float;  // the rate

  GRAMOPHONE_DEVICE Job job(const Canvas& canvas, int64_t b) const { return canvas.step[b]; }

  template <int kWide>
  GRAMOPHONE_DEVICE Run<kWide> propose(Job rate, int64_t at, Run<kWide> image) const {
    const Run<kWide> g = load<kWide>(grad + at);
#pragma unroll
    for (int w = 0; w < kWide; ++w) image.at[w] = descended(image.at[w], g.at[w], rate);
    return image;
  }
};

struct Normalised : Plain {
  const double* squares;
  int parts;

  GRAMOPHONE_DEVICE Job job(const Canvas& canvas, int64_t b) const {
    static_assert(kMostParts <= kThreads, "a thread takes one part");
    const int part = static_cast<int>(threadIdx.x);
    const double sum = block_total(part < parts ? squares[b * parts + part] : 0.0);
    return bounded(canvas.step[b] / root_mean(sum, canvas.values));
  }
};

struct Adaptive {
  const float* grad;
  const int64_t* count;
  float *first, *second;
  using Job = AdamRates;

  // One thread works the powers out: a multiprocessor of a small GPU makes two float64 products at a time.
  GRAMOPHONE_DEVICE Job job(const Canvas& canvas, int64_t b) const {
    auto* rates = reinterpret_cast<AdamRates*>(shared_memory());
    if (threadIdx.x == 0) *rates = adam_rates(canvas.step[b], count[b]);
    __syncthreads();
    return *rates;
  }

  template <int kWide>
  GRAMOPHONE_DEVICE Run<kWide> propose(Job rates, int64_t at, Run<kWide> image) const {
    const Run<kWide> g = load<kWide>(grad + at);
    Run<kWide> m = load<kWide>(first + at), v = load<kWide>(second + at);
#pragma unroll
    for (int w = 0; w < kWide; ++w) image.at[w] = adapted(image.at[w], g.at[w], rates, m.at[w], v.at[w]);
    store(m, first + at);
    store(v, second + at);
    return image;
  }
};

struct Planned {
  const float* grad;
  const float* history;
  const Plan* plans;
  int64_t all;  // values of the batch
  using Job = const Plan*;

  GRAMOPHONE_DEVICE Job job(const Canvas&, int64_t b) const { return plans + b; }

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
__global__ void __launch_bounds__(kThreads) step_kernel(Canvas canvas, Move move) {
  const int64_t b = blockIdx.y, start = b * canvas.values;
  const bool alive = canvas.alive[b];
  typename Move::Job job{};
  if (alive) job = move.job(canvas, b);  // of one that is not, no gradient is touched: it may be NaN
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kWide;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kWide; i < canvas.values;
       i += stride) {
    const int64_t at = start + i;
    Run<kWide> image = load<kWide>(canvas.image + at), last_good = image, proposal = image;
    if (alive) {
      proposal = move.propose(job, at, image);
    } else {
      last_good = load<kWide>(canvas.last_good + at);
    }
#pragma unroll
    for (int w = 0; w < kWide; ++w) {
      const Pixel now = settled({image.at[w], last_good.at[w]}, proposal.at[w], alive);
      image.at[w] = now.image;
      last_good.at[w] = now.last_good;
    }
    store(image, canvas.image + at);
    if (alive) store(last_good, canvas.last_good + at);
    if (canvas.mean) {
      Run<kWide> mean = load<kWide>(canvas.mean + at);
#pragma unroll
      for (int w = 0; w < kWide; ++w) mean.at[w] = averaged(mean.at[w], image.at[w], canvas.average);
      store(mean, canvas.mean + at);
    }
  }
}

template <int kWide>
__global__ void __launch_bounds__(kThreads)
    squares_kernel(const float* grad, const bool* alive, double* squares, int64_t values, int64_t part_size) {
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
// ------

constexpr int kPairThreads = kPairs * kWarp;  // a warp per pair
constexpr size_t kFreshBytes = 3 * kTile * sizeof(double);

// Forms the new pair, writes it to its slot, and multiplies it and the gradient with all of the history. A tile of s, y
// and g lies in shared memory, already as doubles: converting them per pair would take as long as the memory does.
template <int kWide>
__global__ void __launch_bounds__(kPairThreads, 2)
    dots_kernel(Canvas canvas, Memory memory, const float* grad, double* sums, int64_t part_size) {
  const int64_t b = blockIdx.y, all = canvas.batch * canvas.values;
  if (!canvas.alive[b]) return;
  const Ring ring = ring_of(memory.seen[b], memory.seen[canvas.batch + b]);
  const int k = static_cast<int>(threadIdx.x) / kWarp, lane = static_cast<int>(threadIdx.x) % kWarp;
  const int64_t first = blockIdx.x * part_size;
  const int64_t last = first + part_size < canvas.values ? first + part_size : canvas.values;
  auto* s = reinterpret_cast<double*>(shared_memory());
  double *y = s + kTile, *g = y + kTile;
  double dots[kDots] = {};
  for (int64_t tile = first; tile < last; tile += kTile) {
    const int64_t at = b * canvas.values + tile;
    const int size = static_cast<int>(last - tile < kTile ? last - tile : kTile);
    for (int i = static_cast<int>(threadIdx.x) * kWide; i < size; i += kPairThreads * kWide) {
      const Run<kWide> now = load<kWide>(grad + at + i);
      Run<kWide> ds = {}, dy = {};
      if (ring.forms) {
        const Run<kWide> image = load<kWide>(canvas.image + at + i), from = load<kWide>(canvas.last_good + at + i);
        const Run<kWide> before = load<kWide>(memory.before + at + i);
#pragma unroll
        for (int w = 0; w < kWide; ++w) {
          ds.at[w] = image.at[w] - from.at[w];
          dy.at[w] = now.at[w] - before.at[w];
        }
        store(ds, memory.history + ring.newest * all + at + i);
        store(dy, memory.history + (kPairs + ring.newest) * all + at + i);
      }
      store(now, memory.before + at + i);
#pragma unroll
      for (int w = 0; w < kWide; ++w) {
        s[i + w] = ds.at[w];
        y[i + w] = dy.at[w];
        const double x = now.at[w];
        g[i + w] = x;
        dots[6] = fma(x, x, dots[6]);
      }
    }
    __syncthreads();  // of the new slot too: its warp reads it as any other
    if (k < ring.held) {
      const float* s_k = memory.history + k * all + at;
      const float* y_k = memory.history + (kPairs + k) * all + at;
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

// A warp's lanes for `plan_step`.
struct WarpLanes {
  template <typename F>
  GRAMOPHONE_DEVICE void each(int n, F f) const {
    __syncwarp();
    for (int i = static_cast<int>(threadIdx.x); i < n; i += kWarp) f(i);
    __syncwarp();
  }
};

struct Desk {
  double sums[kSums], products[kVectors * kVectors];
  Loops loops;
};

__global__ void __launch_bounds__(kPairThreads)
    plan_kernel(Canvas canvas, Memory memory, const double* sums, int parts, Plan* plans) {
  const int64_t b = blockIdx.x;
  if (!canvas.alive[b]) return;
  auto* desk = reinterpret_cast<Desk*>(shared_memory());
  double* products = memory.products + b * kVectors * kVectors;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
  for (int i = thread; i < kVectors * kVectors; i += kPairThreads) desk->products[i] = products[i];
  for (int i = thread / kWarp; i < kSums; i += kPairs) {
    double sum = 0;
    for (int part = lane; part < parts; part += kWarp) sum += sums[(b * kSums + i) * parts + part];
    sum = warp_total(sum);
    if (lane == 0) desk->sums[i] = sum;
  }
  __syncthreads();
  if (thread < kWarp) {
    int64_t *pairs = memory.seen + b, *gradients = memory.seen + canvas.batch + b;
    const Ring ring = ring_of(*pairs, *gradients);
    plan_step(WarpLanes{}, desk->sums, ring, canvas.step[b], canvas.values, desk->products, memory.inverse + b * kPairs,
              memory.scale + b, desk->loops, plans[b]);
    if (lane == 0) {
      *pairs += ring.forms;
      ++*gradients;
    }
  }
  __syncthreads();
  for (int i = thread; i < kVectors * kVectors; i += kPairThreads) products[i] = desk->products[i];
}

dim3 part_blocks(int64_t batch, int64_t values) {
  return {static_cast<unsigned>(parts_of(values).count), static_cast<unsigned>(batch)};
}

template <typename Move>
void launch_step(const char* name, const Canvas& canvas, const Move& move, bool aligned, cudaStream_t stream) {
  const int64_t blocks = ceil_div(canvas.values, kThreads * (aligned ? 4 : 1));
  const dim3 grid(static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks),
                  static_cast<unsigned>(canvas.batch));
  launch(name, aligned ? step_kernel<4, Move> : step_kernel<1, Move>, grid, kThreads, kTotalBytes, stream, canvas,
         move);
}

}  // namespace

void launch_check_finite(const float* terms, int64_t term_count, const float* grad, bool* alive, int64_t* diverged_at,
                         int64_t* count, int64_t batch, int64_t values, bool aligned, cudaStream_t stream) {
  launch("check_finite_", aligned ? check_finite_kernel<4> : check_finite_kernel<1>, part_blocks(batch, values),
         kThreads, kTotalBytes, stream, terms, term_count, grad, alive, diverged_at, count, values,
         parts_of(values).size);
}

void launch_descent(const Canvas& canvas, const float* grad, double* squares, bool aligned, cudaStream_t stream) {
  if (!squares) return launch_step("descent", canvas, Plain{grad}, aligned, stream);
  const Parts parts = parts_of(canvas.values);
  launch("squares", aligned ? squares_kernel<4> : squares_kernel<1>, part_blocks(canvas.batch, canvas.values), kThreads,
         kTotalBytes, stream, grad, canvas.alive, squares, canvas.values, parts.size);
  launch_step("normalised descent", canvas, Normalised{{grad}, squares, parts.count}, aligned, stream);
}

void launch_adam(const Canvas& canvas, float* first, float* second, const float* grad, const int64_t* count,
                 bool aligned, cudaStream_t stream) {
  launch_step("adam", canvas, Adaptive{grad, count, first, second}, aligned, stream);
}

void launch_lbfgs(const Canvas& canvas, const Memory& memory, const float* grad, double* sums, Plan* plans,
                  bool aligned, cudaStream_t stream) {
  const Parts parts = parts_of(canvas.values);
  // Two values at a time: of a warp's doubles in shared memory no two then lie in one bank.
  launch("lbfgs dots", aligned ? dots_kernel<2> : dots_kernel<1>, part_blocks(canvas.batch, canvas.values),
         kPairThreads, kFreshBytes, stream, canvas, memory, grad, sums, parts.size);
  launch("lbfgs plan", plan_kernel, dim3(static_cast<unsigned>(canvas.batch)), kPairThreads, sizeof(Desk), stream,
         canvas, memory, sums, parts.count, plans);
  launch_step("lbfgs", canvas, Planned{grad, memory.history, plans, canvas.batch * canvas.values}, aligned, stream);
}

}  // namespace gramophone
