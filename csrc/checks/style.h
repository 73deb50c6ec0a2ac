// Argument checks of the style ops, for all devices: gram, gram_bwd, style_loss, style_fwd, style_bwd, style_bwd_.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "checks/common.h"

namespace gramophone {

// A difference for 16-bit features is bfloat16, which has the range of float32: no weight is too small or too large.
inline at::ScalarType difference_type(const at::Tensor& features) {
  return is_16_bit(features) ? at::kBFloat16 : features.scalar_type();
}

// A symmetric [B, C, C] matrix: a Gram matrix, a target or, in its own type, a difference of the two. Symmetry is not
// checked, because the check would cost more than the op; the caller guarantees it.
inline void check_square(const char* op, const char* name, const at::Tensor& matrix, const at::Tensor& features,
                         at::ScalarType type) {
  const int64_t b = features.size(0), c = features.size(1);
  TORCH_CHECK(matrix.dim() == 3 && matrix.size(0) == b && matrix.size(1) == c && matrix.size(2) == c, op, ": ", name,
              " must be [", b, ", ", c, ", ", c, "] for features ", features.sizes(), ", got ", matrix.sizes());
  TORCH_CHECK(matrix.scalar_type() == type, op, ": ", name, " must be ", type, " for features of ",
              features.scalar_type(), ", got ", matrix.scalar_type());
  TORCH_CHECK(matrix.device() == features.device(), op, ": ", name, " must be on ", features.device(),
              " like features, got ", matrix.device());
}

inline void check_square(const char* op, const char* name, const at::Tensor& matrix, const at::Tensor& features) {
  check_square(op, name, matrix, features, sum_type(features));
}

inline void check_difference(const char* op, const at::Tensor& diff, const at::Tensor& features) {
  check_square(op, "diff", diff, features, difference_type(features));
}

inline void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& features) {
  TORCH_CHECK(tensor.sizes() == features.sizes() && tensor.scalar_type() == features.scalar_type(), op, ": ", name,
              " must be ", features.scalar_type(), " ", features.sizes(), " like features, got ", tensor.scalar_type(),
              " ", tensor.sizes());
}

inline void check_style_fwd(at::TensorList features, at::TensorList targets, const at::Tensor& weights,
                            at::ArrayRef<double> scales) {
  const auto layers = static_cast<int64_t>(features.size());
  TORCH_CHECK(layers > 0, "style_fwd: features must have at least one layer, got none");
  TORCH_CHECK(targets.size() == features.size() && scales.size() == features.size(), "style_fwd: there must be one ",
              "target and one scale per layer of features (", layers, "), got ", targets.size(), " and ",
              scales.size());
  for (const auto l : c10::irange(features.size())) {
    check_features("style_fwd", features[l]);
    check_square("style_fwd", "target", targets[l], features[l]);
    TORCH_CHECK(features[l].size(0) == features[0].size(0), "style_fwd: all layers must have the same batch, got ",
                features[0].size(0), " and ", features[l].size(0));
  }
  TORCH_CHECK(weights.dim() == 2 && weights.size(0) == layers && weights.size(1) == features[0].size(0),
              "style_fwd: weights must be [layers, B] = [", layers, ", ", features[0].size(0), "], got ",
              weights.sizes());
  TORCH_CHECK(weights.scalar_type() == sum_type(features[0]) && weights.device() == features[0].device(),
              "style_fwd: weights must be ", sum_type(features[0]), " on ", features[0].device(), ", got ",
              weights.scalar_type(), " on ", weights.device());
}

inline void check_style_bwd_(const at::Tensor& grad, const at::Tensor& features,
                             const std::optional<at::Tensor>& diff) {
  check_features("style_bwd_", features);
  if (features.scalar_type() == at::kHalf) {
    TORCH_CHECK(grad.sizes() == features.sizes() && is_16_bit(grad), "style_bwd_: grad must be Half or BFloat16 ",
                features.sizes(), " for features of Half, got ", grad.scalar_type(), " ", grad.sizes());
  } else {
    check_like("style_bwd_", "grad", grad, features);
  }
  TORCH_CHECK(grad.device() == features.device(), "style_bwd_: grad must be on ", features.device(),
              " like features, got ", grad.device());
  if (diff) check_difference("style_bwd_", *diff, features);
}

inline void check_style_bwd(const at::Tensor& features, const at::Tensor& diff,
                            const std::optional<at::Tensor>& grad_loss) {
  check_features("style_bwd", features);
  check_difference("style_bwd", diff, features);
  TORCH_CHECK(!grad_loss || (grad_loss->dim() == 1 && grad_loss->size(0) == features.size(0)),
              "style_bwd: grad_loss must be [B] = [", features.size(0), "], got ", grad_loss->sizes());
}

}  // namespace gramophone
