// Types and arithmetic for the launchers' headers: streams, 16-bit floats, division. The bindings, which nvcc does not
// compile, include those headers too.
#pragma once

#include <cstdint>

#ifdef GRAMOPHONE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace gramophone {

// 16-bit floats as stored in memory, bit for bit torch's. Arithmetic is in float.
struct Fp16 {
  uint16_t bits;
};
struct Bf16 {
  uint16_t bits;
};

// a / b rounded up, for a >= 0 and b > 0.
constexpr int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

}  // namespace gramophone
