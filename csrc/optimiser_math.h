// The arithmetic of check_finite_, descent_, adam_ and lbfgs_, per pixel and per job, for both devices. The kernels in
// cpu/optimisers.cpp and cuda/optimisers/optimisers.cu load values, call these functions and store the results.
//
// Every multiply-add is an explicit fma, because compilers may or may not contract a * b + c. So both devices compute
// the same bits.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GRAMOPHONE_BOTH __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define GRAMOPHONE_BOTH inline __attribute__((always_inline))
#else
#define GRAMOPHONE_BOTH inline
#endif

namespace gramophone {

// The images that an optimiser works on, and the per-job arguments that all optimisers share.
struct ImageBatch {
  float *image, *last_good, *mean;  // [jobs, values]; mean may be null
  const float* step;                // [jobs]
  const bool* alive;                // [jobs]
  float average;                    // weight of the previous mean in the running mean, 0 to 1
  int64_t jobs, values;             // values: float32 values per image, 3 * height * width
};

// How the values of a job are divided for sums. The division depends on the number of values alone, so that other jobs
// of the batch, the number of threads and the device do not change a result. On an H200 256 blocks fill the 132
// multiprocessors twice.
constexpr int64_t kTileValues = 1024;
constexpr int64_t kMaxParts = 256;

struct SumParts {
  int64_t size;  // values per part, a multiple of kTileValues; the last part may be shorter
  int count;
};

inline SumParts sum_parts(int64_t values) {
  const int64_t tiles = (values + kTileValues - 1) / kTileValues;
  const int64_t size = (tiles + kMaxParts - 1) / kMaxParts * kTileValues;
  return {size, static_cast<int>((values + size - 1) / size)};
}

// The end of every step: clamp, remember the last good image, update the running mean

// Clamps to [0, 1]. NaN stays NaN, so that the next evaluation detects it.
GRAMOPHONE_BOTH float clamp_to_unit(float x) {
  return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x;
}

struct Pixel {
  float image, last_good;
};

// The new image and last good image. A live job takes the proposal and keeps its current image as the last good one; a
// job that has diverged returns to its last good image.
GRAMOPHONE_BOTH Pixel apply_proposal(Pixel before, float proposal, bool alive) {
  const float held = alive ? before.image : before.last_good;
  return {alive ? clamp_to_unit(proposal) : held, held};
}

GRAMOPHONE_BOTH float running_mean(float mean, float image, float average) {
  return fmaf(average, mean, (1.0f - average) * image);
}

GRAMOPHONE_BOTH bool is_finite(float x) {
  return fabsf(x) <= FLT_MAX;
}

// Gradient descent

// Root mean square from the sum of squares. It is at least the smallest normal float, so that it can be a divisor.
GRAMOPHONE_BOTH double root_mean_square(double squares, int64_t values) {
  return fmax(sqrt(fmax(squares, 0.0) / static_cast<double>(values)), static_cast<double>(FLT_MIN));
}

// x as a float, limited to the finite range, so that 0 times the result is 0.
GRAMOPHONE_BOTH float to_finite_float(double x) {
  return static_cast<float>(fmin(fmax(x, -static_cast<double>(FLT_MAX)), static_cast<double>(FLT_MAX)));
}

GRAMOPHONE_BOTH float descent_proposal(float image, float grad, float rate) {
  return fmaf(-rate, grad, image);
}

// Adam (Kingma, Ba 2015, arXiv:1412.6980). The reasons for the constants: server/gramophone_server/engine/optimisers.py

constexpr double kBeta1 = 0.9, kBeta2 = 0.99;
constexpr float kEpsilon = 1e-16f;

// base^exponent by repeated squaring: a dozen products, and unlike pow the same result on both devices.
GRAMOPHONE_BOTH double integer_power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2) result *= base;
  return result;
}

struct AdamRates {
  float rate, unbias;  // step / (1 - beta1^t), 1 / (1 - beta2^t)
};

GRAMOPHONE_BOTH AdamRates adam_rates(float step, int64_t count) {
  return {to_finite_float(static_cast<double>(step) / (1 - integer_power(kBeta1, count))),
          to_finite_float(1 / (1 - integer_power(kBeta2, count)))};
}

// The proposal for one pixel; updates its moments `first` and `second`.
GRAMOPHONE_BOTH float adam_proposal(float image, float grad, AdamRates rates, float& first, float& second) {
  first = fmaf(static_cast<float>(1 - kBeta1), grad - first, first);
  second = fmaf(static_cast<float>(1 - kBeta2), grad * grad, static_cast<float>(kBeta2) * second);
  return image - rates.rate * first / (sqrtf(second * rates.unbias) + kEpsilon);
}

// L-BFGS (Nocedal 1980) in its vector-free form (Chen et al. 2014, "Large-scale L-BFGS using MapReduce")
//
// A direction is a weighted sum of the job's vectors: s and y of the last pairs, and the gradient. The two loops of the
// recursion run over the weights of that sum and need only the inner products of the vectors. So the pixels are read
// twice, whatever the number of pairs: once for the inner products with the new vectors, once for the sum. Products are
// float64: the product of two floats is then exact and cannot overflow, and the length of the direction can be computed
// from the inner products in spite of cancellation.

constexpr int kPairs = 10;  // optimisers.LBFGS.PAIRS
// The vectors in their order: s of slot 0, 1, .., y of slot 0, 1, .., the gradient.
constexpr int kGrad = 2 * kPairs;
constexpr int kVectors = kGrad + 1;
constexpr double kMinCurvature = 1e-6;  // optimisers.LBFGS.MIN_CURVATURE

// Sums over pixels per slot k: s.s_k, y.s_k, g.s_k, s.y_k, y.y_k, g.y_k with the new s, y and g, and a part of g.g.
constexpr int kDots = 7;
constexpr int kSums = kPairs * kDots;

// The state of a batch between steps; see `lbfgs_` in server/gramophone_server/ops/functional.py.
struct LbfgsState {
  float* history;    // [2, kPairs, jobs, values]
  float* before;     // [jobs, values]
  double* products;  // [jobs, kVectors, kVectors]
  double* inverse;   // [jobs, kPairs]
  double* scale;     // [jobs]
  int64_t* seen;     // [2, jobs]
};

// A job's ring of pair slots before the current gradient is added.
struct Ring {
  bool forms;  // the current gradient forms a pair with the previous one: false for the first gradient
  int newest;  // slot of the new pair
  int held;    // slots in use, including the new pair's
};

GRAMOPHONE_BOTH Ring ring_of(int64_t pairs, int64_t gradients) {
  const bool forms = gradients > 0;
  const int64_t held = pairs + (forms ? 1 : 0);
  return {forms, static_cast<int>(pairs % kPairs), static_cast<int>(held < kPairs ? held : kPairs)};
}

// A step as a sum: image + weight[0] * vector[0] + ..
struct StepPlan {
  int count;
  int vector[kVectors];
  float weight[kVectors];
};

// Scratch of the two loops.
struct LoopScratch {
  double weight[kVectors];  // of each vector in the direction
  double along[kVectors];   // inner product of each vector with the direction so far
  double alpha[kPairs];
};

// `plan_step` on one thread. On a GPU the lanes of a warp share the work (WarpLanes in cuda/optimisers/optimisers.cu).
struct OneLane {
  template <typename F>
  GRAMOPHONE_BOTH void each(int n, F f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
};

// Updates a job's state with `sums` [kPairs, kDots] of its new gradient and plans its step. `products`, `inverse` and
// `scale` are the job's. All lanes call it; `each` distributes a loop over the lanes and synchronises them before and
// after.
template <typename Lanes>
GRAMOPHONE_BOTH void plan_step(const Lanes& lanes, const double* sums, Ring ring, float step, int64_t values,
                               double* products, double* inverse, double* scale, LoopScratch& loops, StepPlan& plan) {
  const int newest = ring.newest;
  lanes.each(kPairs, [&](int k) {
    const auto put = [&](int a, int b, double product) {
      products[a * kVectors + b] = product;
      products[b * kVectors + a] = product;
    };
    const double* dots = sums + k * kDots;
    if (ring.forms) {
      put(newest, k, dots[0]);
      put(kPairs + newest, k, dots[1]);
      put(newest, kPairs + k, dots[3]);
      put(kPairs + newest, kPairs + k, dots[4]);
    }
    put(kGrad, k, dots[2]);
    put(kGrad, kPairs + k, dots[5]);
  });
  lanes.each(1, [&](int) {
    double square = 0;
    for (int k = 0; k < kPairs; ++k) square += sums[k * kDots + 6];
    products[kGrad * kVectors + kGrad] = square;
    if (!ring.forms) return;
    const double ss = products[newest * kVectors + newest], sy = products[newest * kVectors + kPairs + newest];
    const double yy = products[(kPairs + newest) * kVectors + kPairs + newest];
    const bool good = sy > kMinCurvature * sqrt(ss * yy);
    inverse[newest] = good ? 1 / sy : 0;
    if (good) *scale = sy / yy;
  });

  // The slot of the pair of an age, 0 for the newest. Without a new pair the newest pair is in the slot before.
  const auto slot = [&](int age) { return (newest + (ring.forms ? 0 : kPairs - 1) + kPairs - age) % kPairs; };
  const auto add = [&](int vector, double weight) {
    lanes.each(kVectors, [&](int j) {
      loops.along[j] = fma(weight, products[j * kVectors + vector], loops.along[j]);
      if (j == vector) loops.weight[j] = weight;
    });
  };
  lanes.each(kVectors, [&](int j) {
    loops.weight[j] = j == kGrad ? 1 : 0;
    loops.along[j] = products[j * kVectors + kGrad];
  });
  for (int age = 0; age < ring.held; ++age) {
    const int k = slot(age);
    if (!(inverse[k] > 0)) continue;
    const double alpha = inverse[k] * loops.along[k];
    lanes.each(1, [&](int) { loops.alpha[k] = alpha; });
    add(kPairs + k, -alpha);
  }
  const double stretch = *scale > 0 ? *scale : 1;
  lanes.each(kVectors, [&](int j) {
    loops.weight[j] *= stretch;
    loops.along[j] *= stretch;
  });
  for (int age = ring.held - 1; age >= 0; --age) {
    const int k = slot(age);
    if (!(inverse[k] > 0)) continue;
    add(k, loops.alpha[k] - inverse[k] * loops.along[kPairs + k]);
  }

  lanes.each(1, [&](int) {
    double square = 0;
    for (int j = 0; j < kVectors; ++j)
      if (loops.weight[j] != 0) square = fma(loops.weight[j], loops.along[j], square);
    const double longest = static_cast<double>(step) / root_mean_square(square, values);
    // Without a known curvature the direction is the plain gradient, whose length has no meaning.
    const double rate = *scale > 0 ? fmin(longest, 1.0) : longest;
    plan.count = 0;
    for (int j = 0; j < kVectors; ++j) {
      if (loops.weight[j] == 0) continue;
      plan.vector[plan.count] = j;
      plan.weight[plan.count] = to_finite_float(-rate * loops.weight[j]);
      ++plan.count;
    }
  });
}

}  // namespace gramophone
