// check_finite_, descent_, adam_, lbfgs_ on CUDA: argument checks, scratch memory, kernel launches.
#include <ATen/ops/empty.h>

#include <cstdint>
#include <initializer_list>
#include <optional>

#include "checks/optimisers.h"
#include "cuda/common/device_context.h"
#include "cuda/optimisers/optimisers.h"
#include "image_batch.h"

namespace gramophone {
namespace {

// Whether every job's values start at a multiple of 16 bytes. A null pointer counts as aligned.
bool aligned(int64_t values, std::initializer_list<const void*> pointers) {
  uintptr_t bits = static_cast<uintptr_t>(values) * sizeof(float);
  for (const void* pointer : pointers) bits |= reinterpret_cast<uintptr_t>(pointer);
  return bits % 16 == 0;
}

at::Tensor scratch(int64_t bytes, const at::Tensor& image) {
  return at::empty({bytes}, image.options().dtype(at::kByte));
}

void check_finite_(const at::Tensor& terms, const at::Tensor& grad, const at::Tensor& alive,
                   const at::Tensor& diverged_at, const at::Tensor& count) {
  check_finite_arguments("check_finite_", terms, grad, alive, diverged_at, count);
  const DeviceContext device(grad);
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
  const DeviceContext device(image);
  const ImageBatch images = image_batch(image, last_good, mean, step, alive, average);
  const float* g = grad.const_data_ptr<float>();
  at::Tensor squares;
  if (normalised) squares = scratch(images.jobs * sum_parts(images.values).count * sizeof(double), image);
  launch_descent(images, g, normalised ? reinterpret_cast<double*>(squares.mutable_data_ptr()) : nullptr,
                 aligned(images.values, {images.image, images.last_good, images.mean, g}), device.stream());
}

void adam_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
           const at::Tensor& first, const at::Tensor& second, const at::Tensor& grad, const at::Tensor& step,
           const at::Tensor& count, const at::Tensor& alive, double average) {
  check_step("adam_", image, last_good, mean, grad, step, alive);
  check_adam(image, first, second, count);
  const DeviceContext device(image);
  const ImageBatch images = image_batch(image, last_good, mean, step, alive, average);
  float *m = first.mutable_data_ptr<float>(), *v = second.mutable_data_ptr<float>();
  const float* g = grad.const_data_ptr<float>();
  launch_adam(images, m, v, g, count.const_data_ptr<int64_t>(),
              aligned(images.values, {images.image, images.last_good, images.mean, m, v, g}), device.stream());
}

void lbfgs_(const at::Tensor& image, const at::Tensor& last_good, const std::optional<at::Tensor>& mean,
            const at::Tensor& history, const at::Tensor& before, const at::Tensor& products, const at::Tensor& inverse,
            const at::Tensor& scale, const at::Tensor& seen, const at::Tensor& grad, const at::Tensor& step,
            const at::Tensor& alive, double average) {
  check_step("lbfgs_", image, last_good, mean, grad, step, alive);
  check_lbfgs(image, history, before, products, inverse, scale, seen, kPairs);
  const DeviceContext device(image);
  const ImageBatch images = image_batch(image, last_good, mean, step, alive, average);
  const LbfgsState state = {history.mutable_data_ptr<float>(),   before.mutable_data_ptr<float>(),
                            products.mutable_data_ptr<double>(), inverse.mutable_data_ptr<double>(),
                            scale.mutable_data_ptr<double>(),    seen.mutable_data_ptr<int64_t>()};
  const float* g = grad.const_data_ptr<float>();
  const at::Tensor sums = scratch(images.jobs * kSums * sum_parts(images.values).count * sizeof(double), image);
  const at::Tensor plans = scratch(images.jobs * sizeof(StepPlan), image);
  launch_lbfgs(images, state, g, reinterpret_cast<double*>(sums.mutable_data_ptr()),
               reinterpret_cast<StepPlan*>(plans.mutable_data_ptr()),
               aligned(images.values, {images.image, images.last_good, images.mean, state.history, state.before, g}),
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
