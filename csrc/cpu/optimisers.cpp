// check_finite_, descent_, adam_, lbfgs_: the in-place update of the images after an evaluation.
//
// A step processes its images tile by tile. The optimiser's formula writes a tile of proposals, 4 KB in the L1 cache,
// and one loop that all optimisers share applies them.
#include "checks/optimisers.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "cpu/vectorise.h"
#include "image_batch.h"
#include "optimiser_math.h"

namespace gramophone {
namespace {

GRAMOPHONE_VECTORISED bool all_finite(const float* x, int64_t n) {
  int not_finite = 0;
  for (int64_t i = 0; i < n; ++i) not_finite |= is_finite(x[i]) ? 0 : 1;
  return !not_finite;
}

GRAMOPHONE_VECTORISED double sum_of_squares(const float* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

GRAMOPHONE_VECTORISED void apply_proposals(const float* proposal, bool alive, float average, float* image,
                                           float* last_good, float* mean, int64_t n) {
  if (alive) {
    for (int64_t i = 0; i < n; ++i) {
      const Pixel now = apply_proposal({image[i], last_good[i]}, proposal[i], true);
      image[i] = now.image;
      last_good[i] = now.last_good;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) image[i] = last_good[i];
  }
  if (!mean) return;
  for (int64_t i = 0; i < n; ++i) mean[i] = running_mean(mean[i], image[i], average);
}

GRAMOPHONE_VECTORISED void propose_descent(const float* image, const float* grad, float rate, float* proposal,
                                           int64_t n) {
  for (int64_t i = 0; i < n; ++i) proposal[i] = descent_proposal(image[i], grad[i], rate);
}

// Vector code only with -fno-math-errno, with which torch itself is compiled: otherwise sqrtf may have to set errno.
GRAMOPHONE_VECTORISED void propose_adam(const float* image, const float* grad, AdamRates rates, float* first,
                                        float* second, float* proposal, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) proposal[i] = adam_proposal(image[i], grad[i], rates, first[i], second[i]);
}

// Forms the new pair of a tile and stores it and the gradient: as floats in the state, as doubles in s, y and g for the
// inner products. s_slot and y_slot are null if there is no pair.
GRAMOPHONE_VECTORISED void form_pair(const float* image, const float* last_good, const float* grad, float* before,
                                     float* s_slot, float* y_slot, double* s, double* y, double* g, int64_t n) {
  if (s_slot) {
    for (int64_t i = 0; i < n; ++i) {
      s[i] = s_slot[i] = image[i] - last_good[i];
      y[i] = y_slot[i] = grad[i] - before[i];
    }
  } else {
    std::fill(s, s + n, 0.0);
    std::fill(y, y + n, 0.0);
  }
  for (int64_t i = 0; i < n; ++i) g[i] = before[i] = grad[i];
}

GRAMOPHONE_VECTORISED void add_dots(const float* s_k, const float* y_k, const double* s, const double* y,
                                    const double* g, double* dots, int64_t n) {
  double ss = 0, ys = 0, gs = 0, sy = 0, yy = 0, gy = 0;
#pragma omp simd reduction(+ : ss, ys, gs, sy, yy, gy)
  for (int64_t i = 0; i < n; ++i) {
    const double a = s_k[i], b = y_k[i];
    ss += s[i] * a;
    ys += y[i] * a;
    gs += g[i] * a;
    sy += s[i] * b;
    yy += y[i] * b;
    gy += g[i] * b;
  }
  dots[0] += ss;
  dots[1] += ys;
  dots[2] += gs;
  dots[3] += sy;
  dots[4] += yy;
  dots[5] += gy;
}

GRAMOPHONE_VECTORISED void add_scaled(const float* x, float weight, float* sum, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sum[i] = fmaf(weight, x[i], sum[i]);
}

// Calls f(job, part, first value, one past the last value) for every part of every job, in parallel.
template <typename F>
void for_parts(int64_t batch, int64_t values, const F& f) {
  const SumParts parts = sum_parts(values);
  at::parallel_for(0, batch * parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % parts.count * parts.size;
      f(unit / parts.count, unit % parts.count, first, std::min(first + parts.size, values));
    }
  });
}

// Steps the batch: propose(job, offset in the batch, number of values, proposals) fills a tile of a live job's
// proposals.
template <typename F>
void step_images(const ImageBatch& images, const F& propose) {
  for_parts(images.jobs, images.values, [&](int64_t b, int64_t, int64_t first, int64_t last) {
    float proposal[kTileValues];
    for (int64_t i = first; i < last; i += kTileValues) {
      const int64_t at = b * images.values + i, n = std::min(kTileValues, last - i);
      if (images.alive[b]) propose(b, at, n, proposal);
      apply_proposals(proposal, images.alive[b], images.average, images.image + at, images.last_good + at,
                      images.mean ? images.mean + at : nullptr, n);
    }
  });
}

void check_finite_(const at::Tensor& terms, const at::Tensor& grad, const at::Tensor& alive,
                   const at::Tensor& diverged_at, const at::Tensor& count) {
  check_finite_arguments("check_finite_", terms, grad, alive, diverged_at, count);
  const int64_t batch = grad.size(0), values = grad.numel() / batch, parts = sum_parts(values).count;
  const float *g = grad.const_data_ptr<float>(), *t = terms.const_data_ptr<float>();
  std::vector<char> good(batch * parts);
  for_parts(batch, values, [&](int64_t b, int64_t part, int64_t first, int64_t last) {
    good[b * parts + part] = all_finite(g + b * values + first, last - first);
  });
  bool* living = alive.mutable_data_ptr<bool>();
  for (int64_t b = 0; b < batch; ++b) {
    const auto* flags = good.data() + b * parts;
    bool fine = std::all_of(flags, flags + parts, [](char flag) { return flag; });
    for (int64_t term = 0; term < terms.size(0); ++term) fine &= is_finite(t[term * batch + b]);
    const int64_t now = ++count.mutable_data_ptr<int64_t>()[b];
    if (living[b] && !fine) {
      living[b] = false;
      diverged_at.mutable_data_ptr<int64_t>()[b] = now;
    }
  }
}

void descent_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
              const at::Tensor& grad, const at::Tensor& step, const at::Tensor& alive, double average,
              bool normalised) {
  check_step("descent_", image, last_good, mean, grad, step, alive);
  const ImageBatch images = image_batch(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  std::vector<float> rates(images.step, images.step + images.jobs);
  if (normalised) {
    const int64_t parts = sum_parts(images.values).count;
    std::vector<double> squares(images.jobs * parts);
    for_parts(images.jobs, images.values, [&](int64_t b, int64_t part, int64_t first, int64_t last) {
      squares[b * parts + part] = sum_of_squares(g + b * images.values + first, last - first);
    });
    for (int64_t b = 0; b < images.jobs; ++b) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += squares[b * parts + part];
      rates[b] = to_finite_float(images.step[b] / root_mean_square(sum, images.values));
    }
  }
  step_images(images, [&](int64_t b, int64_t at, int64_t n, float* proposal) {
    propose_descent(images.image + at, g + at, rates[b], proposal, n);
  });
}

void adam_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
           const at::Tensor& first, const at::Tensor& second, const at::Tensor& grad, const at::Tensor& step,
           const at::Tensor& count, const at::Tensor& alive, double average) {
  check_step("adam_", image, last_good, mean, grad, step, alive);
  check_adam(image, first, second, count);
  const ImageBatch images = image_batch(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  const int64_t* seen = count.const_data_ptr<int64_t>();
  float *m = first.mutable_data_ptr<float>(), *v = second.mutable_data_ptr<float>();
  step_images(images, [&](int64_t b, int64_t at, int64_t n, float* proposal) {
    propose_adam(images.image + at, g + at, adam_rates(images.step[b], seen[b]), m + at, v + at, proposal, n);
  });
}

void lbfgs_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
            const at::Tensor& history, const at::Tensor& before, const at::Tensor& products, const at::Tensor& inverse,
            const at::Tensor& scale, const at::Tensor& seen, const at::Tensor& grad, const at::Tensor& step,
            const at::Tensor& alive, double average) {
  check_step("lbfgs_", image, last_good, mean, grad, step, alive);
  check_lbfgs(image, history, before, products, inverse, scale, seen, kPairs);
  const ImageBatch images = image_batch(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  float *vectors = history.mutable_data_ptr<float>(), *g_before = before.mutable_data_ptr<float>();
  int64_t *pairs = seen.mutable_data_ptr<int64_t>(), *gradients = pairs + images.jobs;
  const int64_t parts = sum_parts(images.values).count, all = images.jobs * images.values;

  std::vector<double> sums(images.jobs * parts * kSums);
  for_parts(images.jobs, images.values, [&](int64_t b, int64_t part, int64_t first, int64_t last) {
    if (!images.alive[b]) return;
    const Ring ring = ring_of(pairs[b], gradients[b]);
    double s[kTileValues], y[kTileValues], grad_now[kTileValues];
    double* dots = sums.data() + (b * parts + part) * kSums;
    for (int64_t i = first; i < last; i += kTileValues) {
      const int64_t at = b * images.values + i, n = std::min(kTileValues, last - i);
      float* slot = ring.forms ? vectors + ring.newest * all + at : nullptr;
      form_pair(images.image + at, images.last_good + at, g + at, g_before + at, slot,
                slot ? slot + kPairs * all : nullptr, s, y, grad_now, n);
      dots[6] += sum_of_squares(g + at, n);
      for (int k = 0; k < ring.held; ++k)
        add_dots(vectors + k * all + at, vectors + (kPairs + k) * all + at, s, y, grad_now, dots + k * kDots, n);
    }
  });

  std::vector<StepPlan> plans(images.jobs);
  for (int64_t b = 0; b < images.jobs; ++b) {
    if (!images.alive[b]) continue;
    double total[kSums] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int i = 0; i < kSums; ++i) total[i] += sums[(b * parts + part) * kSums + i];
    const Ring ring = ring_of(pairs[b], gradients[b]);
    LoopScratch loops;
    plan_step(OneLane{}, total, ring, images.step[b], images.values,
              products.mutable_data_ptr<double>() + b * kVectors * kVectors,
              inverse.mutable_data_ptr<double>() + b * kPairs, scale.mutable_data_ptr<double>() + b, loops, plans[b]);
    pairs[b] += ring.forms;
    ++gradients[b];
  }

  step_images(images, [&](int64_t b, int64_t at, int64_t n, float* proposal) {
    const StepPlan& plan = plans[b];
    std::fill(proposal, proposal + n, 0.0f);
    for (int i = 0; i < plan.count; ++i)
      add_scaled(plan.vector[i] == kGrad ? g + at : vectors + plan.vector[i] * all + at, plan.weight[i], proposal, n);
    add_scaled(images.image + at, 1.0f, proposal, n);
  });
}

}  // namespace
}  // namespace gramophone

TORCH_LIBRARY_IMPL(gramophone, CPU, m) {
  m.impl("check_finite_", &gramophone::check_finite_);
  m.impl("descent_", &gramophone::descent_);
  m.impl("adam_", &gramophone::adam_);
  m.impl("lbfgs_", &gramophone::lbfgs_);
}
