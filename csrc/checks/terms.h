// Argument checks of content_, tv_ and tv_check_finite_, for all devices.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include "checks/common.h"

namespace gramophone {

// The weight of a term per job: float32, or also float64 if the features are float64.
inline void check_term_weight(const char* op, const at::Tensor& weight, const at::Tensor& features) {
  const auto type = weight.scalar_type();
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == features.size(0) &&
                  (type == at::kFloat || (type == at::kDouble && features.scalar_type() == at::kDouble)),
              op, ": weight must be float32 [B] = [", features.size(0), "], got ", type, " ", weight.sizes());
  check_same_device(op, "weight", weight, features);
}

inline void check_content(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& target,
                          const at::Tensor& weight) {
  check_features("content_", features);
  const auto type = features.scalar_type(), of_grad = grad.scalar_type();
  TORCH_CHECK(target.sizes() == features.sizes() && target.scalar_type() == type, "content_: target must be ", type,
              " ", features.sizes(), " like features, got ", target.scalar_type(), " ", target.sizes());
  TORCH_CHECK(grad.sizes() == features.sizes() && (of_grad == type || (of_grad == at::kBFloat16 && type == at::kHalf)),
              "content_: grad must be ", type, " ", features.sizes(), " like features, or BFloat16 if they are Half, ",
              "got ", of_grad, " ", grad.sizes());
  check_same_device("content_", "target", target, features);
  check_same_device("content_", "grad", grad, features);
  check_term_weight("content_", weight, features);
}

inline void check_tv(const char* op, const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight) {
  const auto type = image.scalar_type();
  TORCH_CHECK(image.dim() == 4 && image.size(0) > 0 && image.size(1) == 3 && image.size(2) >= 2 && image.size(3) >= 2 &&
                  image.is_contiguous() && (type == at::kFloat || type == at::kDouble),
              op, ": image must be float32 [B, 3, H, W] of at least 2x2 pixels and contiguous, got ", type, " ",
              image.sizes(), " with strides ", image.strides());
  TORCH_CHECK(grad.sizes() == image.sizes() && grad.scalar_type() == type && grad.is_contiguous(), op,
              ": grad must be ", type, " ", image.sizes(), " like image and contiguous, got ", grad.scalar_type(), " ",
              grad.sizes(), " with strides ", grad.strides());
  check_same_device(op, "grad", grad, image);
  check_term_weight(op, weight, image);
}

}  // namespace gramophone
