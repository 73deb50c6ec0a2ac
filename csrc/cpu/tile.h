// A tile of a job's features as an operand of a matrix product: as stored or transposed, in the type that the product
// is computed in.
//
// On CPUs with AMX bfloat16 features are multiplied as they are. On all others the tile is converted to float32 first:
// on a Zen 4 core torch's float32 JIT kernel does 115 GFLOP/s, the bf16 product that it can call 85 to 100.
#pragma once

#include <ATen/native/CPUBlas.h>

#include <algorithm>

#include "cpu/vectorise.h"
#include "layout.h"

namespace gramophone {

// Pixels of a tile. With C = 512 in float32 a tile and its transposed copy take 1 MB, the L2 cache of one core.
constexpr int64_t kTilePixels = 256;

inline bool has_amx() {
  static const bool found = at::native::cpublas::could_pack(at::kBFloat16);  // torch's own test before it uses AMX
  return found;
}

GRAMOPHONE_VECTORISED inline void widen(const c10::BFloat16* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}
GRAMOPHONE_VECTORISED inline void widen(const c10::Half* from, int64_t n, float* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = load(from[i]);
}

template <typename P>
struct Operand {
  const P* data;
  int64_t ld;
};

// The [rows, columns] matrix at `from` as stored. It is copied to `scratch` only if the type changes.
template <typename T, typename P>
Operand<P> as_stored(const T* from, int64_t ld, int64_t rows, int64_t columns, P* scratch) {
  if constexpr (std::is_same_v<T, P>) {
    return {from, ld};
  } else {
    for (int64_t r = 0; r < rows; ++r) widen(from + r * ld, columns, scratch + r * columns);
    return {scratch, columns};
  }
}

// The same matrix transposed, [columns, rows], in `scratch`. It is copied in 16x16 blocks, so that reads and writes
// stay within a few cache lines.
template <typename T, typename P>
Operand<P> transposed(const T* from, int64_t ld, int64_t rows, int64_t columns, P* scratch) {
  constexpr int64_t kBlock = 16;
  for (int64_t r0 = 0; r0 < rows; r0 += kBlock) {
    const int64_t r1 = std::min(rows, r0 + kBlock);
    for (int64_t c0 = 0; c0 < columns; c0 += kBlock) {
      const int64_t c1 = std::min(columns, c0 + kBlock);
      for (int64_t c = c0; c < c1; ++c)
        for (int64_t r = r0; r < r1; ++r) {
          if constexpr (std::is_same_v<T, P>) {
            scratch[c * rows + r] = from[r * ld + c];
          } else {
            scratch[c * rows + r] = load(from[r * ld + c]);
          }
        }
    }
  }
  return {scratch, rows};
}

// c [m, n] = a [m, k] b [k, n], or += with `add`, on the calling thread. is_vnni false: plain row-major operands.
template <typename P>
void multiply(int64_t m, int64_t n, int64_t k, Operand<P> a, Operand<P> b, float* c, int64_t ld_c, bool add) {
  at::native::cpublas::brgemm(m, n, k, a.ld, b.ld, ld_c, add, a.data, b.data, c, /*is_vnni=*/false);
}

// Releases the resources that `multiply` keeps per thread. Call it at the end of a parallel region.
inline void release_multiply() {
  at::native::cpublas::brgemm_release(/*is_vnni=*/false);
}

}  // namespace gramophone
