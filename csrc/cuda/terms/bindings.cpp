// content_, tv_ and tv_check_finite_ on CUDA: argument checks, result tensors, kernel launches.
#include <ATen/ops/empty.h>

#include <cstdint>
#include <limits>
#include <type_traits>

#include "checks/optimisers.h"
#include "checks/terms.h"
#include "cuda/common/device_context.h"
#include "cuda/common/dispatch.h"
#include "cuda/terms/terms.h"
#include "layout.h"

namespace gramophone {
namespace {

at::Tensor content_(const at::Tensor& grad_in, const at::Tensor& features_in, const at::Tensor& target_in,
                    const at::Tensor& weight_in, bool relu_mask) {
  check_content(grad_in, features_in, target_in, weight_in);
  const DeviceContext device(features_in);
  const at::Tensor features = dense(features_in);
  const Layout layout = layout_of(features);
  const at::Tensor target = dense_as(target_in, layout);
  const at::Tensor grad = dense_as(grad_in, layout);  // grad_in itself when both have one layout, as in the engine
  const at::Tensor weight = weight_in.to(sum_type(features)).contiguous();
  const int64_t batch = features.size(0), elements = features.numel() / batch;
  const at::Tensor partials = at::empty({batch * content_blocks(elements)}, weight.options());
  const at::Tensor loss = at::empty({batch}, weight.options());
  for_gradient(grad.scalar_type(), features.scalar_type(), [&](auto grad_type, auto type) {
    using G = Of<decltype(grad_type)>;
    using T = Of<decltype(type)>;
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    launch_content(mutable_data<G>(grad), const_data<T>(features), const_data<T>(target), const_data<S>(weight), batch,
                   elements, relu_mask, mutable_data<S>(partials), mutable_data<S>(loss), device.stream());
  });
  if (!grad.is_same(grad_in)) grad_in.copy_(grad);
  return loss.to(weight_in.scalar_type());
}

void check_tv_on_gpu(const char* op, const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight) {
  check_tv(op, grad, image, weight);
  TORCH_CHECK(image.scalar_type() == at::kFloat, op, ": image must be float32 on a GPU, got ", image.scalar_type());
  TORCH_CHECK(image.numel() / image.size(0) <= std::numeric_limits<int>::max(), op,
              ": an image must have fewer than 2^31 values, got ", image.sizes());
}

at::Tensor tv_(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight_in) {
  check_tv_on_gpu("tv_", grad, image, weight_in);
  const int64_t batch = image.size(0);
  const DeviceContext device(image);
  const at::Tensor weight = weight_in.contiguous();
  const int height = static_cast<int>(image.size(2)), width = static_cast<int>(image.size(3));
  const at::Tensor partials = at::empty({batch * tv_blocks(height, width)}, weight.options());
  at::Tensor loss = at::empty({batch}, weight.options());
  launch_tv(mutable_data<float>(grad), const_data<float>(image), const_data<float>(weight), batch, height, width,
            mutable_data<float>(partials), mutable_data<float>(loss), device.stream());
  return loss;
}

void tv_check_finite_(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight_in,
                      const at::Tensor& terms, const at::Tensor& alive, const at::Tensor& diverged_at,
                      const at::Tensor& count) {
  check_tv_on_gpu("tv_check_finite_", grad, image, weight_in);
  check_finite_arguments("tv_check_finite_", terms, grad, alive, diverged_at, count);
  TORCH_CHECK(terms.size(0) > 0, "tv_check_finite_: terms must have a row for the total variation, got none");
  const DeviceContext device(image);
  const at::Tensor weight = weight_in.contiguous();
  const int64_t batch = image.size(0);
  const int height = static_cast<int>(image.size(2)), width = static_cast<int>(image.size(3));
  const int64_t blocks = batch * tv_blocks(height, width);
  const at::Tensor partials = at::empty({blocks}, weight.options());
  const at::Tensor bad = at::empty({blocks}, weight.options().dtype(at::kByte));
  const Verdicts verdicts{mutable_data<uint8_t>(bad), mutable_data<float>(terms),         terms.size(0),
                          mutable_data<bool>(alive),  mutable_data<int64_t>(diverged_at), mutable_data<int64_t>(count)};
  launch_tv_check_finite(mutable_data<float>(grad), const_data<float>(image), const_data<float>(weight), batch, height,
                         width, mutable_data<float>(partials), verdicts, device.stream());
}

}  // namespace
}  // namespace gramophone

GRAMOPHONE_CUDA_KERNELS(m) {
  m.impl("content_", &gramophone::content_);
  m.impl("tv_", &gramophone::tv_);
  m.impl("tv_check_finite_", &gramophone::tv_check_finite_);
}
