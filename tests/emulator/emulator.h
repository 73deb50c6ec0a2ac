// Emulates a GPU on one CPU thread, so that the kernels' own source runs and is tested on machines without a GPU.
//
// csrc/cuda/common/launch_types.h includes this file in place of CUDA's headers if GRAMOPHONE_EMULATED is defined.
// Every thread of a block is a fiber, which runs until a barrier, a warp-wide instruction or its end. The emulator
// finds wrong indices, fragments, swizzles, sums and dependence on the order of blocks. It finds those missing barriers
// that matter in some order of warps (`order`). Shared memory starts as NaN, an access beyond it through the functions
// below is an error, and asynchronous copies arrive only when they are waited for. The emulator does not find races
// between running blocks, and says nothing about registers and speed. For tests of what happens to wrong results,
// `break_kernel` makes a kernel wrong while the tests run.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <stdexcept>
#include <string>

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
using cudaStream_t = void*;

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after another
#define __ldg(pointer) (*(pointer))

// The indices of the running fiber.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

namespace emulator {

constexpr int kLanes = 32;

// Runs `body`, the kernel `name`, once per thread of every block. Throws std::runtime_error if a fiber calls `fail` or
// all of them are blocked.
void run(const char* name, const dim3& grid, int threads, size_t shared_bytes, const std::function<void()>& body);

// What can be made wrong in a kernel. The numbers are those of `Fault` in tests/support/emulated.py.
enum class Fault {
  kNone,
  kLastBlock,     // the last block does not run
  kLastThread,    // the last thread of a block has the index of the one before it
  kBarrier,       // threads do not wait at __syncthreads
  kCopy,          // waits for asynchronous copies return one group too early
  kProduct,       // a tensor core leaves out one of its products
  kUnrepeatable,  // every second launch lacks its last block
  kRefused,       // the launch fails
};

// Kernels launched as `name` have this fault from now on, and all other kernels none.
void break_kernel(const std::string& name, Fault fault);
// The names of the kernels launched since the last call, each with a comma behind it.
std::string launched();
// Whether the running kernel leaves out the first product of element `element` of lane `lane` of an mma.
bool loses_product(int lane, int element);

// 0 runs blocks and warps in order, 1 in reverse; any other number is the seed of a shuffle of both.
void order(uint64_t seed);

unsigned char* shared_memory();
size_t shared_bytes();
void barrier();  // __syncthreads
// Waits for all lanes of the warp. The last lane calls `together` for all of them, with the `mine` of each.
void warp(void (*together)(void* (&lanes)[kLanes]), void* mine);
[[noreturn]] void fail(const std::string& why);
void copy_async(void* shared, const void* global, int bytes);
void commit();
void wait(int groups_left);

inline void require_shared(const void* p, size_t bytes) {
  const auto* at = static_cast<const unsigned char*>(p);
  if (at < shared_memory() || at + bytes > shared_memory() + shared_bytes())
    fail("an address outside dynamic shared memory");
  if (reinterpret_cast<uintptr_t>(p) % bytes) fail("a misaligned address in shared memory");
}

}  // namespace emulator

inline void __syncthreads() {
  emulator::barrier();
}
inline void __syncwarp() {
  emulator::warp([](void*(&)[emulator::kLanes]) {}, nullptr);
}
inline void __threadfence() {}

template <typename T>
T __shfl_sync(unsigned, T value, int from) {
  struct Lane {
    T value;
    int from;
    T got;
  } lane{value, from & 31, T{}};
  emulator::warp(
      [](void*(&lanes)[emulator::kLanes]) {
        for (void* p : lanes) {
          auto* to = static_cast<Lane*>(p);
          to->got = static_cast<Lane*>(lanes[to->from])->value;
        }
      },
      &lane);
  return lane.got;
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int with) {
  return __shfl_sync(mask, value, static_cast<int>(threadIdx.x % 32) ^ with);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, int by) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  return __shfl_sync(mask, value, lane + by < 32 ? lane + by : lane);
}
inline int __any_sync(unsigned, int predicate) {
  struct Lane {
    int predicate, any;
  } lane{predicate, 0};
  emulator::warp(
      [](void*(&lanes)[emulator::kLanes]) {
        int any = 0;
        for (void* p : lanes) any |= static_cast<Lane*>(p)->predicate;
        for (void* p : lanes) static_cast<Lane*>(p)->any = any != 0;
      },
      &lane);
  return lane.any;
}

// Threads run one after another, so plain code is atomic.
template <typename T>
T atomicAdd(T* at, T by) {
  const T before = *at;
  *at += by;
  return before;
}
template <typename T>
T atomicOr(T* at, T with) {
  const T before = *at;
  *at |= with;
  return before;
}

inline float __expf(float x) {
  return std::exp(x);
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
