// style_bwd, style_bwd_: grad <- (grad + D F) where F > 0, in one pass over the feature map.
//
// The product of a tile stays in the core's cache, where it is added and masked. So the map is read once and the
// gradient is read and written once, as much as the ReLU's own backward would cost.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "checks/style.h"
#include "cpu/tile.h"
#include "layout.h"

namespace gramophone {
namespace {

// The condition is "not <= 0" instead of "> 0", so that the mask does not hide a NaN in F.
template <typename G, typename T>
GRAMOPHONE_INLINE void add_and_mask(G* grad, const T* features, const float* product, int64_t n, bool mask) {
  if (mask) {
    for (int64_t i = 0; i < n; ++i) store(load(features[i]) <= 0 ? 0.0f : load(grad[i]) + product[i], grad[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) store(load(grad[i]) + product[i], grad[i]);
  }
}

template <typename G, typename T>
GRAMOPHONE_INLINE void mask_only(G* grad, const T* features, int64_t n) {
  for (int64_t i = 0; i < n; ++i) store(load(features[i]) <= 0 ? 0.0f : load(grad[i]), grad[i]);
}

#define GRAMOPHONE_LOOPS(G, T)                                                                  \
  GRAMOPHONE_VECTORISED void add_rows(G* g, const T* f, const float* p, int64_t n, bool mask) { \
    add_and_mask(g, f, p, n, mask);                                                             \
  }                                                                                             \
  GRAMOPHONE_VECTORISED void mask_rows(G* g, const T* f, int64_t n) {                           \
    mask_only(g, f, n);                                                                         \
  }
GRAMOPHONE_LOOPS(float, float)
GRAMOPHONE_LOOPS(at::Half, at::Half)
GRAMOPHONE_LOOPS(at::BFloat16, at::Half)
GRAMOPHONE_LOOPS(at::BFloat16, at::BFloat16)
#undef GRAMOPHONE_LOOPS

// G, T and P: the types of the gradient, of the features and of the product's operands.
template <typename G, typename T, typename P>
void add_style(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& diff, bool mask) {
  const Layout layout = layout_of(features);
  const int64_t c = layout.channels, tiles = (layout.pixels + kTilePixels - 1) / kTilePixels;
  const at::Tensor matrices = diff.to(c10::CppTypeToScalarType<P>::value).contiguous();
  const T* f_data = features.const_data_ptr<T>();
  const P* d_data = matrices.const_data_ptr<P>();
  G* g_data = grad.mutable_data_ptr<G>();

  at::parallel_for(0, layout.batch * tiles, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> product(c * kTilePixels);
    std::vector<P> scratch(std::is_same_v<T, P> ? 0 : c * kTilePixels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t job = unit / tiles, start = unit % tiles * kTilePixels;
      const int64_t pixels = std::min(kTilePixels, layout.pixels - start);
      const int64_t at = job * c * layout.pixels + (layout.channels_last ? start * c : start);
      const T* f = f_data + at;
      G* g = g_data + at;
      const Operand<P> matrix{d_data + job * c * c, c};
      if (layout.channels_last) {  // [pixels, C] = F [pixels, C] D [C, C]; D is symmetric
        multiply<P>(pixels, c, c, as_stored(f, c, pixels, c, scratch.data()), matrix, product.data(), c, false);
        add_rows(g, f, product.data(), pixels * c, mask);
      } else {  // [C, pixels] = D [C, C] F [C, pixels]
        multiply<P>(c, pixels, c, matrix, as_stored(f, layout.pixels, c, pixels, scratch.data()), product.data(),
                    pixels, false);
        for (int64_t row = 0; row < c; ++row)
          add_rows(g + row * layout.pixels, f + row * layout.pixels, product.data() + row * pixels, pixels, mask);
      }
    }
    release_multiply();
  });
}

template <typename G, typename T>
void mask_relu(const at::Tensor& grad, const at::Tensor& features) {
  const T* f = features.const_data_ptr<T>();
  G* g = grad.mutable_data_ptr<G>();
  at::parallel_for(0, features.numel(), 1 << 15,
                   [&](int64_t begin, int64_t end) { mask_rows(g + begin, f + begin, end - begin); });
}

template <typename G, typename T, typename P>
void update(const at::Tensor& grad, const at::Tensor& features, const std::optional<at::Tensor>& diff, bool mask) {
  if (diff) {
    add_style<G, T, P>(grad, features, *diff, mask);
  } else if (mask) {
    mask_relu<G, T>(grad, features);
  }
}

void style_bwd_(const at::Tensor& grad, const at::Tensor& features_in, const std::optional<at::Tensor>& diff,
                bool relu_mask) {
  check_style_bwd_(grad, features_in, diff);
  if (features_in.scalar_type() == at::kDouble) {  // for gradient checks only
    const at::Tensor sum = diff ? grad + at::bmm(*diff, features_in.flatten(2)).view(features_in.sizes()) : grad;
    grad.copy_(relu_mask ? at::where(features_in <= 0, at::zeros_like(sum), sum) : sum);
    return;
  }
  const at::Tensor features = dense(features_in);
  const Layout layout = layout_of(features);
  const at::Tensor dense_grad = dense_as(grad, layout);  // grad itself when both have one layout, as in the engine
  if (features.scalar_type() == at::kFloat) {
    update<float, float, float>(dense_grad, features, diff, relu_mask);
  } else if (grad.scalar_type() == at::kHalf) {
    update<at::Half, at::Half, float>(dense_grad, features, diff, relu_mask);
  } else if (features.scalar_type() == at::kHalf) {
    update<at::BFloat16, at::Half, float>(dense_grad, features, diff, relu_mask);
  } else if (has_amx()) {
    update<at::BFloat16, at::BFloat16, at::BFloat16>(dense_grad, features, diff, relu_mask);
  } else {
    update<at::BFloat16, at::BFloat16, float>(dense_grad, features, diff, relu_mask);
  }
  if (!dense_grad.is_same(grad)) grad.copy_(dense_grad);
}

// dF = grad_loss[b] * D F, in the layout of F. Used by autograd.
at::Tensor style_bwd(const at::Tensor& features, const at::Tensor& diff, const std::optional<at::Tensor>& grad_loss) {
  check_style_bwd(features, diff, grad_loss);
  at::Tensor grad = at::zeros_like(features);
  const at::Tensor scaled_diff = grad_loss ? (diff * grad_loss->view({-1, 1, 1})).to(diff.scalar_type()) : diff;
  style_bwd_(grad, features, scaled_diff, /*relu_mask=*/false);
  return grad;
}

}  // namespace
}  // namespace gramophone

TORCH_LIBRARY_IMPL(gramophone, CPU, m) {
  m.impl("style_bwd", &gramophone::style_bwd);
  m.impl("style_bwd_", &gramophone::style_bwd_);
}
