// gram, gram_bwd, style_loss, style_fwd: Gram matrices G = scale * F F^T and the style terms.
//
// F is long and thin (C = 64 to 512, up to a million pixels), so the work is divided over pixels. Each slice of pixels
// sums its own C x C partial, tile by tile, and the partials are added in slice order. The slices depend on the shape
// alone, so the sums do not depend on the number of threads. Only block rows up to the diagonal are multiplied; the
// rest is mirrored.
#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>
#include <ATen/ops/stack.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "checks/style.h"
#include "cpu/tile.h"
#include "layout.h"

namespace gramophone {
namespace {

constexpr int64_t kSlicePixels = 4096;  // 16 tiles: enough work to hide the C x C reduction of a slice
constexpr int64_t kMaxSlices = 16;      // at C = 512 the partials of a job then take 16 MB
constexpr int64_t kBlockRows = 64;

// Adds F F^T over `pixels` pixels from `features` to `partial` [C, C], or stores it if `first`. Only the block rows up
// to the diagonal are computed.
template <typename T, typename P>
void add_tile(const T* features, const Layout& layout, int64_t pixels, P* scratch, float* partial, bool first) {
  const int64_t c = layout.channels;
  P* other = scratch + c * kTilePixels;
  const Operand<P> rows = layout.channels_last ? transposed(features, c, pixels, c, scratch)  // [C, pixels]
                                               : as_stored(features, layout.pixels, c, pixels, scratch);
  const Operand<P> columns = layout.channels_last ? as_stored(features, c, pixels, c, other)  // [pixels, C]
                                                  : transposed(features, layout.pixels, c, pixels, other);
  for (int64_t r = 0; r < c; r += kBlockRows) {
    const int64_t height = std::min(kBlockRows, c - r), width = r + height;
    multiply<P>(height, width, pixels, {rows.data + r * rows.ld, rows.ld}, columns, partial + r * c, c, !first);
  }
}

template <typename T, typename P>
void gram_into(const at::Tensor& features, float scale, float* out) {
  const Layout layout = layout_of(features);
  const int64_t c = layout.channels;
  const int64_t slices = std::clamp<int64_t>(layout.pixels / kSlicePixels, 1, kMaxSlices);
  const int64_t tiles = (layout.pixels + kTilePixels - 1) / kTilePixels;
  const at::Tensor partials = at::empty({layout.batch * slices, c, c}, features.options().dtype(at::kFloat));
  const T* data = features.const_data_ptr<T>();
  float* sums = partials.mutable_data_ptr<float>();

  at::parallel_for(0, layout.batch * slices, 1, [&](int64_t begin, int64_t end) {
    std::vector<P> scratch(2 * c * kTilePixels);
    for (int64_t unit = begin; unit < end; ++unit) {
      const T* job = data + (unit / slices) * c * layout.pixels;
      const int64_t slice = unit % slices, first = tiles * slice / slices, last = tiles * (slice + 1) / slices;
      for (int64_t tile = first; tile < last; ++tile) {
        const int64_t start = tile * kTilePixels, pixels = std::min(kTilePixels, layout.pixels - start);
        add_tile(job + (layout.channels_last ? start * c : start), layout, pixels, scratch.data(), sums + unit * c * c,
                 tile == first);
      }
    }
    release_multiply();
  });

  at::parallel_for(0, layout.batch * c, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t job = i / c, row = i % c;
      for (int64_t column = 0; column <= row; ++column) {
        float sum = 0;
        for (int64_t slice = 0; slice < slices; ++slice) sum += sums[((job * slices + slice) * c + row) * c + column];
        out[(job * c + row) * c + column] = out[(job * c + column) * c + row] = scale * sum;
      }
    }
  });
}

// [B, C, pixels]
at::Tensor matrix_of(const at::Tensor& features) {
  return features.flatten(2);
}

at::Tensor gram_unchecked(const at::Tensor& features_in, double scale) {
  if (features_in.scalar_type() == at::kDouble)
    return at::bmm(matrix_of(features_in), matrix_of(features_in).mT()).mul_(scale);
  const at::Tensor features = dense(features_in);
  at::Tensor out =
      at::empty({features.size(0), features.size(1), features.size(1)}, features.options().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  const auto factor = static_cast<float>(scale);
  if (features.scalar_type() == at::kFloat) {
    gram_into<float, float>(features, factor, data);
  } else if (features.scalar_type() == at::kHalf) {
    gram_into<at::Half, float>(features, factor, data);
  } else if (has_amx()) {
    gram_into<at::BFloat16, at::BFloat16>(features, factor, data);
  } else {
    gram_into<at::BFloat16, float>(features, factor, data);
  }
  return out;
}

at::Tensor gram(const at::Tensor& features, double scale) {
  check_features("gram", features);
  return gram_unchecked(features, scale);
}

// G = scale * F F^T  =>  dF = scale * (dG + dG^T) F, in the layout of F. Used by autograd.
at::Tensor gram_bwd(const at::Tensor& grad, const at::Tensor& features, double scale) {
  check_features("gram_bwd", features);
  check_square("gram_bwd", "grad", grad, features);
  const at::Tensor both = (grad + grad.mT()).mul_(scale);
  const at::Tensor product = at::bmm(both, matrix_of(features).to(both.scalar_type()));
  return at::empty_like(features).copy_(product.view(features.sizes()));
}

// loss[b] = w[b] * sum (G - A)^2, and the difference that style_bwd takes: dloss/dF = diff F with
// diff = 4 w scale (G - A).
std::tuple<at::Tensor, at::Tensor> compare(const at::Tensor& features, const at::Tensor& target,
                                           const at::Tensor& weight, double scale) {
  at::Tensor difference = gram_unchecked(features, scale).sub_(target);
  at::Tensor loss = difference.square().sum({1, 2}).mul_(weight);
  difference.mul_((weight * (4 * scale)).view({-1, 1, 1}));
  return {std::move(loss), difference.to(difference_type(features))};
}

std::tuple<at::Tensor, at::Tensor> style_loss(const at::Tensor& features, const at::Tensor& target, double weight,
                                              double scale) {
  check_features("style_loss", features);
  check_square("style_loss", "target", target, features);
  return compare(features, target, at::full({features.size(0)}, weight, target.options()), scale);
}

std::tuple<at::Tensor, std::vector<at::Tensor>> style_fwd(at::TensorList features, at::TensorList targets,
                                                          const at::Tensor& weights, at::ArrayRef<double> scales,
                                                          bool /*persistent*/) {
  check_style_fwd(features, targets, weights, scales);
  std::vector<at::Tensor> losses, diffs;
  for (const auto l : c10::irange(features.size())) {
    auto [loss, diff] = compare(features[l], targets[l], weights[static_cast<int64_t>(l)], scales[l]);
    losses.push_back(std::move(loss));
    diffs.push_back(std::move(diff));
  }
  return {at::stack(losses), std::move(diffs)};
}

}  // namespace
}  // namespace gramophone

TORCH_LIBRARY_IMPL(gramophone, CPU, m) {
  m.impl("gram", &gramophone::gram);
  m.impl("gram_bwd", &gramophone::gram_bwd);
  m.impl("style_loss", &gramophone::style_loss);
  m.impl("style_fwd", &gramophone::style_fwd);
}
