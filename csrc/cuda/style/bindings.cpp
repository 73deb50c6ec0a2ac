// gram, gram_bwd, style_loss, style_fwd, style_bwd, style_bwd_ on CUDA. The kernels take 16-bit channels_last features
// of 64, 128, 256 or 512 channels on sm_80 and later. Everything else is computed with torch's ops.
#include <ATen/TensorOperators.h>
#include <ATen/ops/bmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "checks/style.h"
#include "cuda/common/device_context.h"
#include "cuda/common/dispatch.h"
#include "cuda/style/style.h"

namespace gramophone {
namespace {

bool has_kernel(const DeviceContext& device, const at::Tensor& features) {
  const int64_t c = features.size(1);
  return is_16_bit(features) && (c == 64 || c == 128 || c == 256 || c == 512) && device.has_tensor_cores();
}

// The tensor itself if the kernels can read it, else a copy that they can read.
at::Tensor aligned(const at::Tensor& t) {
  return is_aligned(t) ? t : t.clone();
}
at::Tensor channels_last(const at::Tensor& t) {
  return aligned(t.contiguous(at::MemoryFormat::ChannelsLast));
}

at::Tensor new_square(const at::Tensor& features, at::ScalarType type) {
  return at::empty({features.size(0), features.size(1), features.size(1)}, features.options().dtype(type));
}

// The features as matrices [B, C, pixels], in the type of their sums.
at::Tensor summable(const at::Tensor& features) {
  return features.flatten(2).to(sum_type(features));
}

at::Tensor gram_by_library(const at::Tensor& features, double scale) {
  const at::Tensor matrices = summable(features);
  return at::bmm(matrices, matrices.mT()).mul_(scale);
}

// One layer of a call. Without a target `out` receives the Gram matrix.
struct Term {
  at::Tensor features, target, weight, out, loss;
  double scale;
};

template <typename T>
void launch_terms(const DeviceContext& device, const Term* terms, size_t count, bool persistent) {
  StyleLaunch launch;
  launch.count = static_cast<int>(count);
  launch.jobs = static_cast<int>(terms[0].features.size(0));
  for (const auto l : c10::irange(count)) {
    const Term& term = terms[l];
    StyleLayer& layer = launch.layers[l];
    layer.features = term.features.const_data_ptr();
    layer.pixels = term.features.size(2) * term.features.size(3);
    layer.channels = static_cast<int>(term.features.size(1));
    layer.scale = static_cast<float>(term.scale);
    layer.out = term.out.mutable_data_ptr();
    if (!term.target.defined()) continue;
    layer.target = term.target.const_data_ptr<float>();
    layer.weight = term.weight.const_data_ptr<float>();
    layer.loss = term.loss.mutable_data_ptr<float>();
  }
  schedule(launch, device.multiprocessors(), persistent);
  // These tensors are freed on return, before the kernels end. That is safe: torch's allocator reuses memory in the
  // order of the stream.
  const auto options = terms[0].features.options();
  const at::Tensor partials = at::empty({launch.tiles, kTileChannels, kTileChannels}, options.dtype(at::kFloat));
  const at::Tensor band_sums = at::empty({launch.bands}, options.dtype(at::kFloat));
  const at::Tensor arrived = at::empty({launch.count, launch.jobs}, options.dtype(at::kInt));
  launch.partials = partials.mutable_data_ptr<float>();
  launch.band_sums = band_sums.mutable_data_ptr<float>();
  launch.arrived = reinterpret_cast<unsigned*>(arrived.mutable_data_ptr<int>());
  launch_style_fwd<T>(launch, device.stream());
}

// Computes all terms with as few launches as possible: a launch takes up to kLayersPerLaunch layers of one type.
void run(const DeviceContext& device, const std::vector<Term>& terms, bool persistent) {
  for (const auto type : {at::kHalf, at::kBFloat16}) {
    std::vector<Term> of_type;
    for (const Term& term : terms)
      if (term.features.scalar_type() == type) of_type.push_back(term);
    for (size_t first = 0; first < of_type.size(); first += kLayersPerLaunch) {
      const size_t count = std::min<size_t>(kLayersPerLaunch, of_type.size() - first);
      (type == at::kHalf ? launch_terms<Fp16> : launch_terms<Bf16>)(device, &of_type[first], count, persistent);
    }
  }
}

at::Tensor gram(const at::Tensor& features, double scale) {
  check_features("gram", features);
  const DeviceContext device(features);
  if (!has_kernel(device, features)) return gram_by_library(features, scale);
  at::Tensor out = new_square(features, at::kFloat);
  run(device, {{channels_last(features), {}, {}, out, {}, scale}}, false);
  return out;
}

// G = scale * F F^T  =>  dF = scale * (dG + dG^T) F, in the layout of F. Used by autograd.
at::Tensor gram_bwd(const at::Tensor& grad, const at::Tensor& features, double scale) {
  check_features("gram_bwd", features);
  check_square("gram_bwd", "grad", grad, features);
  const DeviceContext device(features);
  const at::Tensor both = (grad + grad.mT()).mul_(scale);
  return at::empty_like(features).copy_(at::bmm(both, summable(features)).view(features.sizes()));
}

// The arguments must have been checked. Terms without a kernel are computed one by one, the others together.
std::tuple<at::Tensor, std::vector<at::Tensor>> style_terms(at::TensorList features, at::TensorList targets,
                                                            const at::Tensor& weights_in, at::ArrayRef<double> scales,
                                                            bool persistent) {
  const DeviceContext device(features[0]);
  const at::Tensor weights = weights_in.contiguous(), losses = at::empty_like(weights);
  std::vector<at::Tensor> diffs;
  std::vector<Term> terms;
  for (const auto l : c10::irange(features.size())) {
    const at::Tensor weight = weights[static_cast<int64_t>(l)], loss = losses[static_cast<int64_t>(l)];
    const auto type = difference_type(features[l]);
    if (has_kernel(device, features[l])) {
      diffs.push_back(new_square(features[l], type));
      terms.push_back({channels_last(features[l]), targets[l].contiguous(), weight, diffs.back(), loss, scales[l]});
    } else {
      at::Tensor difference = gram_by_library(features[l], scales[l]).sub_(targets[l]);
      loss.copy_(difference.square().sum({1, 2}).mul_(weight));
      diffs.push_back(difference.mul_((weight * (4 * scales[l])).view({-1, 1, 1})).to(type));
    }
  }
  run(device, terms, persistent);
  return {losses, std::move(diffs)};
}

std::tuple<at::Tensor, at::Tensor> style_loss(const at::Tensor& features, const at::Tensor& target, double weight,
                                              double scale) {
  check_features("style_loss", features);
  check_square("style_loss", "target", target, features);
  const DeviceContext device(features);
  auto [losses, diffs] =
      style_terms(features, target, at::full({1, features.size(0)}, weight, target.options()), scale, false);
  return {losses[0], diffs[0]};
}

std::tuple<at::Tensor, std::vector<at::Tensor>> style_fwd(at::TensorList features, at::TensorList targets,
                                                          const at::Tensor& weights, at::ArrayRef<double> scales,
                                                          bool persistent) {
  check_style_fwd(features, targets, weights, scales);
  return style_terms(features, targets, weights, scales, persistent);
}

template <typename T>
void update(const DeviceContext& device, const at::Tensor& grad, const at::Tensor& features,
            const std::optional<at::Tensor>& diff, bool relu_mask) {
  auto* const g = static_cast<Bf16*>(grad.mutable_data_ptr());
  const auto* const f = static_cast<const T*>(features.const_data_ptr());
  if (diff) {
    launch_style_bwd(g, f, static_cast<const Bf16*>(diff->const_data_ptr()), features.size(0),
                     features.size(2) * features.size(3), static_cast<int>(features.size(1)), relu_mask,
                     device.stream());
  } else {
    launch_style_bwd_mask(g, f, features.numel(), device.stream());
  }
}

void style_bwd_(const at::Tensor& grad, const at::Tensor& features, const std::optional<at::Tensor>& diff,
                bool relu_mask) {
  check_style_bwd_(grad, features, diff);
  if (!diff && !relu_mask) return;
  const DeviceContext device(features);
  const auto run = features.scalar_type() == at::kHalf ? update<Fp16> : update<Bf16>;
  const bool in_16_bits = is_16_bit(features) && grad.scalar_type() == at::kBFloat16;
  if (diff && in_16_bits && has_kernel(device, features)) {
    const at::Tensor dense_grad = channels_last(grad);  // grad itself when it is channels_last, as in the engine
    run(device, dense_grad, channels_last(features), aligned(diff->contiguous()), relu_mask);
    if (!dense_grad.is_same(grad)) grad.copy_(dense_grad);
  } else if (diff) {
    at::Tensor sum = at::bmm(diff->to(sum_type(features)), summable(features)).view(features.sizes()).add_(grad);
    if (relu_mask) sum.masked_fill_(features <= 0, 0);
    grad.copy_(sum);
  } else if (in_16_bits && grad.strides() == features.strides() && grad.is_non_overlapping_and_dense() &&
             is_aligned(grad) && is_aligned(features)) {  // value by value, in any layout
    run(device, grad, features, diff, relu_mask);
  } else {
    grad.masked_fill_(features <= 0, 0);
  }
}

// dF = grad_loss[b] * D F, in the type and layout of F. Used by autograd; no kernel, because it writes only bfloat16.
at::Tensor style_bwd(const at::Tensor& features, const at::Tensor& diff, const std::optional<at::Tensor>& grad_loss) {
  check_style_bwd(features, diff, grad_loss);
  const DeviceContext device(features);
  at::Tensor by = diff.to(sum_type(features));
  if (grad_loss) by = by * grad_loss->view({-1, 1, 1});
  return at::empty_like(features).copy_(at::bmm(by, summable(features)).view(features.sizes()));
}

}  // namespace
}  // namespace gramophone

GRAMOPHONE_CUDA_KERNELS(m) {
  m.impl("gram", &gramophone::gram);
  m.impl("gram_bwd", &gramophone::gram_bwd);
  m.impl("style_loss", &gramophone::style_loss);
  m.impl("style_fwd", &gramophone::style_fwd);
  m.impl("style_bwd", &gramophone::style_bwd);
  m.impl("style_bwd_", &gramophone::style_bwd_);
}
