// The ops of line.h for tensors: contracts, results, and which kernel.
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <limits>
#include <tuple>
#include <type_traits>

#include "../checks.h"
#include "../cpu/layout.h"
#include "context.h"
#include "line.h"

namespace gramophone {
namespace {

template <typename T>
const T* read(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* write(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
struct Type {
  using type = T;
};
template <typename T>
using Of = typename T::type;

// call(Type<T>) with the kernels' type for torch's.
template <typename Call>
void for_16_bit(at::ScalarType type, const Call& call) {
  if (type == at::kHalf)
    call(Type<Fp16>{});
  else
    call(Type<Bf16>{});
}

// call(Type<G>, Type<T>), G the gradient's type: the features' T, or bfloat16 where they are float16.
template <typename Call>
void for_gradient(at::ScalarType gradient, at::ScalarType features, const Call& call) {
  if (features == at::kFloat)
    call(Type<float>{}, Type<float>{});
  else if (features == at::kDouble)
    call(Type<double>{}, Type<double>{});
  else if (features == at::kBFloat16)
    call(Type<Bf16>{}, Type<Bf16>{});
  else if (gradient == at::kHalf)
    call(Type<Fp16>{}, Type<Fp16>{});
  else
    call(Type<Bf16>{}, Type<Fp16>{});
}

void require_aligned(const char* op, std::initializer_list<at::Tensor> tensors) {
  for (const at::Tensor& t : tensors)
    TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0, op,
                ": tensors must start at a multiple of 16 bytes, got one of ", t.sizes(), " at an offset of ",
                t.storage_offset());
}

Map map_of(const char* op, int64_t batch, int64_t channels, int64_t height, int64_t width, bool channels_last) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  TORCH_CHECK(height <= kMost && width <= kMost / channels, op,
              ": a row of features must have fewer than 2^31 values, ", "got ", width, " pixels of ", channels);
  return {channels_last ? batch : batch * channels, static_cast<int>(height), static_cast<int>(width),
          channels_last ? static_cast<int>(channels) : 1};
}

Map map_of(const char* op, const at::Tensor& features, bool channels_last) {
  return map_of(op, features.size(0), features.size(1), features.size(2), features.size(3), channels_last);
}

at::MemoryFormat format_of(const at::Tensor& dense) {
  return is_channels_last(dense) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

at::Tensor max_pool(const at::Tensor& any) {
  check_max_pool(any);
  const OnDeviceOf here(any);
  const at::Tensor features = dense(any);
  at::Tensor pooled = at::empty({features.size(0), features.size(1), features.size(2) / 2, features.size(3) / 2},
                                features.options(), format_of(features));
  const Map map = map_of("max_pool", features, is_channels_last(features));
  for_gradient(features.scalar_type(), features.scalar_type(), [&](auto, auto type) {
    using T = Of<decltype(type)>;
    launch_max_pool(read<T>(features), map, write<T>(pooled), here.stream());
  });
  return pooled;
}

at::Tensor max_pool_bwd(const at::Tensor& any_grad, const at::Tensor& any, const at::Tensor& any_pooled,
                        bool relu_mask) {
  check_max_pool_bwd(any_grad, any, any_pooled);
  check_beside("max_pool_bwd", "grad", any_grad, any);
  check_beside("max_pool_bwd", "pooled", any_pooled, any);
  const OnDeviceOf here(any);
  const at::Tensor features = dense(any);
  const Layout layout = layout_of(features);
  const at::Tensor grad = dense_as(any_grad, layout), pooled = dense_as(any_pooled, layout);
  at::Tensor out = at::empty(features.sizes(), grad.options(), format_of(features));
  const Map map = map_of("max_pool_bwd", features, layout.channels_last);
  for_gradient(grad.scalar_type(), features.scalar_type(), [&](auto of_grad, auto type) {
    using G = Of<decltype(of_grad)>;
    using T = Of<decltype(type)>;
    launch_max_pool_bwd(read<G>(grad), read<T>(features), read<T>(pooled), map, relu_mask, write<G>(out),
                        here.stream());
  });
  return out;
}

void bias_relu_(const at::Tensor& features, const at::Tensor& any_bias) {
  check_bias_relu("bias_relu_", features, any_bias);
  const OnDeviceOf here(features);
  const at::Tensor bias = any_bias.contiguous();
  require_aligned("bias_relu_", {features, bias});
  const Map map = map_of("bias_relu_", features, true);
  for_16_bit(features.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_bias_relu(write<T>(features), read<float>(bias), map.planes * map.height * map.width, map.channels,
                     here.stream());
  });
}

std::tuple<at::Tensor, at::Tensor> bias_relu_pool(const at::Tensor& features, const at::Tensor& any_bias) {
  check_bias_relu_pool(features, any_bias);
  const OnDeviceOf here(features);
  const at::Tensor bias = any_bias.contiguous();
  require_aligned("bias_relu_pool", {features, bias});
  const Map map = map_of("bias_relu_pool", features, true);
  at::Tensor pooled = at::empty({features.size(0), features.size(1), features.size(2) / 2, features.size(3) / 2},
                                features.options(), at::MemoryFormat::ChannelsLast);
  at::Tensor codes = at::empty_like(pooled, pooled.options().dtype(at::kByte));
  for_16_bit(features.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_bias_relu_pool(read<T>(features), read<float>(bias), map, write<T>(pooled), write<uint8_t>(codes),
                          here.stream());
  });
  return {pooled, codes};
}

at::Tensor pool_codes_bwd(const at::Tensor& grad, const at::Tensor& codes, int64_t height, int64_t width) {
  check_pool_codes_bwd(grad, codes, height, width);
  require_aligned("pool_codes_bwd", {grad, codes});
  const OnDeviceOf here(grad);
  const Map map = map_of("pool_codes_bwd", grad.size(0), grad.size(1), height, width, true);
  at::Tensor out =
      at::empty({grad.size(0), grad.size(1), height, width}, grad.options(), at::MemoryFormat::ChannelsLast);
  launch_pool_codes_bwd(read<uint16_t>(grad), read<uint8_t>(codes), map, write<uint16_t>(out), here.stream());
  return out;
}

Colours colours_of(at::ArrayRef<double> scale, at::ArrayRef<double> shift, at::IntArrayRef order) {
  Colours colours{};
  std::copy(scale.begin(), scale.end(), colours.scale);
  std::copy(shift.begin(), shift.end(), colours.shift);
  std::copy(order.begin(), order.end(), colours.order);
  return colours;
}

void require_tensor_cores(const char* op, const OnDeviceOf& here) {
  TORCH_CHECK(here.has_tensor_cores(), op, ": the device must have compute capability 8.0 or later; on older ones the ",
              "layer goes through torch's convolution");
}

at::Tensor first_layer(const at::Tensor& image, const at::Tensor& weight, const at::Tensor& any_bias,
                       at::ArrayRef<double> scale, at::ArrayRef<double> shift, at::IntArrayRef order) {
  check_first_layer(image, weight, any_bias, scale, shift, order);
  const OnDeviceOf here(image);
  require_tensor_cores("first_layer", here);
  const at::Tensor bias = any_bias.contiguous();
  const int64_t batch = image.size(0), height = image.size(2), width = image.size(3);
  at::Tensor out = at::empty({batch, weight.size(0), height, width}, weight.options(), at::MemoryFormat::ChannelsLast);
  const Map map = map_of("first_layer", out, true);
  for_16_bit(weight.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_first_layer(read<float>(image), read<T>(weight), read<float>(bias), colours_of(scale, shift, order), batch,
                       map.height, map.width, here.multiprocessors(), write<T>(out), here.stream());
  });
  return out;
}

at::Tensor first_layer_bwd(const at::Tensor& grad, const at::Tensor& weight, at::ArrayRef<double> scale,
                           at::IntArrayRef order) {
  check_first_layer_bwd(grad, weight, scale, order);
  require_aligned("first_layer_bwd", {grad, weight});
  const OnDeviceOf here(grad);
  require_tensor_cores("first_layer_bwd", here);
  const Map map = map_of("first_layer_bwd", grad, true);
  at::Tensor image_grad = at::empty({grad.size(0), 3, grad.size(2), grad.size(3)}, grad.options().dtype(at::kFloat));
  for_16_bit(weight.scalar_type(), [&](auto type) {
    using T = Of<decltype(type)>;
    launch_first_layer_bwd(read<T>(grad), read<T>(weight), colours_of(scale, {}, order), map.planes, map.height,
                           map.width, write<float>(image_grad), here.stream());
  });
  return image_grad;
}

at::Tensor content_(const at::Tensor& any_grad, const at::Tensor& any, const at::Tensor& any_target,
                    const at::Tensor& any_weight, bool relu_mask) {
  check_content(any_grad, any, any_target, any_weight);
  const OnDeviceOf here(any);
  const at::Tensor features = dense(any);
  const Layout layout = layout_of(features);
  const at::Tensor target = dense_as(any_target, layout);
  const at::Tensor grad = dense_as(any_grad, layout);  // any_grad itself when both have one layout, as in the engine
  const at::Tensor weight = any_weight.to(sum_type(features)).contiguous();
  const int64_t batch = features.size(0), elements = features.numel() / batch;
  const at::Tensor partials = at::empty({batch * content_blocks(elements)}, weight.options());
  const at::Tensor loss = at::empty({batch}, weight.options());
  for_gradient(grad.scalar_type(), features.scalar_type(), [&](auto of_grad, auto type) {
    using G = Of<decltype(of_grad)>;
    using T = Of<decltype(type)>;
    using S = std::conditional_t<std::is_same_v<T, double>, double, float>;
    launch_content(write<G>(grad), read<T>(features), read<T>(target), read<S>(weight), batch, elements, relu_mask,
                   write<S>(partials), write<S>(loss), here.stream());
  });
  if (!grad.is_same(any_grad)) any_grad.copy_(grad);
  return loss.to(any_weight.scalar_type());
}

at::Tensor tv_(const at::Tensor& grad, const at::Tensor& image, const at::Tensor& any_weight) {
  check_tv(grad, image, any_weight);
  TORCH_CHECK(image.scalar_type() == at::kFloat, "tv_: image must be float32 on a GPU, got ", image.scalar_type());
  const int64_t batch = image.size(0);
  TORCH_CHECK(image.numel() / batch <= std::numeric_limits<int>::max(),
              "tv_: an image must have fewer than 2^31 values, got ", image.sizes());
  const OnDeviceOf here(image);
  const at::Tensor weight = any_weight.contiguous();
  const int height = static_cast<int>(image.size(2)), width = static_cast<int>(image.size(3));
  const at::Tensor partials = at::empty({batch * tv_blocks(height, width)}, weight.options());
  at::Tensor loss = at::empty({batch}, weight.options());
  launch_tv(write<float>(grad), read<float>(image), read<float>(weight), batch, height, width, write<float>(partials),
            write<float>(loss), here.stream());
  return loss;
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
  m.impl("content_", &gramophone::content_);
  m.impl("tv_", &gramophone::tv_);
}
