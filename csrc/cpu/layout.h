// How a job's features lie in memory: [C, pixels] when contiguous, [pixels, C] when channels_last. Both are dense
// matrices, so every kernel here works on tiles of one or the other and never copies a feature map to turn it.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <cstdint>

namespace gramophone {

// Pixels of a tile. With C = 512 in float32 a tile and its turned copy take 1 MB, one core's L2.
constexpr int64_t kTilePixels = 256;

struct Layout {
  int64_t batch, channels, pixels;
  bool channels_last;
};

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

inline at::Tensor dense_as(const at::Tensor& t, const Layout& layout) {
  return t.contiguous(layout.channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
}

}  // namespace gramophone
