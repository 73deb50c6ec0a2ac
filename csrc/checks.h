// Argument contracts, one function per op, shared by all backends. Each names the op, the contract, and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
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

inline bool is_16_bit(const at::Tensor& t) {
  return t.scalar_type() == at::kHalf || t.scalar_type() == at::kBFloat16;
}

// A difference multiplies 16-bit features in bfloat16, which has float32's range: no weight is too small or too large.
inline at::ScalarType difference_type(const at::Tensor& features) {
  return is_16_bit(features) ? at::kBFloat16 : features.scalar_type();
}

// A symmetric [B, C, C] matrix: a Gram matrix, a target or, in its own type, a difference of the two. Symmetry is the
// caller's promise: checking it would cost more than the op.
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
      "max_pool_bwd: grad must be ", pooled.scalar_type(), " ", pooled.sizes(), " like pooled, or BFloat16 ",
      "where that is Half, got ", grad.scalar_type(), " ", grad.sizes());
  TORCH_CHECK(pooled.scalar_type() == features.scalar_type() && pooled.dim() == 4 &&
                  pooled.size(0) == features.size(0) && pooled.size(1) == features.size(1) &&
                  pooled.size(2) == features.size(2) / 2 && pooled.size(3) == features.size(3) / 2,
              "max_pool_bwd: pooled must be max_pool of features ", features.sizes(), ", got ", pooled.scalar_type(),
              " ", pooled.sizes());
}

// The network's line on a GPU, the content and the TV term
// --------------------------------------------------------------

inline void check_beside(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& features) {
  TORCH_CHECK(tensor.device() == features.device(), op, ": ", name, " must be on ", features.device(),
              " like the rest, ", "got ", tensor.device());
}

// A float32 vector, such as the bias of a convolution.
inline void check_vector(const char* op, const char* name, const at::Tensor& vector, int64_t size,
                         const at::Tensor& features) {
  TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size && vector.scalar_type() == at::kFloat, op, ": ", name,
              " must be float32 [", size, "], got ", vector.scalar_type(), " ", vector.sizes());
  check_beside(op, name, vector, features);
}

// The weight of a term, per job: float32, or float64 where all is.
inline void check_term_weight(const char* op, const at::Tensor& weight, const at::Tensor& features) {
  const auto type = weight.scalar_type();
  TORCH_CHECK(weight.dim() == 1 && weight.size(0) == features.size(0) &&
                  (type == at::kFloat || (type == at::kDouble && features.scalar_type() == at::kDouble)),
              op, ": weight must be float32 [B] = [", features.size(0), "], got ", type, " ", weight.sizes());
  check_beside(op, "weight", weight, features);
}

inline void check_content(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& target,
                          const at::Tensor& weight) {
  check_features("content_", features);
  const auto type = features.scalar_type(), of_grad = grad.scalar_type();
  TORCH_CHECK(target.sizes() == features.sizes() && target.scalar_type() == type, "content_: target must be ", type,
              " ", features.sizes(), " like features, got ", target.scalar_type(), " ", target.sizes());
  TORCH_CHECK(grad.sizes() == features.sizes() && (of_grad == type || (of_grad == at::kBFloat16 && type == at::kHalf)),
              "content_: grad must be ", type, " ", features.sizes(),
              " like features, or BFloat16 where they are Half, ", "got ", of_grad, " ", grad.sizes());
  check_beside("content_", "target", target, features);
  check_beside("content_", "grad", grad, features);
  check_term_weight("content_", weight, features);
}

inline void check_tv(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& weight) {
  const auto type = image.scalar_type();
  TORCH_CHECK(image.dim() == 4 && image.size(0) > 0 && image.size(1) == 3 && image.size(2) >= 2 && image.size(3) >= 2 &&
                  image.is_contiguous() && (type == at::kFloat || type == at::kDouble),
              "tv_: image must be float32 [B, 3, H, W] of at least 2x2 pixels and contiguous, got ", type, " ",
              image.sizes(), " with strides ", image.strides());
  TORCH_CHECK(grad.sizes() == image.sizes() && grad.scalar_type() == type && grad.is_contiguous(), "tv_: grad must be ",
              type, " ", image.sizes(), " like image and contiguous, got ", grad.scalar_type(), " ", grad.sizes(),
              " with strides ", grad.strides());
  check_beside("tv_", "grad", grad, image);
  check_term_weight("tv_", weight, image);
}

// A map that kernels go over 16 bytes at a time.
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
  TORCH_CHECK(height / 2 == grad.size(2) && width / 2 == grad.size(3), "pool_codes_bwd: grad must be of half ", height,
              "x", width, " pixels, got ", grad.sizes());
  check_beside("pool_codes_bwd", "codes", codes, grad);
}

// The weights of conv1_1 and how the network sees a picture's colours.
inline void check_first_weight(const char* op, const at::Tensor& weight, at::ArrayRef<double> scale,
                               at::IntArrayRef order) {
  const auto type = weight.scalar_type();
  TORCH_CHECK(weight.dim() == 2 && weight.size(0) == 64 && weight.size(1) == 32 && weight.is_contiguous() &&
                  (type == at::kHalf || type == at::kBFloat16),
              op, ": weight must be float16 or bfloat16 [64, 32] and contiguous, got ", type, " ", weight.sizes());
  TORCH_CHECK(scale.size() == 3, op, ": scale must have 3 entries, got ", scale.size());
  bool all = order.size() == 3;
  for (int64_t c = 0; c < 3; ++c) all = all && std::find(order.begin(), order.end(), c) != order.end();
  TORCH_CHECK(all, op, ": order must hold 0, 1 and 2, got ", order);
}

inline void check_first_layer(const at::Tensor& image, const at::Tensor& weight, const at::Tensor& bias,
                              at::ArrayRef<double> scale, at::ArrayRef<double> shift, at::IntArrayRef order) {
  TORCH_CHECK(image.dim() == 4 && image.size(1) == 3 && image.numel() > 0 && image.scalar_type() == at::kFloat &&
                  image.is_contiguous(),
              "first_layer: image must be float32 [B, 3, H, W], not empty and contiguous, got ", image.scalar_type(),
              " ", image.sizes(), " with strides ", image.strides());
  check_first_weight("first_layer", weight, scale, order);
  check_beside("first_layer", "weight", weight, image);
  check_vector("first_layer", "bias", bias, 64, image);
  TORCH_CHECK(shift.size() == 3, "first_layer: shift must have 3 entries, got ", shift.size());
}

inline void check_first_layer_bwd(const at::Tensor& grad, const at::Tensor& weight, at::ArrayRef<double> scale,
                                  at::IntArrayRef order) {
  check_16_bit("first_layer_bwd", "grad", grad);
  check_first_weight("first_layer_bwd", weight, scale, order);
  TORCH_CHECK(grad.size(1) == 64 && grad.scalar_type() == weight.scalar_type(), "first_layer_bwd: grad must be ",
              weight.scalar_type(), " [B, 64, H, W] like weight, got ", grad.scalar_type(), " ", grad.sizes());
  check_beside("first_layer_bwd", "weight", weight, grad);
}

// The step's tensors: what has one entry per job, and float32 pictures that are worked on in place.
inline void check_per_job(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                          const at::Tensor& image) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == 1 && tensor.size(0) == image.size(0) &&
                  tensor.is_contiguous() && tensor.device() == image.device(),
              op, ": ", name, " must be contiguous ", type, " [", image.size(0), "] on ", image.device(), ", got ",
              tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

inline void check_pictures(const char* op, const char* name, const at::Tensor& images) {
  TORCH_CHECK(images.scalar_type() == at::kFloat && images.dim() == 4 && images.size(1) == 3 && images.numel() > 0 &&
                  images.is_contiguous(),
              op, ": ", name, " must be contiguous float32 [B, 3, H, W], got ", images.scalar_type(), " ",
              images.sizes(), " of strides ", images.strides());
  TORCH_CHECK(images.size(0) <= 65535, op, ": there must be at most 65535 jobs, as a grid has rows, got ",
              images.size(0));
}

inline void check_buffer(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                         at::IntArrayRef sizes, const at::Tensor& image) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.sizes() == sizes && tensor.is_contiguous() &&
                  tensor.device() == image.device(),
              op, ": ", name, " must be contiguous ", type, " ", sizes, " on ", image.device(), " for images ",
              image.sizes(), ", got ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

inline void check_finite_arguments(const at::Tensor& terms, const at::Tensor& grad, const at::Tensor& alive,
                                   const at::Tensor& diverged_at, const at::Tensor& count) {
  check_pictures("check_finite_", "grad", grad);
  TORCH_CHECK(terms.scalar_type() == at::kFloat && terms.dim() == 2 && terms.size(1) == grad.size(0) &&
                  terms.is_contiguous() && terms.device() == grad.device(),
              "check_finite_: terms must be contiguous float32 [T, ", grad.size(0), "] on ", grad.device(), ", got ",
              terms.scalar_type(), " ", terms.sizes(), " on ", terms.device());
  check_per_job("check_finite_", "alive", alive, at::kBool, grad);
  check_per_job("check_finite_", "diverged_at", diverged_at, at::kLong, grad);
  check_per_job("check_finite_", "count", count, at::kLong, grad);
}

inline void check_step(const char* op, const at::Tensor& image, const at::Tensor& last_good,
                       const std::optional<at::Tensor>& mean, const at::Tensor& grad, const at::Tensor& step,
                       const at::Tensor& alive) {
  check_pictures(op, "image", image);
  check_buffer(op, "last_good", last_good, at::kFloat, image.sizes(), image);
  TORCH_CHECK(last_good.const_data_ptr() != image.const_data_ptr(), op,
              ": last_good must have memory of its own, got that of image");
  if (mean) check_buffer(op, "mean", *mean, at::kFloat, image.sizes(), image);
  check_buffer(op, "grad", grad, at::kFloat, image.sizes(), image);
  check_per_job(op, "step", step, at::kFloat, image);
  check_per_job(op, "alive", alive, at::kBool, image);
}

inline void check_adam(const at::Tensor& image, const at::Tensor& first, const at::Tensor& second,
                       const at::Tensor& count) {
  check_buffer("adam_", "first", first, at::kFloat, image.sizes(), image);
  check_buffer("adam_", "second", second, at::kFloat, image.sizes(), image);
  check_per_job("adam_", "count", count, at::kLong, image);
}

inline void check_lbfgs(const at::Tensor& image, const at::Tensor& history, const at::Tensor& before,
                        const at::Tensor& products, const at::Tensor& inverse, const at::Tensor& scale,
                        const at::Tensor& seen, int64_t pairs) {
  const int64_t b = image.size(0), vectors = 2 * pairs + 1;
  check_buffer("lbfgs_", "history", history, at::kFloat, {2, pairs, b, 3, image.size(2), image.size(3)}, image);
  check_buffer("lbfgs_", "before", before, at::kFloat, image.sizes(), image);
  check_buffer("lbfgs_", "products", products, at::kDouble, {b, vectors, vectors}, image);
  check_buffer("lbfgs_", "inverse", inverse, at::kDouble, {b, pairs}, image);
  check_per_job("lbfgs_", "scale", scale, at::kDouble, image);
  check_buffer("lbfgs_", "seen", seen, at::kLong, {2, b}, image);
}

}  // namespace gramophone
