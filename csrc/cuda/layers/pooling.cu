// max_pool, max_pool_bwd, and their fused forms for 16-bit maps: bias_relu_, bias_relu_pool, pool_codes_bwd.
//
// All of these kernels are bound by memory. A thread takes one window of up to 16 bytes of channels, so that a warp
// reads and writes whole cache lines, and it has the window's four pixels in flight at once. That is 64 KB per SM with
// half of its threads; 23 KB hide the latency at an H200's 4.3 TB/s (700 ns, 132 SMs).
#include "cuda/common/device.cuh"
#include "cuda/layers/layers.h"

namespace gramophone {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxBlocks = 65535;  // limit of a grid in y and z

template <typename T, int kValues>
struct alignas(sizeof(T) * kValues) Values {
  T at[kValues];
};

// Values per access: 16 bytes, for maps whose pixels are multiples of 16 bytes. Other maps are accessed value by value.
template <typename T>
constexpr int kWide = 16 / sizeof(T);

template <typename T>
GRAMOPHONE_DEVICE float comparable(T x) {
  return to_float(x);
}
GRAMOPHONE_DEVICE double comparable(double x) {
  return x;
}

// Calls visit(plane, y, x, c) for each window of this thread. Every plane has `rows` by `columns` windows; c is the
// channel or the group of channels that one access takes.
template <typename Visit>
GRAMOPHONE_DEVICE void for_each_window(const Map& map, int rows, int columns, const Visit& visit) {
  const unsigned i = blockIdx.x * kThreads + threadIdx.x;
  const int x = i / map.channels, c = i % map.channels;
  if (x >= columns) return;
  for (int64_t plane = blockIdx.z; plane < map.planes; plane += gridDim.z)
    for (int y = blockIdx.y; y < rows; y += gridDim.y) visit(plane, y, x, c);
}

dim3 grid_of(const Map& map, int rows, int columns) {
  const auto at_most = [](int64_t n) { return static_cast<unsigned>(n < kMaxBlocks ? n : kMaxBlocks); };
  return dim3(static_cast<unsigned>(ceil_div(static_cast<int64_t>(columns) * map.channels, kThreads)), at_most(rows),
              at_most(map.planes));
}

// The index of a window's first pixel. Its other pixels are at + map.channels (right) and + map.width * map.channels
// (below).
GRAMOPHONE_DEVICE int64_t window(const Map& map, int64_t plane, int y, int x, int c) {
  return ((plane * map.height + 2 * y) * map.width + 2 * x) * map.channels + c;
}
GRAMOPHONE_DEVICE int64_t pooled_value(const Map& map, int64_t plane, int y, int x, int c) {
  return ((plane * (map.height / 2) + y) * (map.width / 2) + x) * map.channels + c;
}

// Writes the four values of a window, or only those inside the map in a last odd row or column.
template <typename V>
GRAMOPHONE_DEVICE void write_window(const Map& map, int64_t at, int y, int x, const V (&values)[4], V* out) {
  const int64_t down = static_cast<int64_t>(map.width) * map.channels;
  const bool right = 2 * x + 1 < map.width, below = 2 * y + 1 < map.height;
  out[at] = values[0];
  if (right) out[at + map.channels] = values[1];
  if (below) out[at + down] = values[2];
  if (right && below) out[at + down + map.channels] = values[3];
}

template <typename T, int kValues>
__global__ void __launch_bounds__(kThreads)
    max_pool_kernel(const Values<T, kValues>* __restrict__ features, Map map, Values<T, kValues>* __restrict__ pooled) {
  for_each_window(map, map.height / 2, map.width / 2, [&](int64_t plane, int y, int x, int c) {
    const auto* from = features + window(map, plane, y, x, c);
    const int64_t down = static_cast<int64_t>(map.width) * map.channels;
    const Values<T, kValues> pixels[4] = {from[0], from[map.channels], from[down], from[down + map.channels]};
    Values<T, kValues> best = pixels[0];
#pragma unroll
    for (int j = 1; j < 4; ++j)
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        const auto value = comparable(pixels[j].at[i]);
        if (value > comparable(best.at[i]) || value != value) best.at[i] = pixels[j].at[i];  // NaN wins
      }
    pooled[pooled_value(map, plane, y, x, c)] = best;
  });
}

template <typename G, typename T, int kValues>
__global__ void __launch_bounds__(kThreads)
    max_pool_bwd_kernel(const Values<G, kValues>* __restrict__ grad, const Values<T, kValues>* __restrict__ features,
                        const Values<T, kValues>* __restrict__ pooled, Map map, bool mask,
                        Values<G, kValues>* __restrict__ out) {
  for_each_window(map, (map.height + 1) / 2, (map.width + 1) / 2, [&](int64_t plane, int y, int x, int c) {
    const int64_t at = window(map, plane, y, x, c), down = static_cast<int64_t>(map.width) * map.channels;
    Values<G, kValues> shares[4] = {};
    if (x < map.width / 2 && y < map.height / 2) {
      const Values<T, kValues> pixels[3] = {features[at], features[at + map.channels], features[at + down]};
      const int64_t o = pooled_value(map, plane, y, x, c);
      const Values<T, kValues> best = pooled[o];
      const Values<G, kValues> value = grad[o];
#pragma unroll
      for (int i = 0; i < kValues; ++i) {
        bool left = !(mask && comparable(best.at[i]) <= 0);  // the maximum of a ReLU's output is 0: all are masked
#pragma unroll
        for (int j = 0; j < 3; ++j)
          if (left && comparable(pixels[j].at[i]) == comparable(best.at[i])) {
            shares[j].at[i] = value.at[i];
            left = false;
          }
        if (left) shares[3].at[i] = value.at[i];  // the last pixel if no other is equal, as on a CPU
      }
    }
    write_window(map, at, y, x, shares, out);
  });
}

// The biases of eight channels. A sum is rounded to 16 bits before it is compared, as in a separate relu(x + b).
struct Bias {
  float at[8];
};
GRAMOPHONE_DEVICE Bias read_bias(const float* bias, int group) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(bias) + 2 * group);
  const float4 b = __ldg(reinterpret_cast<const float4*>(bias) + 2 * group + 1);
  return {{a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w}};
}
template <typename T>
GRAMOPHONE_DEVICE T biased_relu(T x, float bias) {
  const T sum = from_float<T>(to_float(x) + bias);
  return to_float(sum) <= 0 ? T{} : sum;  // NaN stays NaN
}

constexpr int kAtOnce = 4;  // independent loads per thread

template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_relu_kernel(Values<T, 8>* __restrict__ features, const float* __restrict__ bias, int64_t count, int groups) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * (kAtOnce * kThreads);
  const unsigned group = static_cast<unsigned>(first % groups) + threadIdx.x;
  Values<T, 8> values[kAtOnce];
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const int64_t i = first + k * kThreads + threadIdx.x;
    if (i < count) values[k] = features[i];
  }
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const int64_t i = first + k * kThreads + threadIdx.x;
    if (i >= count) return;
    const Bias add = read_bias(bias, (group + k * kThreads) % groups);
#pragma unroll
    for (int j = 0; j < 8; ++j) values[k].at[j] = biased_relu(values[k].at[j], add.at[j]);
    features[i] = values[k];
  }
}

constexpr uint32_t kAlive = 4;  // bit of a code that is set if the maximum is not masked; the lower bits are its pixel

template <typename T>
__global__ void __launch_bounds__(kThreads)
    bias_relu_pool_kernel(const Values<T, 8>* __restrict__ features, const float* __restrict__ bias, Map map,
                          Values<T, 8>* __restrict__ pooled, uint2* __restrict__ codes) {
  for_each_window(map, map.height / 2, map.width / 2, [&](int64_t plane, int y, int x, int c) {
    const auto* from = features + window(map, plane, y, x, c);
    const int64_t down = static_cast<int64_t>(map.width) * map.channels;
    const Values<T, 8> pixels[4] = {from[0], from[map.channels], from[down], from[down + map.channels]};
    const Bias add = read_bias(bias, c);
    Values<T, 8> result;
    uint32_t halves[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      T best = biased_relu(pixels[0].at[i], add.at[i]);
      uint32_t code = 0;
#pragma unroll
      for (int j = 1; j < 4; ++j) {
        const T next = biased_relu(pixels[j].at[i], add.at[i]);
        const float value = to_float(next);
        if (value > to_float(best) || value != value) best = next, code = j;
      }
      if (!(to_float(best) <= 0)) code |= kAlive;
      halves[i / 4] |= code << (8 * (i % 4));
      result.at[i] = best;
    }
    const int64_t o = pooled_value(map, plane, y, x, c);
    pooled[o] = result;
    codes[o] = uint2{halves[0], halves[1]};
  });
}

__global__ void __launch_bounds__(kThreads)
    pool_codes_bwd_kernel(const Values<uint16_t, 8>* __restrict__ grad, const uint2* __restrict__ codes, Map map,
                          Values<uint16_t, 8>* __restrict__ out) {
  for_each_window(map, (map.height + 1) / 2, (map.width + 1) / 2, [&](int64_t plane, int y, int x, int c) {
    Values<uint16_t, 8> shares[4] = {};
    if (x < map.width / 2 && y < map.height / 2) {
      const int64_t o = pooled_value(map, plane, y, x, c);
      const Values<uint16_t, 8> value = grad[o];
      const uint2 code = codes[o];
      const uint32_t halves[2] = {code.x, code.y};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          shares[j].at[i] = (halves[i / 4] >> (8 * (i % 4)) & 0xff) == (kAlive | j) ? value.at[i] : 0;
    }
    write_window(map, window(map, plane, y, x, c), y, x, shares, out);
  });
}

template <typename... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

Map grouped(Map map, int values) {
  map.channels /= values;
  return map;
}

template <typename V, typename T>
V* as(T* values) {
  return reinterpret_cast<V*>(values);
}

template <int kValues, typename T>
void pool(const T* features, const Map& map, T* pooled, cudaStream_t stream) {
  using V = Values<T, kValues>;
  const Map m = grouped(map, kValues);
  launch("max_pool", max_pool_kernel<T, kValues>, grid_of(m, m.height / 2, m.width / 2), kThreads, 0, stream,
         as<const V>(features), m, as<V>(pooled));
}

template <int kValues, typename G, typename T>
void spread(const G* grad, const T* features, const T* pooled, const Map& map, bool relu_mask, G* out,
            cudaStream_t stream) {
  using V = Values<T, kValues>;
  using W = Values<G, kValues>;
  const Map m = grouped(map, kValues);
  launch("max_pool_bwd", max_pool_bwd_kernel<G, T, kValues>, grid_of(m, (m.height + 1) / 2, (m.width + 1) / 2),
         kThreads, 0, stream, as<const W>(grad), as<const V>(features), as<const V>(pooled), m, relu_mask, as<W>(out));
}

}  // namespace

template <typename T>
void launch_max_pool(const T* features, const Map& map, T* pooled, cudaStream_t stream) {
  if (map.channels % kWide<T> == 0 && aligned(features, pooled))
    pool<kWide<T>>(features, map, pooled, stream);
  else
    pool<1>(features, map, pooled, stream);
}

template <typename G, typename T>
void launch_max_pool_bwd(const G* grad, const T* features, const T* pooled, const Map& map, bool relu_mask, G* out,
                         cudaStream_t stream) {
  static_assert(sizeof(G) == sizeof(T), "a gradient is as wide as its features");
  if (map.channels % kWide<T> == 0 && aligned(grad, features, pooled, out))
    spread<kWide<T>>(grad, features, pooled, map, relu_mask, out, stream);
  else
    spread<1>(grad, features, pooled, map, relu_mask, out, stream);
}

template <typename T>
void launch_bias_relu(T* features, const float* bias, int64_t pixels, int channels, cudaStream_t stream) {
  const int groups = channels / 8;
  const int64_t count = pixels * groups;
  launch("bias_relu_", bias_relu_kernel<T>, dim3(static_cast<unsigned>(ceil_div(count, kAtOnce * kThreads))), kThreads,
         0, stream, as<Values<T, 8>>(features), bias, count, groups);
}

template <typename T>
void launch_bias_relu_pool(const T* features, const float* bias, const Map& map, T* pooled, uint8_t* codes,
                           cudaStream_t stream) {
  const Map m = grouped(map, 8);
  launch("bias_relu_pool", bias_relu_pool_kernel<T>, grid_of(m, m.height / 2, m.width / 2), kThreads, 0, stream,
         as<const Values<T, 8>>(features), bias, m, as<Values<T, 8>>(pooled), as<uint2>(codes));
}

void launch_pool_codes_bwd(const uint16_t* grad, const uint8_t* codes, const Map& map, uint16_t* out,
                           cudaStream_t stream) {
  using V = Values<uint16_t, 8>;
  const Map m = grouped(map, 8);
  launch("pool_codes_bwd", pool_codes_bwd_kernel, grid_of(m, (m.height + 1) / 2, (m.width + 1) / 2), kThreads, 0,
         stream, as<const V>(grad), as<const uint2>(codes), m, as<V>(out));
}

#define GRAMOPHONE_POOL(T) template void launch_max_pool(const T*, const Map&, T*, cudaStream_t);
#define GRAMOPHONE_POOL_BWD(G, T) \
  template void launch_max_pool_bwd(const G*, const T*, const T*, const Map&, bool, G*, cudaStream_t);
#define GRAMOPHONE_BIAS(T)                                                      \
  template void launch_bias_relu(T*, const float*, int64_t, int, cudaStream_t); \
  template void launch_bias_relu_pool(const T*, const float*, const Map&, T*, uint8_t*, cudaStream_t);
GRAMOPHONE_POOL(float)
GRAMOPHONE_POOL(double)
GRAMOPHONE_POOL(Fp16)
GRAMOPHONE_POOL(Bf16)
GRAMOPHONE_POOL_BWD(float, float)
GRAMOPHONE_POOL_BWD(double, double)
GRAMOPHONE_POOL_BWD(Fp16, Fp16)
GRAMOPHONE_POOL_BWD(Bf16, Bf16)
GRAMOPHONE_POOL_BWD(Bf16, Fp16)
GRAMOPHONE_BIAS(Fp16)
GRAMOPHONE_BIAS(Bf16)

}  // namespace gramophone
