// What step.cu launches, on plain pointers. Contracts: ../checks.h, docstrings: ops.py.
#pragma once

#include <cstdint>

#ifdef GRAMOPHONE_EMULATED
#include "emulator.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "../step.h"

namespace gramophone {

// `aligned`: all pictures of all jobs start at multiples of 16 bytes.

void launch_check_finite(const float* terms, int64_t term_count, const float* grad, bool* alive, int64_t* diverged_at,
                         int64_t* count, int64_t batch, int64_t values, bool aligned, cudaStream_t stream);

// squares: scratch of [batch, parts_of(values).count], or null for plain descent.
void launch_descent(const Canvas& canvas, const float* grad, double* squares, bool aligned, cudaStream_t stream);

void launch_adam(const Canvas& canvas, float* first, float* second, const float* grad, const int64_t* count,
                 bool aligned, cudaStream_t stream);

// sums: scratch of [batch, kSums, parts_of(values).count]; plans: scratch of [batch].
void launch_lbfgs(const Canvas& canvas, const Memory& memory, const float* grad, double* sums, Plan* plans,
                  bool aligned, cudaStream_t stream);

}  // namespace gramophone
