// Launchers of the kernels in terms.cu. They take plain pointers, so that the kernels do not depend on torch and the
// bindings not on CUDA's language. All maps are dense.
#pragma once

#include <cstdint>

#include "cuda/common/launch_types.h"

namespace gramophone {

// G, the type of grad: T, or Bf16 if T is Fp16. T: float, double, Fp16, Bf16. S, the type of sums: double if T is
// double, else float. `partials` is scratch of [batch, content_blocks(elements)]; `elements` are those of a job.
int64_t content_blocks(int64_t elements);
template <typename G, typename T, typename S>
void launch_content(G* grad, const T* features, const T* target, const S* weight, int64_t batch, int64_t elements,
                    bool relu_mask, S* partials, S* loss, cudaStream_t stream);

// `partials` is scratch of [batch, tv_blocks(height, width)].
int64_t tv_blocks(int height, int width);
void launch_tv(float* grad, const float* image, const float* weight, int64_t batch, int height, int width,
               float* partials, float* loss, cudaStream_t stream);

// What `launch_tv_check_finite` decides about the jobs, and its scratch.
struct Verdicts {
  uint8_t* bad;  // scratch, [batch, tv_blocks(height, width)]
  float* terms;  // [term_count, batch]; the last row is written
  int64_t term_count;
  bool* alive;           // [batch]
  int64_t* diverged_at;  // [batch]
  int64_t* count;        // [batch]
};

// `launch_tv` with its loss in the last row of `terms`, and then `launch_check_finite`, in two kernels instead of three
// and without another pass over the gradient.
void launch_tv_check_finite(float* grad, const float* image, const float* weight, int64_t batch, int height, int width,
                            float* partials, const Verdicts& verdicts, cudaStream_t stream);

}  // namespace gramophone
