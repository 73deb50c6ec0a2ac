// Argument checks of check_finite_, descent_, adam_ and lbfgs_, for all devices.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <optional>

namespace gramophone {

// A tensor with one entry per job.
inline void check_per_job(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                          const at::Tensor& image) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == 1 && tensor.size(0) == image.size(0) &&
                  tensor.is_contiguous() && tensor.device() == image.device(),
              op, ": ", name, " must be contiguous ", type, " [", image.size(0), "] on ", image.device(), ", got ",
              tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

// Float32 images that an op updates in place, or their gradient.
inline void check_images(const char* op, const char* name, const at::Tensor& images) {
  TORCH_CHECK(images.scalar_type() == at::kFloat && images.dim() == 4 && images.size(1) == 3 && images.numel() > 0 &&
                  images.is_contiguous(),
              op, ": ", name, " must be contiguous float32 [B, 3, H, W], got ", images.scalar_type(), " ",
              images.sizes(), " with strides ", images.strides());
  TORCH_CHECK(images.size(0) <= 65535, op, ": there must be at most 65535 jobs, the limit of a CUDA grid, got ",
              images.size(0));
}

inline void check_buffer(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType type,
                         at::IntArrayRef sizes, const at::Tensor& image) {
  TORCH_CHECK(tensor.scalar_type() == type && tensor.sizes() == sizes && tensor.is_contiguous() &&
                  tensor.device() == image.device(),
              op, ": ", name, " must be contiguous ", type, " ", sizes, " on ", image.device(), " for images ",
              image.sizes(), ", got ", tensor.scalar_type(), " ", tensor.sizes(), " on ", tensor.device());
}

inline void check_finite_arguments(const char* op, const at::Tensor& terms, const at::Tensor& grad,
                                   const at::Tensor& alive, const at::Tensor& diverged_at, const at::Tensor& count) {
  check_images(op, "grad", grad);
  TORCH_CHECK(terms.scalar_type() == at::kFloat && terms.dim() == 2 && terms.size(1) == grad.size(0) &&
                  terms.is_contiguous() && terms.device() == grad.device(),
              op, ": terms must be contiguous float32 [T, ", grad.size(0), "] on ", grad.device(), ", got ",
              terms.scalar_type(), " ", terms.sizes(), " on ", terms.device());
  check_per_job(op, "alive", alive, at::kBool, grad);
  check_per_job(op, "diverged_at", diverged_at, at::kLong, grad);
  check_per_job(op, "count", count, at::kLong, grad);
}

inline void check_step(const char* op, const at::Tensor& image, const at::Tensor& last_good,
                       const std::optional<at::Tensor>& mean, const at::Tensor& grad, const at::Tensor& step,
                       const at::Tensor& alive) {
  check_images(op, "image", image);
  check_buffer(op, "last_good", last_good, at::kFloat, image.sizes(), image);
  TORCH_CHECK(last_good.const_data_ptr() != image.const_data_ptr(), op, ": last_good and image must not share memory");
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
