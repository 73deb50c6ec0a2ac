// Argument checks of the ops that compute a layer of the network, for all devices: max_pool, max_pool_bwd, bias_relu_,
// bias_relu_pool, pool_codes_bwd, first_layer, first_layer_bwd.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>

#include "checks/common.h"

namespace gramophone {

inline void check_max_pool(const at::Tensor& features) {
  check_features("max_pool", features);
  TORCH_CHECK(features.size(2) >= 2 && features.size(3) >= 2, "max_pool: features must be at least 2x2 pixels, got ",
              features.sizes());
}

inline void check_max_pool_bwd(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& pooled) {
  check_max_pool(features);
  TORCH_CHECK(
      grad.sizes() == pooled.sizes() && (grad.scalar_type() == pooled.scalar_type() ||
                                         (grad.scalar_type() == at::kBFloat16 && pooled.scalar_type() == at::kHalf)),
      "max_pool_bwd: grad must be ", pooled.scalar_type(), " ", pooled.sizes(), " like pooled, or BFloat16 if ",
      "pooled is Half, got ", grad.scalar_type(), " ", grad.sizes());
  TORCH_CHECK(pooled.scalar_type() == features.scalar_type() && pooled.dim() == 4 &&
                  pooled.size(0) == features.size(0) && pooled.size(1) == features.size(1) &&
                  pooled.size(2) == features.size(2) / 2 && pooled.size(3) == features.size(3) / 2,
              "max_pool_bwd: pooled must be the result of max_pool for features ", features.sizes(), ", got ",
              pooled.scalar_type(), " ", pooled.sizes());
}

// A feature map that kernels read and write 16 bytes at a time.
inline void check_16_bit(const char* op, const char* name, const at::Tensor& map) {
  const auto type = map.scalar_type();
  TORCH_CHECK(type == at::kHalf || type == at::kBFloat16, op, ": ", name, " must be float16 or bfloat16, got ", type);
  TORCH_CHECK(
      map.dim() == 4 && map.numel() > 0 && map.is_contiguous(at::MemoryFormat::ChannelsLast) && map.size(1) % 8 == 0,
      op, ": ", name, " must be [B, C, H, W], not empty, channels_last, and C a multiple of 8, got ", map.sizes(),
      " with strides ", map.strides());
}

inline void check_bias_relu(const char* op, const at::Tensor& features, const at::Tensor& bias) {
  check_16_bit(op, "features", features);
  check_vector(op, "bias", bias, features.size(1), features);
}

inline void check_bias_relu_pool(const at::Tensor& features, const at::Tensor& bias) {
  check_bias_relu("bias_relu_pool", features, bias);
  TORCH_CHECK(features.size(2) >= 2 && features.size(3) >= 2,
              "bias_relu_pool: features must be at least 2x2 pixels, got ", features.sizes());
}

inline void check_pool_codes_bwd(const at::Tensor& grad, const at::Tensor& codes, int64_t height, int64_t width) {
  check_16_bit("pool_codes_bwd", "grad", grad);
  TORCH_CHECK(codes.sizes() == grad.sizes() && codes.scalar_type() == at::kByte &&
                  codes.is_contiguous(at::MemoryFormat::ChannelsLast),
              "pool_codes_bwd: codes must be uint8 ", grad.sizes(), " like grad and channels_last, got ",
              codes.scalar_type(), " ", codes.sizes(), " with strides ", codes.strides());
  TORCH_CHECK(height / 2 == grad.size(2) && width / 2 == grad.size(3), "pool_codes_bwd: grad must have half of ",
              height, "x", width, " pixels, rounded down, got ", grad.sizes());
  check_same_device("pool_codes_bwd", "codes", codes, grad);
}

// The weight of conv1_1, and the scale and the order of the network's colour channels.
inline void check_first_weight(const char* op, const at::Tensor& weight, at::ArrayRef<double> scale,
                               at::IntArrayRef order) {
  const auto type = weight.scalar_type();
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 64 && weight.size(1) == 32 && weight.is_contiguous() &&
                  (type == at::kHalf || type == at::kBFloat16),
              op, ": weight must be float16 or bfloat16 [64, 32] and contiguous, got ", type, " ", weight.sizes());
  TORCH_CHECK(scale.size() == 3, op, ": scale must have 3 entries, got ", scale.size());
  bool all = order.size() == 3;
  for (int64_t c = 0; c < 3; ++c) all = all && std::find(order.begin(), order.end(), c) != order.end();
  TORCH_CHECK(all, op, ": order must be a permutation of 0, 1 and 2, got ", order);
}

inline void check_first_layer(const at::Tensor& image, const at::Tensor& weight, const at::Tensor& bias,
                              at::ArrayRef<double> scale, at::ArrayRef<double> shift, at::IntArrayRef order) {
  TORCH_CHECK(image.dim() == 4 && image.size(1) == 3 && image.numel() > 0 && image.scalar_type() == at::kFloat &&
                  image.is_contiguous(),
              "first_layer: image must be float32 [B, 3, H, W], not empty and contiguous, got ", image.scalar_type(),
              " ", image.sizes(), " with strides ", image.strides());
  check_first_weight("first_layer", weight, scale, order);
  check_same_device("first_layer", "weight", weight, image);
  check_vector("first_layer", "bias", bias, 64, image);
  TORCH_CHECK(shift.size() == 3, "first_layer: shift must have 3 entries, got ", shift.size());
}

inline void check_first_layer_bwd(const at::Tensor& grad, const at::Tensor& weight, at::ArrayRef<double> scale,
                                  at::IntArrayRef order) {
  check_16_bit("first_layer_bwd", "grad", grad);
  check_first_weight("first_layer_bwd", weight, scale, order);
  TORCH_CHECK(grad.size(1) == 64 && grad.scalar_type() == weight.scalar_type(), "first_layer_bwd: grad must be ",
              weight.scalar_type(), " [B, 64, H, W] like weight, got ", grad.scalar_type(), " ", grad.sizes());
  check_same_device("first_layer_bwd", "weight", weight, grad);
}

}  // namespace gramophone
