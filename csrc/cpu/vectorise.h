// Element loops are compiled for three levels of x86-64, and the loader chooses one. So one build runs on every x86-64
// CPU and uses AVX-512 where the CPU has it; without this the loops would be SSE2. With other compilers or CPUs there
// is one version of each loop.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define GRAMOPHONE_VECTORISED __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define GRAMOPHONE_INLINE inline __attribute__((always_inline))
#define GRAMOPHONE_INLINE_LAMBDA __attribute__((always_inline))
#else
#define GRAMOPHONE_VECTORISED
#define GRAMOPHONE_INLINE inline
#define GRAMOPHONE_INLINE_LAMBDA
#endif

namespace gramophone {

// Conversions in plain integer arithmetic, which compilers vectorise. c10's own conversions have branches.
GRAMOPHONE_INLINE float load(float x) {
  return x;
}
GRAMOPHONE_INLINE double load(double x) {
  return x;
}
GRAMOPHONE_INLINE float load(c10::Half x) {
  return static_cast<float>(x);
}
GRAMOPHONE_INLINE float load(c10::BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.x) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

GRAMOPHONE_INLINE void store(float value, float& to) {
  to = value;
}
GRAMOPHONE_INLINE void store(double value, double& to) {
  to = value;
}
GRAMOPHONE_INLINE void store(float value, c10::Half& to) {
  to = static_cast<c10::Half>(value);
}
GRAMOPHONE_INLINE void store(float value, c10::BFloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  to.x = static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

}  // namespace gramophone
