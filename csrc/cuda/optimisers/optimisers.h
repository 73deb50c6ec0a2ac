// Launchers of the kernels in optimisers.cu. They take plain pointers, so that the kernels do not depend on torch and
// the bindings not on CUDA's language. `aligned`: all images of all jobs start at multiples of 16 bytes.
#pragma once

#include <cstdint>

#include "cuda/common/launch_types.h"
#include "optimiser_math.h"

namespace gramophone {

void launch_check_finite(const float* terms, int64_t term_count, const float* grad, bool* alive, int64_t* diverged_at,
                         int64_t* count, int64_t jobs, int64_t values, bool aligned, cudaStream_t stream);

// `squares`: scratch of [jobs, sum_parts(values).count], or null for plain descent.
void launch_descent(const ImageBatch& images, const float* grad, double* squares, bool aligned, cudaStream_t stream);

void launch_adam(const ImageBatch& images, float* first, float* second, const float* grad, const int64_t* count,
                 bool aligned, cudaStream_t stream);

// `sums`: scratch of [jobs, kSums, sum_parts(values).count]. `plans`: scratch of [jobs].
void launch_lbfgs(const ImageBatch& images, const LbfgsState& state, const float* grad, double* sums, StepPlan* plans,
                  bool aligned, cudaStream_t stream);

}  // namespace gramophone
