// check_finite_, descent_, adam_, lbfgs_: what follows an evaluation, in place. The mathematics: ../step.h.
//
// A step goes through its pictures tile by tile: the formula writes a tile of proposals, 4 KB of L1, and one loop that
// all steps share takes them from there.
#include "../step.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "../checks.h"
#include "vectorise.h"

namespace gramophone {
namespace {

GRAMOPHONE_VECTORISED bool all_finite(const float* x, int64_t n) {
  int strange = 0;
  for (int64_t i = 0; i < n; ++i) strange |= finite(x[i]) ? 0 : 1;
  return !strange;
}

GRAMOPHONE_VECTORISED double sum_of_squares(const float* x, int64_t n) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

GRAMOPHONE_VECTORISED void settle(const float* proposal, bool alive, float average, float* image, float* last_good,
                                  float* mean, int64_t n) {
  if (alive) {
    for (int64_t i = 0; i < n; ++i) {
      const Pixel now = settled({image[i], last_good[i]}, proposal[i], true);
      image[i] = now.image;
      last_good[i] = now.last_good;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) image[i] = last_good[i];
  }
  if (!mean) return;
  for (int64_t i = 0; i < n; ++i) mean[i] = averaged(mean[i], image[i], average);
}

GRAMOPHONE_VECTORISED void descend(const float* image, const float* grad, float rate, float* proposal, int64_t n) {
  for (int64_t i = 0; i < n; ++i) proposal[i] = descended(image[i], grad[i], rate);
}

// Vector code only with -fno-math-errno, as torch itself is compiled: else a root may have to tell errno of itself.
GRAMOPHONE_VECTORISED void adapt(const float* image, const float* grad, AdamRates rates, float* first, float* second,
                                 float* proposal, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) proposal[i] = adapted(image[i], grad[i], rates, first[i], second[i]);
}

// The new pair and gradient of a tile, in double for the dots; s_slot and y_slot are null where there is no pair.
GRAMOPHONE_VECTORISED void renew(const float* image, const float* last_good, const float* grad, float* before,
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

// f(job, part, first value, one past the last) for every part of every job, on all threads.
template <typename F>
void for_parts(int64_t batch, int64_t values, const F& f) {
  const Parts parts = parts_of(values);
  at::parallel_for(0, batch * parts.count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t first = unit % parts.count * parts.size;
      f(unit / parts.count, unit % parts.count, first, std::min(first + parts.size, values));
    }
  });
}

// Moves the batch to what `propose(job, offset in the batch, values, proposals)` makes of tiles of its living jobs.
template <typename F>
void move(const Canvas& canvas, const F& propose) {
  for_parts(canvas.batch, canvas.values, [&](int64_t b, int64_t, int64_t first, int64_t last) {
    float proposal[kTile];
    for (int64_t i = first; i < last; i += kTile) {
      const int64_t at = b * canvas.values + i, n = std::min(kTile, last - i);
      if (canvas.alive[b]) propose(b, at, n, proposal);
      settle(proposal, canvas.alive[b], canvas.average, canvas.image + at, canvas.last_good + at,
             canvas.mean ? canvas.mean + at : nullptr, n);
    }
  });
}

Canvas canvas_of(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
                 const at::Tensor& step, const at::Tensor& alive, double average) {
  return {image.mutable_data_ptr<float>(),
          last_good.mutable_data_ptr<float>(),
          mean ? mean->mutable_data_ptr<float>() : nullptr,
          step.const_data_ptr<float>(),
          alive.const_data_ptr<bool>(),
          static_cast<float>(average),
          image.size(0),
          image.numel() / image.size(0)};
}

void check_finite_(const at::Tensor& terms, const at::Tensor& grad, const at::Tensor& alive,
                   const at::Tensor& diverged_at, const at::Tensor& count) {
  check_finite_arguments(terms, grad, alive, diverged_at, count);
  const int64_t batch = grad.size(0), values = grad.numel() / batch, parts = parts_of(values).count;
  const float *g = grad.const_data_ptr<float>(), *t = terms.const_data_ptr<float>();
  std::vector<char> good(batch * parts);
  for_parts(batch, values, [&](int64_t b, int64_t part, int64_t first, int64_t last) {
    good[b * parts + part] = all_finite(g + b * values + first, last - first);
  });
  bool* living = alive.mutable_data_ptr<bool>();
  for (int64_t b = 0; b < batch; ++b) {
    const auto* flags = good.data() + b * parts;
    bool fine = std::all_of(flags, flags + parts, [](char flag) { return flag; });
    for (int64_t term = 0; term < terms.size(0); ++term) fine &= finite(t[term * batch + b]);
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
  const Canvas canvas = canvas_of(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  std::vector<float> rates(canvas.step, canvas.step + canvas.batch);
  if (normalised) {
    const int64_t parts = parts_of(canvas.values).count;
    std::vector<double> squares(canvas.batch * parts);
    for_parts(canvas.batch, canvas.values, [&](int64_t b, int64_t part, int64_t first, int64_t last) {
      squares[b * parts + part] = sum_of_squares(g + b * canvas.values + first, last - first);
    });
    for (int64_t b = 0; b < canvas.batch; ++b) {
      double sum = 0;
      for (int64_t part = 0; part < parts; ++part) sum += squares[b * parts + part];
      rates[b] = bounded(canvas.step[b] / root_mean(sum, canvas.values));
    }
  }
  move(canvas, [&](int64_t b, int64_t at, int64_t n, float* proposal) {
    descend(canvas.image + at, g + at, rates[b], proposal, n);
  });
}

void adam_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
           const at::Tensor& first, const at::Tensor& second, const at::Tensor& grad, const at::Tensor& step,
           const at::Tensor& count, const at::Tensor& alive, double average) {
  check_step("adam_", image, last_good, mean, grad, step, alive);
  check_adam(image, first, second, count);
  const Canvas canvas = canvas_of(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  const int64_t* seen = count.const_data_ptr<int64_t>();
  float *m = first.mutable_data_ptr<float>(), *v = second.mutable_data_ptr<float>();
  move(canvas, [&](int64_t b, int64_t at, int64_t n, float* proposal) {
    adapt(canvas.image + at, g + at, adam_rates(canvas.step[b], seen[b]), m + at, v + at, proposal, n);
  });
}

void lbfgs_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
            const at::Tensor& history, const at::Tensor& before, const at::Tensor& products, const at::Tensor& inverse,
            const at::Tensor& scale, const at::Tensor& seen, const at::Tensor& grad, const at::Tensor& step,
            const at::Tensor& alive, double average) {
  check_step("lbfgs_", image, last_good, mean, grad, step, alive);
  check_lbfgs(image, history, before, products, inverse, scale, seen, kPairs);
  const Canvas canvas = canvas_of(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  float *vectors = history.mutable_data_ptr<float>(), *g_before = before.mutable_data_ptr<float>();
  int64_t *pairs = seen.mutable_data_ptr<int64_t>(), *gradients = pairs + canvas.batch;
  const int64_t parts = parts_of(canvas.values).count, all = canvas.batch * canvas.values;

  std::vector<double> sums(canvas.batch * parts * kSums);
  for_parts(canvas.batch, canvas.values, [&](int64_t b, int64_t part, int64_t first, int64_t last) {
    if (!canvas.alive[b]) return;
    const Ring ring = ring_of(pairs[b], gradients[b]);
    double s[kTile], y[kTile], grad_now[kTile];
    double* dots = sums.data() + (b * parts + part) * kSums;
    for (int64_t i = first; i < last; i += kTile) {
      const int64_t at = b * canvas.values + i, n = std::min(kTile, last - i);
      float* slot = ring.forms ? vectors + ring.newest * all + at : nullptr;
      renew(canvas.image + at, canvas.last_good + at, g + at, g_before + at, slot, slot ? slot + kPairs * all : nullptr,
            s, y, grad_now, n);
      dots[6] += sum_of_squares(g + at, n);
      for (int k = 0; k < ring.held; ++k)
        add_dots(vectors + k * all + at, vectors + (kPairs + k) * all + at, s, y, grad_now, dots + k * kDots, n);
    }
  });

  std::vector<Plan> plans(canvas.batch);
  for (int64_t b = 0; b < canvas.batch; ++b) {
    if (!canvas.alive[b]) continue;
    double total[kSums] = {};
    for (int64_t part = 0; part < parts; ++part)
      for (int i = 0; i < kSums; ++i) total[i] += sums[(b * parts + part) * kSums + i];
    const Ring ring = ring_of(pairs[b], gradients[b]);
    Loops loops;
    plan_step(OneLane{}, total, ring, canvas.step[b], canvas.values,
              products.mutable_data_ptr<double>() + b * kVectors * kVectors,
              inverse.mutable_data_ptr<double>() + b * kPairs, scale.mutable_data_ptr<double>() + b, loops, plans[b]);
    pairs[b] += ring.forms;
    ++gradients[b];
  }

  move(canvas, [&](int64_t b, int64_t at, int64_t n, float* proposal) {
    const Plan& plan = plans[b];
    std::fill(proposal, proposal + n, 0.0f);
    for (int i = 0; i < plan.count; ++i)
      add_scaled(plan.vector[i] == kGrad ? g + at : vectors + plan.vector[i] * all + at, plan.weight[i], proposal, n);
    add_scaled(canvas.image + at, 1.0f, proposal, n);
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
