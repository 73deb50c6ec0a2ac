// Argument checks that the ops of several families share. A check raises c10::Error (RuntimeError in Python), and its
// message names the op, the requirement and the value found.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace gramophone {

inline void check_features(const char* op, const at::Tensor& features) {
  TORCH_CHECK(features.dim() == 4, op, ": features must be [B, C, H, W], got ", features.dim(), "D ", features.sizes());
  TORCH_CHECK(features.numel() > 0, op, ": features must not be empty, got ", features.sizes());
  const auto type = features.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kDouble || type == at::kHalf || type == at::kBFloat16, op,
              ": features must be float32, float64, float16 or bfloat16, got ", type);
}

// The type of sums: float32, but float64 for float64 features, which gradient checks use.
inline at::ScalarType sum_type(const at::Tensor& features) {
  return features.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

inline bool is_16_bit(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
}

inline void check_same_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& features) {
  TORCH_CHECK(tensor.device() == features.device(), op, ": ", name, " must be on ", features.device(),
              " like the other tensors, got ", tensor.device());
}

// A float32 vector, such as the bias of a convolution.
inline void check_vector(const char* op, const char* name, const at::Tensor& vector, int64_t size,
                         const at::Tensor& features) {
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.scalar_type() == at::kFloat, op, ": ", name,
              " must be float32 [", size, "], got ", vector.scalar_type(), " ", vector.sizes());
  check_same_device(op, name, vector, features);
}

}  // namespace gramophone
