// Building blocks of the kernels: 16-bit floats, tensor-core tiles, asynchronous copies, sums, launches.
//
// Plain CUDA without torch. With GRAMOPHONE_EMULATED the same kernels are compiled for the CPU, for tests
// (tests/emulator).
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

#ifndef GRAMOPHONE_EMULATED
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "cuda/common/launch_types.h"

#define GRAMOPHONE_DEVICE __device__ __forceinline__

namespace gramophone {

// Eight 16-bit floats: what one thread reads or writes at once.
template <typename T>
struct alignas(16) Eight {
  T at[8];
};

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

// Conversions, rounded to nearest even

#ifdef GRAMOPHONE_EMULATED
inline float to_float(float x) {
  return x;
}
inline float to_float(Fp16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return static_cast<float>(half);
}
inline float to_float(Bf16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
template <typename T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline Fp16 from_float<Fp16>(float x) {
  const auto half = static_cast<_Float16>(x);
  Fp16 out;
  std::memcpy(&out.bits, &half, 2);
  return out;
}
template <>
inline Bf16 from_float<Bf16>(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return {static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16)};
}
#else
GRAMOPHONE_DEVICE float to_float(float x) {
  return x;
}
GRAMOPHONE_DEVICE float to_float(Fp16 x) {
  return __half2float(__ushort_as_half(x.bits));
}
GRAMOPHONE_DEVICE float to_float(Bf16 x) {
  return __bfloat162float(__ushort_as_bfloat16(x.bits));
}
template <typename T>
GRAMOPHONE_DEVICE T from_float(float x);
template <>
GRAMOPHONE_DEVICE float from_float<float>(float x) {
  return x;
}
template <>
GRAMOPHONE_DEVICE Fp16 from_float<Fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}
template <>
GRAMOPHONE_DEVICE Bf16 from_float<Bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
#endif

// Two adjacent values in one register, the first in the low half.
template <typename T>
GRAMOPHONE_DEVICE uint32_t pair(T low, T high) {
  return static_cast<uint32_t>(low.bits) | static_cast<uint32_t>(high.bits) << 16;
}
template <typename T>
GRAMOPHONE_DEVICE T low(uint32_t both) {
  return {static_cast<uint16_t>(both)};
}
template <typename T>
GRAMOPHONE_DEVICE T high(uint32_t both) {
  return {static_cast<uint16_t>(both >> 16)};
}

// A register of two values converted to another type, for an mma whose other operand has that type.
template <typename To, typename From>
GRAMOPHONE_DEVICE uint32_t converted(uint32_t both) {
  return pair(from_float<To>(to_float(low<From>(both))), from_float<To>(to_float(high<From>(both))));
}
template <>
GRAMOPHONE_DEVICE uint32_t converted<Bf16, Bf16>(uint32_t both) {
  return both;
}
template <>
GRAMOPHONE_DEVICE uint32_t converted<Fp16, Fp16>(uint32_t both) {
  return both;
}

// Tensor cores: sum += A B with A 16x16 (rows x k), B 16x8 (k x columns), sum 16x8 in float
//
// Lane l with g = l / 4 and t = l % 4 holds (PTX ISA, mma.m16n8k16, 16-bit):
//   a[0] = A[g][2t, 2t+1]      a[1] = A[g+8][2t, 2t+1]    a[2] = A[g][2t+8, 2t+9]    a[3] = A[g+8][2t+8, 2t+9]
//   b0 = B[2t, 2t+1][g]        b1 = B[2t+8, 2t+9][g]
//   sum[0, 1] = S[g][2t, 2t+1] sum[2, 3] = S[g+8][2t, 2t+1]
// So if X has 16 rows, the fragment of B = X[8h..8h+7]^T is {a[h], a[2 + h]} of the fragment of A = X: in F F^T one
// load serves both operands.

template <typename T>
GRAMOPHONE_DEVICE void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

// Loads four 8x8 tiles of 16-bit values from dynamic shared memory. Lane l passes the address of row l % 8 of tile l /
// 8, 16 bytes; r[i] of lane l receives row l / 4, columns 2(l % 4) and 2(l % 4) + 1, of tile i. In the transposed
// version rows and columns are exchanged.
GRAMOPHONE_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row);
GRAMOPHONE_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row);

// Copies 16 bytes from global to dynamic shared memory asynchronously. Groups of copies complete in order.
GRAMOPHONE_DEVICE void copy_async(void* shared, const void* global);
GRAMOPHONE_DEVICE void copy_commit();
template <int kGroupsLeft>
GRAMOPHONE_DEVICE void copy_wait();

// The block's dynamic shared memory, aligned to 1024 bytes.
GRAMOPHONE_DEVICE unsigned char* shared_memory();

#ifdef GRAMOPHONE_EMULATED
template <typename T>
inline void mma(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* sum;
    uint32_t a[4], b[2];
  } lane{sum, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::warp(
      [](void*(&lanes)[emulator::kLanes]) {
        float A[16][16], B[16][8];
        for (int l = 0; l < 32; ++l) {
          const auto* from = static_cast<Lane*>(lanes[l]);
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 4; ++i) {
            A[g + i % 2 * 8][2 * t + i / 2 * 8] = to_float(low<T>(from->a[i]));
            A[g + i % 2 * 8][2 * t + i / 2 * 8 + 1] = to_float(high<T>(from->a[i]));
          }
          for (int i = 0; i < 2; ++i) {
            B[2 * t + 8 * i][g] = to_float(low<T>(from->b[i]));
            B[2 * t + 8 * i + 1][g] = to_float(high<T>(from->b[i]));
          }
        }
        for (int l = 0; l < 32; ++l) {
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 4; ++i) {
            float& to = static_cast<Lane*>(lanes[l])->sum[i];
            for (int k = emulator::loses_product(l, i) ? 1 : 0; k < 16; ++k)
              to += A[g + i / 2 * 8][k] * B[k][2 * t + i % 2];
          }
        }
      },
      &lane);
}

inline void load_tiles(uint32_t (&r)[4], const void* row, bool transposed) {
  struct Lane {
    const void* row;
    uint32_t* r;
    bool transposed;
  } lane{row, r, transposed};
  emulator::require_shared(row, 16);
  emulator::warp(
      [](void*(&lanes)[emulator::kLanes]) {
        for (int l = 0; l < 32; ++l) {
          auto* to = static_cast<Lane*>(lanes[l]);
          const int g = l / 4, t = l % 4;
          for (int i = 0; i < 4; ++i) {
            const auto at = [&](int r, int c) {
              uint16_t value;
              std::memcpy(&value, static_cast<const char*>(static_cast<Lane*>(lanes[8 * i + r])->row) + 2 * c, 2);
              return static_cast<uint32_t>(value);
            };
            to->r[i] = to->transposed ? at(2 * t, g) | at(2 * t + 1, g) << 16 : at(g, 2 * t) | at(g, 2 * t + 1) << 16;
          }
        }
      },
      &lane);
}
inline void ldmatrix(uint32_t (&r)[4], const void* row) {
  load_tiles(r, row, false);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  load_tiles(r, row, true);
}
inline void copy_async(void* shared, const void* global) {
  emulator::copy_async(shared, global, 16);
}
inline void copy_commit() {
  emulator::commit();
}
template <int kGroupsLeft>
inline void copy_wait() {
  emulator::wait(kGroupsLeft);
}
inline unsigned char* shared_memory() {
  return emulator::shared_memory();
}
#else
// Devices before sm_80 have no mma of this shape and no asynchronous copy. The kernels that use them are never launched
// there (has_tensor_cores in device_context.h), but every file is compiled for every target.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
#define GRAMOPHONE_ASM(...) __trap()
#else
#define GRAMOPHONE_ASM(...) asm volatile(__VA_ARGS__)
#endif

GRAMOPHONE_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

template <>
GRAMOPHONE_DEVICE void mma<Fp16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  GRAMOPHONE_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(sum[0]),
      "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
GRAMOPHONE_DEVICE void mma<Bf16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  GRAMOPHONE_ASM(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" : "+f"(sum[0]),
      "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
GRAMOPHONE_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
  GRAMOPHONE_ASM("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]),
                 "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
GRAMOPHONE_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
  GRAMOPHONE_ASM("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];" : "=r"(r[0]), "=r"(r[1]),
                 "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}
GRAMOPHONE_DEVICE void copy_async(void* shared, const void* global) {
  GRAMOPHONE_ASM("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(shared_address(shared)),
                 "l"(global) : "memory");
}
GRAMOPHONE_DEVICE void copy_commit() {
  GRAMOPHONE_ASM("cp.async.commit_group;" :: : "memory");
}
template <int kGroupsLeft>
GRAMOPHONE_DEVICE void copy_wait() {
  GRAMOPHONE_ASM("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}
GRAMOPHONE_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char bytes[];
  return bytes;
}
#endif

// Sums in a fixed order, so that two runs have the same bits

GRAMOPHONE_DEVICE float warp_sum(float x) {
#pragma unroll
  for (int by = kWarp / 2; by > 0; by /= 2) x += __shfl_xor_sync(kAllLanes, x, by);
  return x;
}

// The sum over the block's threads (a multiple of 32), returned to all of them. `scratch` is shared memory, one float
// per warp; it can be reused after the call.
GRAMOPHONE_DEVICE float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = x;
  __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x / kWarp; ++i) sum += scratch[i];
  __syncthreads();
  return sum;
}

// Launches

// Launches `kernel` with this many blocks, threads per block and bytes of dynamic shared memory. Throws
// std::runtime_error, with `name` in the message, if the device refuses the launch.
template <typename... Parameters, typename... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 blocks, int threads, size_t shared_bytes,
            cudaStream_t stream, Arguments... arguments) {
#ifdef GRAMOPHONE_EMULATED
  (void)stream;
  emulator::run(name, blocks, threads, shared_bytes, [&] { kernel(arguments...); });
#else
  cudaError_t error = cudaSuccess;
  if (shared_bytes > 48 * 1024)  // more than this must be requested by an attribute; the call is cheap
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shared_bytes));
  if (error == cudaSuccess) {
    kernel<<<blocks, threads, shared_bytes, stream>>>(static_cast<Parameters>(arguments)...);
    error = cudaGetLastError();
  }
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("gramophone: the device refused the kernel ") + name + ": " +
                             cudaGetErrorString(error));
#endif
}

}  // namespace gramophone
