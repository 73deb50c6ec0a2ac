// The arguments that descent_, adam_ and lbfgs_ share, as plain pointers for their kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "optimiser_math.h"

namespace gramophone {

// The arguments must have been checked (check_step in checks/optimisers.h).
inline ImageBatch image_batch(const at::Tensor& image, const at::Tensor& last_good,
                              const std::optional<at::Tensor>& mean, const at::Tensor& step, const at::Tensor& alive,
                              double average) {
  return {image.mutable_data_ptr<float>(),
          last_good.mutable_data_ptr<float>(),
          mean ? mean->mutable_data_ptr<float>() : nullptr,
          step.const_data_ptr<float>(),
          alive.const_data_ptr<bool>(),
          static_cast<float>(average),
          image.size(0),
          image.numel() / image.size(0)};
}

}  // namespace gramophone
