// The mathematics of a step, of one pixel and of one job, for both devices: the kernels of cpu/ and cuda/ only bring
// values here and take them away.
//
// Every multiply-add is written as one, because compilers contract a * b + c where they see fit: so the devices agree
// to the last bit of what is computed here.
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

// A batch's pictures as all steps see them. [batch, values] each, or [batch].
struct Canvas {
  float *image, *last_good, *mean;  // mean may be null
  const float* step;
  const bool* alive;
  float average;
  int64_t batch, values;
};

// How a job's values are shared out for sums: by their number alone, so that neither batch mates nor threads nor the
// device change a result. On an H200 256 blocks fill the 132 multiprocessors twice.
constexpr int64_t kTile = 1024;
constexpr int64_t kMostParts = 256;

struct Parts {
  int64_t size;  // a multiple of kTile; the last part may be shorter
  int count;
};

inline Parts parts_of(int64_t values) {
  const int64_t tiles = (values + kTile - 1) / kTile, size = (tiles + kMostParts - 1) / kMostParts * kTile;
  return {size, static_cast<int>((values + size - 1) / size)};
}

// The tail of every step
// ------------------------------------------------------------------------------------------------------

// NaN stays NaN, so that the next evaluation sees it.
GRAMOPHONE_BOTH float clamped(float x) {
  return x < 0.0f ? 0.0f : x > 1.0f ? 1.0f : x;
}

struct Pixel {
  float image, last_good;
};

GRAMOPHONE_BOTH Pixel settled(Pixel before, float proposal, bool alive) {
  const float held = alive ? before.image : before.last_good;
  return {alive ? clamped(proposal) : held, held};
}

GRAMOPHONE_BOTH float averaged(float mean, float image, float average) {
  return fmaf(average, mean, (1.0f - average) * image);
}

GRAMOPHONE_BOTH bool finite(float x) {
  return fabsf(x) <= FLT_MAX;
}

// Gradient descent
// ----------------------------------------------------------------------------------------------------------

// Root mean square from the sum of squares; at least the smallest normal float, so that one can divide by it.
GRAMOPHONE_BOTH double root_mean(double squares, int64_t values) {
  return fmax(sqrt(fmax(squares, 0.0) / static_cast<double>(values)), static_cast<double>(FLT_MIN));
}

// Finite, because 0 times it must be 0.
GRAMOPHONE_BOTH float bounded(double x) {
  return static_cast<float>(fmin(fmax(x, -static_cast<double>(FLT_MAX)), static_cast<double>(FLT_MAX)));
}

GRAMOPHONE_BOTH float descended(float image, float grad, float rate) {
  return fmaf(-rate, grad, image);
}

// Adam (Kingma, Ba 2015, arXiv:1412.6980). Why these constants: optimisers.py.
// --------------------------------------------------------------

constexpr double kBeta1 = 0.9, kBeta2 = 0.99;
constexpr float kEpsilon = 1e-16f;

// By squaring: a dozen products, and the same result on both devices, unlike pow.
GRAMOPHONE_BOTH double power(double base, int64_t exponent) {
  double result = 1;
  for (; exponent > 0; exponent /= 2, base *= base)
    if (exponent % 2) result *= base;
  return result;
}

struct AdamRates {
  float rate, unbias;  // step / (1 - beta1^t), 1 / (1 - beta2^t)
};

GRAMOPHONE_BOTH AdamRates adam_rates(float step, int64_t count) {
  return {bounded(static_cast<double>(step) / (1 - power(kBeta1, count))), bounded(1 / (1 - power(kBeta2, count)))};
}

GRAMOPHONE_BOTH float adapted(float image, float grad, AdamRates rates, float& first, float& second) {
  first = fmaf(static_cast<float>(1 - kBeta1), grad - first, first);
  second = fmaf(static_cast<float>(1 - kBeta2), grad * grad, static_cast<float>(kBeta2) * second);
  return image - rates.rate * first / (sqrtf(second * rates.unbias) + kEpsilon);
}

// L-BFGS (Nocedal 1980) without vectors (Chen et al. 2014, "Large-scale L-BFGS using MapReduce")
// --------------------------------------
//
// A direction is a sum of the job's vectors: s and y of the last pairs and the gradient. The two loops run over the
// weights of that sum and need nothing but the products of the vectors, so the pixels are read twice whatever the
// number of pairs: once for the products with the new vectors, once for the sum. Products are float64: those of two
// floats are then exact and never overflow, and the direction's length can be told from them in spite of cancellation.

constexpr int kPairs = 10;                // optimisers.LBFGS.PAIRS
constexpr int kGrad = 2 * kPairs;         // the vectors: s of slot 0, 1, .., y of slot 0, 1, .., the gradient
constexpr int kVectors = kGrad + 1;       //
constexpr double kLeastCurvature = 1e-6;  // optimisers.LBFGS.LEAST_CURVATURE

// Sums over pixels per slot k: s.s_k, y.s_k, g.s_k, s.y_k, y.y_k, g.y_k with the new s, y and g, and a share of g.g.
constexpr int kDots = 7;
constexpr int kSums = kPairs * kDots;

// A batch's memory; see `lbfgs_` in ops.py.
struct Memory {
  float* history;    // [2, kPairs, batch, values]
  float* before;     // [batch, values]
  double* products;  // [batch, kVectors, kVectors]
  double* inverse;   // [batch, kPairs]
  double* scale;     // [batch]
  int64_t* seen;     // [2, batch]
};

// Where a job stands before it has taken in the present gradient.
struct Ring {
  bool forms;  // a pair with the gradient before: not of the first one
  int newest;  // its slot
  int held;    // slots in use, with that one
};

GRAMOPHONE_BOTH Ring ring_of(int64_t pairs, int64_t gradients) {
  const bool forms = gradients > 0;
  const int64_t held = pairs + (forms ? 1 : 0);
  return {forms, static_cast<int>(pairs % kPairs), static_cast<int>(held < kPairs ? held : kPairs)};
}

// A step as a sum: image + weight[0] * vector[0] + ..
struct Plan {
  int count;
  int vector[kVectors];
  float weight[kVectors];
};

struct Loops {
  double weight[kVectors], along[kVectors], alpha[kPairs];  // along: each vector's product with the sum of all so far
};

// One thread does it all; on a GPU the lanes of a warp share it.
struct OneLane {
  template <typename F>
  GRAMOPHONE_BOTH void each(int n, F f) const {
    for (int i = 0; i < n; ++i) f(i);
  }
};

// Takes in what a job's new gradient gave, `sums` [kPairs, kDots], and plans its step. `products`, `inverse` and
// `scale` are the job's. All lanes call it; `each` shares out a loop and waits before and after.
template <typename Lanes>
GRAMOPHONE_BOTH void plan_step(const Lanes& lanes, const double* sums, Ring ring, float step, int64_t values,
                               double* products, double* inverse, double* scale, Loops& loops, Plan& plan) {
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
    const bool good = sy > kLeastCurvature * sqrt(ss * yy);
    inverse[newest] = good ? 1 / sy : 0;
    if (good) *scale = sy / yy;
  });

  // The slot of the pair of an age; without a new pair the newest is the one before.
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
    const double longest = static_cast<double>(step) / root_mean(square, values);
    // Without any curvature known the direction is the bare gradient, whose length means nothing.
    const double rate = *scale > 0 ? fmin(longest, 1.0) : longest;
    plan.count = 0;
    for (int j = 0; j < kVectors; ++j) {
      if (loops.weight[j] == 0) continue;
      plan.vector[plan.count] = j;
      plan.weight[plan.count] = bounded(-rate * loops.weight[j]);
      ++plan.count;
    }
  });
}

}  // namespace gramophone
