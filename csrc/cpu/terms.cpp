// content_, tv_, tv_check_finite_: a term of the objective and its gradient, in one pass over the maps.
//
// Every run of values, or every row, has its own sum, and these sums are added in order in float64. So the result does
// not depend on the number of threads.
#include "checks/terms.h"

#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "checks/optimisers.h"
#include "cpu/vectorise.h"
#include "layout.h"

namespace gramophone {
namespace {

constexpr int64_t kRun = 4096;  // values of the content term between two additions in float64
constexpr int64_t kLanes = 16;  // independent sums, one AVX-512 register: a compiler may not reorder a single sum

template <typename G, typename T, typename S>
GRAMOPHONE_INLINE double content_run(G* __restrict grad, const T* __restrict features, const T* __restrict target,
                                     S twice, int64_t n, bool mask) {
  S sums[kLanes] = {};
  const auto visit = [&](int64_t i, int64_t lane) GRAMOPHONE_INLINE_LAMBDA {
    const S value = load(features[i]), difference = value - load(target[i]);
    sums[lane] += difference * difference;
    const S updated = load(grad[i]) + twice * difference;
    store(mask && value <= 0 ? 0 : updated, grad[i]);  // "not <= 0", so that the mask does not hide a NaN
  };
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) visit(i + lane, lane);
  for (; i < n; ++i) visit(i, 0);
  return std::accumulate(sums, sums + kLanes, 0.0);
}

// Adds the gradient of one row of one colour to `grad`. `up` and `down` are the rows above and below, or the row itself
// at the border. Returns per_x times the row's sum of squared differences to the right plus per_y times the sum
// downwards.
template <typename T>
GRAMOPHONE_INLINE double tv_row(T* __restrict grad, const T* row, const T* up, const T* down, int64_t n, T twice,
                                T per_x, T per_y) {
  T across[kLanes] = {}, along[kLanes] = {};
  const auto visit = [&](int64_t x, int64_t left, int64_t right, int64_t lane) GRAMOPHONE_INLINE_LAMBDA {
    const T here = row[x], to_right = row[right] - here, to_down = down[x] - here;
    across[lane] += to_right * to_right;
    along[lane] += to_down * to_down;
    grad[x] += twice * (per_x * (here - row[left] - to_right) + per_y * (here - up[x] - to_down));
  };
  visit(0, 0, 1, 0);
  int64_t x = 1;
  for (; x + kLanes < n; x += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) visit(x + lane, x + lane - 1, x + lane + 1, lane);
  for (; x < n - 1; ++x) visit(x, x - 1, x + 1, 0);
  visit(n - 1, n - 2, n - 1, 0);
  return per_x * std::accumulate(across, across + kLanes, 0.0) + per_y * std::accumulate(along, along + kLanes, 0.0);
}

#define GRAMOPHONE_CONTENT(G, T, S)                                                                                  \
  GRAMOPHONE_VECTORISED double content(G* grad, const T* features, const T* target, S twice, int64_t n, bool mask) { \
    return content_run(grad, features, target, twice, n, mask);                                                      \
  }
GRAMOPHONE_CONTENT(float, float, float)
GRAMOPHONE_CONTENT(double, double, double)
GRAMOPHONE_CONTENT(at::Half, at::Half, float)
GRAMOPHONE_CONTENT(at::BFloat16, at::Half, float)
GRAMOPHONE_CONTENT(at::BFloat16, at::BFloat16, float)
#undef GRAMOPHONE_CONTENT

#define GRAMOPHONE_TV(T)                                                                                          \
  GRAMOPHONE_VECTORISED double tv(T* grad, const T* row, const T* up, const T* down, int64_t n, T twice, T per_x, \
                                  T per_y) {                                                                      \
    return tv_row(grad, row, up, down, n, twice, per_x, per_y);                                                   \
  }
GRAMOPHONE_TV(float)
GRAMOPHONE_TV(double)
#undef GRAMOPHONE_TV

// Loss [B]: weight[b] * the sum of job b's partials, in the type of `like`, the tensor of weights.
at::Tensor loss_of(const std::vector<double>& partials, const std::vector<double>& weights, const at::Tensor& like) {
  const auto of_job = static_cast<int64_t>(partials.size() / weights.size());
  at::Tensor loss = at::empty_like(like, at::kDouble, at::MemoryFormat::Contiguous);
  double* out = loss.mutable_data_ptr<double>();
  for (const auto b : c10::irange(weights.size())) {
    const auto first = partials.begin() + static_cast<int64_t>(b) * of_job;
    out[b] = weights[b] * std::accumulate(first, first + of_job, 0.0);
  }
  return loss.to(like.scalar_type());
}

std::vector<double> doubles_of(const at::Tensor& weight) {
  const at::Tensor doubles = weight.to(at::kDouble).contiguous();
  const double* first = doubles.const_data_ptr<double>();
  return {first, first + doubles.numel()};
}

template <typename G, typename T, typename S>
at::Tensor add_content(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& target,
                       const at::Tensor& weight, bool mask) {
  const int64_t batch = features.size(0), elements = features.numel() / batch, runs = (elements + kRun - 1) / kRun;
  const std::vector<double> weights = doubles_of(weight);
  std::vector<double> partials(batch * runs);
  const T *f = features.const_data_ptr<T>(), *t = target.const_data_ptr<T>();
  G* g = grad.mutable_data_ptr<G>();
  at::parallel_for(0, batch * runs, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t job = i / runs, start = i % runs * kRun, at = job * elements + start;
      partials[i] =
          content(g + at, f + at, t + at, static_cast<S>(2 * weights[job]), std::min(kRun, elements - start), mask);
    }
  });
  return loss_of(partials, weights, weight);
}

at::Tensor content_(const at::Tensor& grad_in, const at::Tensor& features_in, const at::Tensor& target_in,
                    const at::Tensor& weight, bool relu_mask) {
  check_content(grad_in, features_in, target_in, weight);
  const at::Tensor features = dense(features_in);
  const Layout layout = layout_of(features);
  const at::Tensor target = dense_as(target_in, layout);
  const at::Tensor grad = dense_as(grad_in, layout);  // grad_in itself when both have one layout, as in the engine
  at::Tensor loss;
  if (features.scalar_type() == at::kFloat) {
    loss = add_content<float, float, float>(grad, features, target, weight, relu_mask);
  } else if (features.scalar_type() == at::kDouble) {
    loss = add_content<double, double, double>(grad, features, target, weight, relu_mask);
  } else if (features.scalar_type() == at::kBFloat16) {
    loss = add_content<at::BFloat16, at::BFloat16, float>(grad, features, target, weight, relu_mask);
  } else if (grad.scalar_type() == at::kHalf) {
    loss = add_content<at::Half, at::Half, float>(grad, features, target, weight, relu_mask);
  } else {
    loss = add_content<at::BFloat16, at::Half, float>(grad, features, target, weight, relu_mask);
  }
  if (!grad.is_same(grad_in)) grad_in.copy_(grad);
  return loss;
}

template <typename T>
at::Tensor add_tv(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight) {
  const int64_t height = image.size(2), width = image.size(3), rows = image.size(0) * 3 * height;
  const std::vector<double> weights = doubles_of(weight);
  std::vector<double> partials(rows);
  const auto per_x = static_cast<T>(1 / (3.0 * height * (width - 1)));
  const auto per_y = static_cast<T>(1 / (3.0 * (height - 1) * width));
  const T* data = image.const_data_ptr<T>();
  T* out = grad.mutable_data_ptr<T>();
  at::parallel_for(0, rows, std::max<int64_t>(1, (1 << 14) / width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = data + i * width;
      const int64_t y = i % height;
      const auto twice = static_cast<T>(2 * weights[i / (3 * height)]);
      partials[i] = tv(out + i * width, row, y > 0 ? row - width : row, y + 1 < height ? row + width : row, width,
                       twice, per_x, per_y);
    }
  });
  return loss_of(partials, weights, weight);
}

at::Tensor tv_(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight) {
  check_tv("tv_", grad, image, weight);
  return image.scalar_type() == at::kFloat ? add_tv<float>(grad, image, weight) : add_tv<double>(grad, image, weight);
}

// On a CPU the two passes stay apart: a pass over the gradient takes a thousandth of an iteration.
void tv_check_finite_(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight,
                      const at::Tensor& terms, const at::Tensor& alive, const at::Tensor& diverged_at,
                      const at::Tensor& count) {
  check_tv("tv_check_finite_", grad, image, weight);
  check_finite_arguments("tv_check_finite_", terms, grad, alive, diverged_at, count);
  TORCH_CHECK(terms.size(0) > 0, "tv_check_finite_: terms must have a row for the total variation, got none");
  terms.select(0, -1).copy_(add_tv<float>(grad, image, weight));
  static const auto check_finite =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("gramophone::check_finite_", "")
          .typed<void(const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&, const at::Tensor&)>();
  check_finite.call(terms, grad, alive, diverged_at, count);
}

}  // namespace
}  // namespace gramophone

TORCH_LIBRARY_IMPL(gramophone, CPU, m) {
  m.impl("content_", &gramophone::content_);
  m.impl("tv_", &gramophone::tv_);
  m.impl("tv_check_finite_", &gramophone::tv_check_finite_);
}
