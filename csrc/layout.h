// Memory layouts of feature maps, for all devices.
//
// A job's features are a dense matrix: [C, pixels] in a contiguous tensor, [pixels, C] in a channels_last tensor. The
// kernels work on tiles of either layout and never copy a feature map to transpose it.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace gramophone {

struct Layout {
  int64_t batch, channels, pixels;
  bool channels_last;
};

// A tensor that is dense in both layouts, such as one with a single channel, counts as contiguous.
inline bool is_channels_last(const at::Tensor& t) {
  return t.is_contiguous(at::MemoryFormat::ChannelsLast) && !(t.is_contiguous() && t.size(1) > 1);
}

// The tensor itself if it is dense in one of the two layouts, else a contiguous copy.
inline at::Tensor dense(const at::Tensor& t) {
  return is_channels_last(t) ? t : t.contiguous();
}

inline Layout layout_of(const at::Tensor& t) {
  return {t.size(0), t.size(1), t.size(2) * t.size(3), is_channels_last(t)};
}

inline at::MemoryFormat format_of(const at::Tensor& dense) {
  return is_channels_last(dense) ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The tensor itself if it has this layout, else a copy that has it.
inline at::Tensor dense_as(const at::Tensor& t, const Layout& layout) {
  return t.contiguous(layout.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

}  // namespace gramophone
