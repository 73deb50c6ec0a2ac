// check_finite_, descent_, adam_, lbfgs_ on CUDA: contracts checked, scratch allocated, kernels launched (step.cu).
#include <ATen/ops/empty.h>

#include <initializer_list>
#include <optional>

#include "../checks.h"
#include "context.h"
#include "step_kernels.h"

namespace gramophone {
namespace {

bool aligned(int64_t values, std::initializer_list<const void*> pointers) {
  uintptr_t bits = static_cast<uintptr_t>(values) * sizeof(float);
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
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

at::Tensor scratch(int64_t bytes, const at::Tensor& image) {
  return at::empty({bytes}, image.options().dtype(at::kByte));
}

void check_finite_(const at::Tensor& terms, const at::Tensor& grad, const at::Tensor& alive,
                   const at::Tensor& diverged_at, const at::Tensor& count) {
  check_finite_arguments(terms, grad, alive, diverged_at, count);
  const OnDeviceOf device(grad);
  const int64_t batch = grad.size(0), values = grad.numel() / batch;
  const float* g = grad.const_data_ptr<float>();
  launch_check_finite(terms.const_data_ptr<float>(), terms.size(0), g, alive.mutable_data_ptr<bool>(),
                      diverged_at.mutable_data_ptr<int64_t>(), count.mutable_data_ptr<int64_t>(), batch, values,
                      aligned(values, {g}), device.stream());
}

void descent_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
              const at::Tensor& grad, const at::Tensor& step, const at::Tensor& alive, double average,
              bool normalised) {
  check_step("descent_", image, last_good, mean, grad, step, alive);
  const OnDeviceOf device(image);
  const Canvas canvas = canvas_of(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  at::Tensor squares;
  if (normalised) squares = scratch(canvas.batch * parts_of(canvas.values).count * sizeof(double), image);
  launch_descent(canvas, g, normalised ? reinterpret_cast<double*>(squares.mutable_data_ptr()) : nullptr,
                 aligned(canvas.values, {canvas.image, canvas.last_good, canvas.mean, g}), device.stream());
}

void adam_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
           const at::Tensor& first, const at::Tensor& second, const at::Tensor& grad, const at::Tensor& step,
           const at::Tensor& count, const at::Tensor& alive, double average) {
  check_step("adam_", image, last_good, mean, grad, step, alive);
  check_adam(image, first, second, count);
  const OnDeviceOf device(image);
  const Canvas canvas = canvas_of(image, last_good, mean, step, alive, average);
  float *m = first.mutable_data_ptr<float>(), *v = second.mutable_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  launch_adam(canvas, m, v, g, count.const_data_ptr<int64_t>(),
              aligned(canvas.values, {canvas.image, canvas.last_good, canvas.mean, m, v, g}), device.stream());
}

void lbfgs_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
            const at::Tensor& history, const at::Tensor& before, const at::Tensor& products, const at::Tensor& inverse,
            const at::Tensor& scale, const at::Tensor& seen, const at::Tensor& grad, const at::Tensor& step,
            const at::Tensor& alive, double average) {
  check_step("lbfgs_", image, last_good, mean, grad, step, alive);
  check_lbfgs(image, history, before, products, inverse, scale, seen, kPairs);
  const OnDeviceOf device(image);
  const Canvas canvas = canvas_of(image, last_good, mean, step, alive, average);
  const Memory memory = {history.mutable_data_ptr<float>(),   before.mutable_data_ptr<float>(),
                         products.mutable_data_ptr<double>(), inverse.mutable_data_ptr<double>(),
                         scale.mutable_data_ptr<double>(),    seen.mutable_data_ptr<int64_t>()};
  const float* g = grad.const_data_ptr<float>();
  const at::Tensor sums = scratch(canvas.batch * kSums * parts_of(canvas.values).count * sizeof(double), image);
  const at::Tensor plans = scratch(canvas.batch * sizeof(Plan), image);
  launch_lbfgs(canvas, memory, g, reinterpret_cast<double*>(sums.mutable_data_ptr()),
               reinterpret_cast<Plan*>(plans.mutable_data_ptr()),
               aligned(canvas.values, {canvas.image, canvas.last_good, canvas.mean, memory.history, memory.before, g}),
               device.stream());
}

}  // namespace
}  // namespace gramophone

GRAMOPHONE_CUDA_KERNELS(m) {
  m.impl("check_finite_", &gramophone::check_finite_);
  m.impl("descent_", &gramophone::descent_);
  m.impl("adam_", &gramophone::adam_);
  m.impl("lbfgs_", &gramophone::lbfgs_);
}
