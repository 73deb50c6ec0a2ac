// max_pool, max_pool_bwd: 2x2 windows, stride 2; a last odd row or column belongs to no window.
//
// torch's own pooling writes int64 indices, four times the bytes of a pooled 16-bit map, and its backward first clears
// the gradient and then scatters. This backward finds the maximum again and writes each value once, with the ReLU mask
// of the layer below in the same pass. Of equal values the first of the four is the maximum, as in torch.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>

#include "checks/layers.h"
#include "cpu/vectorise.h"
#include "layout.h"

namespace gramophone {
namespace {

// The four pixels of a window are a, b (first row) and c, d (second row). `step` is the distance of the n values: with
// channels_last they are the channels of one window, otherwise the windows of one row of one channel, two values apart.
template <typename T>
GRAMOPHONE_INLINE void pool_row(const T* top, const T* bottom, int64_t right, int64_t step, int64_t n, T* out) {
  for (int64_t i = 0; i < n; ++i) {
    const auto a = load(top[i * step]), b = load(top[i * step + right]);
    const auto c = load(bottom[i * step]), d = load(bottom[i * step + right]);
    auto best = b > a || b != b ? b : a;  // a NaN in any pixel is the result
    best = c > best || c != c ? c : best;
    best = d > best || d != d ? d : best;
    store(best, out[i]);
  }
}

template <typename G, typename T>
GRAMOPHONE_INLINE void spread_row(const G* __restrict grad, const T* __restrict pooled, const T* __restrict top,
                                  const T* __restrict bottom, int64_t right, int64_t step, int64_t n, bool mask,
                                  G* __restrict to_top, G* __restrict to_bottom) {
  for (int64_t i = 0; i < n; ++i) {
    const auto best = load(pooled[i]);
    const auto value = mask && best <= 0 ? 0 : load(grad[i]);  // the maximum of a ReLU's output is 0: all are masked
    auto left = value;                                         // until a pixel takes it; the last pixel takes the rest
    const auto give = [&](auto pixel) GRAMOPHONE_INLINE_LAMBDA {
      const auto share = pixel == best ? left : 0;
      left = pixel == best ? 0 : left;
      return share;
    };
    store(give(load(top[i * step])), to_top[i * step]);
    store(give(load(top[i * step + right])), to_top[i * step + right]);
    store(give(load(bottom[i * step])), to_bottom[i * step]);
    store(left, to_bottom[i * step + right]);
  }
}

// Each has two calls with a constant step, so that the compiler sees unit stride in the channels_last loop.
#define GRAMOPHONE_POOL(T)                                                                                      \
  GRAMOPHONE_VECTORISED void pool(const T* top, const T* bottom, int64_t right, bool last, int64_t n, T* out) { \
    last ? pool_row(top, bottom, right, 1, n, out) : pool_row(top, bottom, 1, 2, n, out);                       \
  }
#define GRAMOPHONE_SPREAD(G, T)                                                                                   \
  GRAMOPHONE_VECTORISED void spread(const G* grad, const T* pooled, const T* top, const T* bottom, int64_t right, \
                                    bool last, int64_t n, bool mask, G* to_top, G* to_bottom) {                   \
    last ? spread_row(grad, pooled, top, bottom, right, 1, n, mask, to_top, to_bottom)                            \
         : spread_row(grad, pooled, top, bottom, 1, 2, n, mask, to_top, to_bottom);                               \
  }
GRAMOPHONE_POOL(float)
GRAMOPHONE_POOL(double)
GRAMOPHONE_POOL(at::Half)
GRAMOPHONE_POOL(at::BFloat16)
GRAMOPHONE_SPREAD(float, float)
GRAMOPHONE_SPREAD(double, double)
GRAMOPHONE_SPREAD(at::Half, at::Half)
GRAMOPHONE_SPREAD(at::BFloat16, at::BFloat16)
GRAMOPHONE_SPREAD(at::BFloat16, at::Half)
#undef GRAMOPHONE_POOL
#undef GRAMOPHONE_SPREAD

struct Windows {
  int64_t planes, height, width, channels;  // channels_last: a plane is a job; else a channel of a job, with channels 1
  bool channels_last;
};

Windows windows_of(const at::Tensor& features) {
  const bool last = is_channels_last(features);
  return {last ? features.size(0) : features.size(0) * features.size(1), features.size(2), features.size(3),
          last ? features.size(1) : 1, last};
}

// Calls visit(offset in features, offset in pooled, number of values) for every row of windows, or for every window
// with channels_last.
template <typename Visit>
void for_each_row(const Windows& w, const Visit& visit) {
  const int64_t rows = w.height / 2, columns = w.width / 2;
  at::parallel_for(0, w.planes * rows, std::max<int64_t>(1, (1 << 14) / (columns * w.channels)),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t from = ((i / rows) * w.height + 2 * (i % rows)) * w.width * w.channels;
                       const int64_t to = i * columns * w.channels;
                       if (!w.channels_last) {
                         visit(from, to, columns);
                         continue;
                       }
                       for (int64_t x = 0; x < columns; ++x)
                         visit(from + 2 * x * w.channels, to + x * w.channels, w.channels);
                     }
                   });
}

template <typename T>
void pool_all(const at::Tensor& features, const at::Tensor& pooled) {
  const Windows w = windows_of(features);
  const T* from = features.const_data_ptr<T>();
  T* to = pooled.mutable_data_ptr<T>();
  const int64_t down = w.width * w.channels;
  for_each_row(w, [&](int64_t i, int64_t o, int64_t n) {
    pool(from + i, from + i + down, w.channels, w.channels_last, n, to + o);
  });
}

template <typename G, typename T>
void spread_all(const at::Tensor& grad, const at::Tensor& features, const at::Tensor& pooled, bool mask,
                const at::Tensor& out) {
  const Windows w = windows_of(features);
  const T *f = features.const_data_ptr<T>(), *p = pooled.const_data_ptr<T>();
  const G* g = grad.const_data_ptr<G>();
  G* to = out.mutable_data_ptr<G>();
  const int64_t down = w.width * w.channels;
  for_each_row(w, [&](int64_t i, int64_t o, int64_t n) {
    spread(g + o, p + o, f + i, f + i + down, w.channels, w.channels_last, n, mask, to + i, to + i + down);
  });
}

#define GRAMOPHONE_DISPATCH(type, call) \
  switch (type) {                       \
    case at::kFloat:                    \
      call(float);                      \
      break;                            \
    case at::kDouble:                   \
      call(double);                     \
      break;                            \
    case at::kHalf:                     \
      call(at::Half);                   \
      break;                            \
    default:                            \
      call(at::BFloat16);               \
  }

at::Tensor max_pool(const at::Tensor& features_in) {
  check_max_pool(features_in);
  const at::Tensor features = dense(features_in);
  at::Tensor pooled = at::empty({features.size(0), features.size(1), features.size(2) / 2, features.size(3) / 2},
                                features.options(), format_of(features));
#define CALL(T) pool_all<T>(features, pooled)
  GRAMOPHONE_DISPATCH(features.scalar_type(), CALL)
#undef CALL
  return pooled;
}

at::Tensor max_pool_bwd(const at::Tensor& grad_in, const at::Tensor& features_in, const at::Tensor& pooled_in,
                        bool relu_mask) {
  check_max_pool_bwd(grad_in, features_in, pooled_in);
  const at::Tensor features = dense(features_in);
  const Layout layout = layout_of(features);
  const at::Tensor grad = dense_as(grad_in, layout), pooled = dense_as(pooled_in, layout);
  at::Tensor out = at::empty_like(features, grad.scalar_type());
  if (features.size(2) % 2 || features.size(3) % 2) out.zero_();  // the odd row or column is in no window
  if (grad.scalar_type() != features.scalar_type()) {
    spread_all<at::BFloat16, at::Half>(grad, features, pooled, relu_mask, out);
    return out;
  }
#define CALL(T) spread_all<T, T>(grad, features, pooled, relu_mask, out)
  GRAMOPHONE_DISPATCH(features.scalar_type(), CALL)
#undef CALL
  return out;
}

}  // namespace
}  // namespace gramophone

TORCH_LIBRARY_IMPL(gramophone, CPU, m) {
  m.impl("max_pool", &gramophone::max_pool);
  m.impl("max_pool_bwd", &gramophone::max_pool_bwd);
}
