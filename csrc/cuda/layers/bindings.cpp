// max_pool, max_pool_bwd, bias_relu_, bias_relu_pool, pool_codes_bwd, first_layer and first_layer_bwd on CUDA: argument
// checks, result tensors, kernel launches.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <tuple>

#include "checks/layers.h"
#include "cuda/common/device_context.h"
#include "cuda/common/dispatch.h"
#include "cuda/layers/layers.h"
#include "layout.h"

namespace gramophone {
namespace {

Map map_of(const char* op, int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last) {
  constexpr int64_t kMax = std::numeric_limits<int>::max();
  TORCH_CHECK(height <= kMax && width <= kMax / channels, op, ": a row of features must have fewer than 2^31 values, ",
              "got ", width, " pixels of ", channels);
  return {channels_last ? batch : batch * channels, static_cast<int>(height), static_cast<int>(width),
          channels_last ? static_cast<int>(channels) : 1};
}

Map map_of(const char* op, const at::Tensor& features, bool channels_last) {
  return map_of(op, features.size(0), features.size(1), features.size(2), features.size(3), channels_last);
}

at::Tensor max_pool(const at::Tensor& features_in) {
  check_max_pool(features_in);
  const DeviceContext device(features_in);
  const at::Tensor features = dense(features_in);
  at::Tensor pooled = at::empty({features.size(0), features.size(1), features.size(2) / 2, features.size(3) / 2},
                                features.options(), format_of(features));
  const Map map = map_of("max_pool", features, is_channels_last(features));
  for_gradient(features.scalar_type(), features.scalar_type(), [&](auto, auto type) {
    using T = Of<decltype(type)>;
    launch_max_pool(const_data<T>(features), map, mutable_data<T>(pooled), device.stream());
  });
  return pooled;
}

at::Tensor max_pool_bwd(const at::Tensor& grad_in, const at::Tensor& features_in, const at::Tensor& pooled_in,
                        bool relu_mask) {
  check_max_pool_bwd(grad_in, features_in, pooled_in);
  check_same_device("max_pool_bwd", "grad", grad_in, features_in);
  check_same_device("max_pool_bwd", "pooled", pooled_in, features_in);
  const DeviceContext device(features_in);
  const at::Tensor features = dense(features_in);
  const Layout layout = layout_of(features);
  const at::Tensor grad = dense_as(grad_in, layout), pooled = dense_as(pooled_in, layout);
  at::Tensor out = at::empty(features.sizes(), grad.options(), format_of(features));
  const Map map = map_of("max_pool_bwd", features, layout.channels_last);
  for_gradient(grad.scalar_type(), features.scalar_type(), [&](auto grad_type, auto type) {
    using G = Of<decltype(grad_type)>;
    using T = Of<decltype(type)>;
    launch_max_pool_bwd(const_data<G>(grad), const_data<T>(features), const_data<T>(pooled), map, relu_mask,
                        mutable_data<G>(out), device.stream());
  });
  return out;
}

void bias_relu_(const at::Tensor& features, const at::Tensor& bias_in) {
  check_bias_relu("bias_relu_", features, bias_in);
  const DeviceContext device(features);
  const at::Tensor bias = bias_in.contiguous();
  require_aligned("bias_relu_", {features, bias});
  const Map map = map_of("bias_relu_", features, true);
  for_16_bit(features.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_bias_relu(mutable_data<T>(features), const_data<float>(bias), map.planes * map.height * map.width,
                     map.channels, device.stream());
  });
}

std::tuple<at::Tensor, at::Tensor> bias_relu_pool(const at::Tensor& features, const at::Tensor& bias_in) {
  check_bias_relu_pool(features, bias_in);
  const DeviceContext device(features);
  const at::Tensor bias = bias_in.contiguous();
  require_aligned("bias_relu_pool", {features, bias});
  const Map map = map_of("bias_relu_pool", features, true);
  at::Tensor pooled = at::empty({features.size(0), features.size(1), features.size(2) / 2, features.size(3) / 2},
                                features.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor codes = at::empty_like(pooled, pooled.options().dtype(at::kByte));
  for_16_bit(features.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_bias_relu_pool(const_data<T>(features), const_data<float>(bias), map, mutable_data<T>(pooled),
                          mutable_data<uint8_t>(codes), device.stream());
  });
  return {pooled, codes};
}

at::Tensor pool_codes_bwd(const at::Tensor& grad, const at::Tensor& codes, int64_t height, int64_t width) {
  check_pool_codes_bwd(grad, codes, height, width);
  require_aligned("pool_codes_bwd", {grad, codes});
  const DeviceContext device(grad);
  const Map map = map_of("pool_codes_bwd", grad.size(0), grad.size(1), height, width, true);
  at::Tensor out =
      at::empty({grad.size(0), grad.size(1), height, width}, grad.options(), at::MemoryFormat::ChannelsLast);
  launch_pool_codes_bwd(const_data<uint16_t>(grad), const_data<uint8_t>(codes), map, mutable_data<uint16_t>(out),
                        device.stream());
  return out;
}

Colours colours_of(at::ArrayRef<double> scale, at::ArrayRef<double> shift, at::IntArrayRef order) {
  Colours colours{};
  std::copy(scale.begin(), scale.end(), colours.scale);
  std::copy(shift.begin(), shift.end(), colours.shift);
  std::copy(order.begin(), order.end(), colours.order);
  return colours;
}

void require_tensor_cores(const char* op, const DeviceContext& device) {
  TORCH_CHECK(device.has_tensor_cores(), op,
              ": the device must have compute capability 8.0 or later; on older devices ",
              "the network uses torch's convolution");
}

at::Tensor first_layer(const at::Tensor& image, const at::Tensor& weight, const at::Tensor& bias_in,
                       at::ArrayRef<double> scale, at::ArrayRef<double> shift, at::IntArrayRef order) {
  check_first_layer(image, weight, bias_in, scale, shift, order);
  const DeviceContext device(image);
  require_tensor_cores("first_layer", device);
  const at::Tensor bias = bias_in.contiguous();
  const int64_t batch = image.size(0), height = image.size(2), width = image.size(3);
  at::Tensor out = at::empty({batch, weight.size(0), height, width}, weight.options(), at::MemoryFormat::ChannelsLast);
  const Map map = map_of("first_layer", out, true);
  for_16_bit(weight.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_first_layer(const_data<float>(image), const_data<T>(weight), const_data<float>(bias),
                       colours_of(scale, shift, order), batch, map.height, map.width, device.multiprocessors(),
                       mutable_data<T>(out), device.stream());
  });
  return out;
}

at::Tensor first_layer_bwd(const at::Tensor& grad, const at::Tensor& weight, at::ArrayRef<double> scale,
                           at::IntArrayRef order) {
  check_first_layer_bwd(grad, weight, scale, order);
  require_aligned("first_layer_bwd", {grad, weight});
  const DeviceContext device(grad);
  require_tensor_cores("first_layer_bwd", device);
  const Map map = map_of("first_layer_bwd", grad, true);
  at::Tensor image_grad = at::empty({grad.size(0), 3, grad.size(2), grad.size(3)}, grad.options().dtype(at::kFloat));
  for_16_bit(weight.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_first_layer_bwd(const_data<T>(grad), const_data<T>(weight), colours_of(scale, {}, order), map.planes,
                           map.height, map.width, mutable_data<float>(image_grad), device.stream());
  });
  return image_grad;
}

}  // namespace
}  // namespace gramophone

GRAMOPHONE_CUDA_KERNELS(m) {
  m.impl("max_pool", &gramophone::max_pool);
  m.impl("max_pool_bwd", &gramophone::max_pool_bwd);
  m.impl("bias_relu_", &gramophone::bias_relu_);
  m.impl("bias_relu_pool", &gramophone::bias_relu_pool);
  m.impl("pool_codes_bwd", &gramophone::pool_codes_bwd);
  m.impl("first_layer", &gramophone::first_layer);
  m.impl("first_layer_bwd", &gramophone::first_layer_bwd);
}
