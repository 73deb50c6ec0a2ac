// Argument contracts, one function per op, shared by all backends. Each names the op, the contract, and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

namespace gramophone {

inline void check_features(const char* op, const at::Tensor& features) {
  TORCH_CHECK(features.dim() == 4, op, ": features must be [B, C, H, W], got ", features.dim(), "D ", features.sizes());
  TORCH_CHECK(features.numel() > 0, op, ": features must not be empty, got ", features.sizes());
  const auto type = features.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
              ": features must be float32, float64, float16 or bfloat16, got ", type);
}

// Sums are float32 for the 16-bit types; float64 stays float64, for checks of gradients.
inline at::ScalarType sum_type(const at::Tensor& features) {
  return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// A symmetric [B, C, C] matrix in the sum type: a Gram matrix, a target or a difference of the two. Symmetry is the
// caller's promise: checking it would cost more than the op.
inline void check_square(const char* op, const char* name, const at::Tensor& matrix, const at::Tensor& features) {
  const int64_t b = features.size(0), c = features.size(1);
  TORCH_CHECK(matrix.dim() == 3 && matrix.size(0) == b && matrix.size(1) == c && matrix.size(2) == c, op, ": ", name,
              " must be [", b, ", ", c, ", ", c, "] for features ", features.sizes(), ", got ", matrix.sizes());
  TORCH_CHECK(matrix.scalar_type() == sum_type(features), op, ": ", name, " must be ", sum_type(features),
              " for features of ", features.scalar_type(), ", got ", matrix.scalar_type());
}

inline void check_like(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& features) {
  TORCH_CHECK(tensor.sizes() == features.sizes() && tensor.scalar_type() == features.scalar_type(), op, ": ", name,
              " must be ", features.scalar_type(), " ", features.sizes(), " like features, got ", tensor.scalar_type(),
              " ", tensor.sizes());
}

inline void check_style_fwd(at::TensorList features, at::TensorList targets, const at::Tensor& weights,
                            at::ArrayRef<double> scales) {
  const auto layers = static_cast<int64_t>(features.size());
  TORCH_CHECK(layers > 0, "style_fwd: features must name at least one layer, got none");
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
  TORCH_CHECK(weights.scalar_type() == sum_type(features[0]), "style_fwd: weights must be ", sum_type(features[0]),
              ", got ", weights.scalar_type());
}

inline void check_style_bwd(const at::Tensor& grad, const at::Tensor& features, const std::optional<at::Tensor>& diff) {
  check_features("style_bwd_", features);
  check_like("style_bwd_", "grad", grad, features);
  if (diff) check_square("style_bwd_", "diff", *diff, features);
}

inline void check_max_pool(const at::Tensor& features) {
  check_features("max_pool", features);
  TORCH_CHECK(features.size(2) >= 2 && features.size(3) >= 2, "max_pool: features must be at least 2x2 pixels, got ",
              features.sizes());
}

inline void check_max_pool_bwd(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& pooled) {
  check_max_pool(features);
  check_like("max_pool_bwd", "grad", grad, pooled);
  TORCH_CHECK(pooled.scalar_type() == features.scalar_type() && pooled.dim() == 4 &&
                  pooled.size(0) == features.size(0) && pooled.size(1) == features.size(1) &&
                  pooled.size(2) == features.size(2) / 2 && pooled.size(3) == features.size(3) / 2,
              "max_pool_bwd: pooled must be max_pool of features ", features.sizes(), ", got ", pooled.scalar_type(),
              " ", pooled.sizes());
}

}  // namespace gramophone
