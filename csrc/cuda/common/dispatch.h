// From tensors to the pointers and types of the kernels, for the bindings.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <initializer_list>

#include "cuda/common/launch_types.h"

namespace gramophone {

template <typename T>
const T* const_data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <typename T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

inline bool is_aligned(const at::Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
}

inline void require_aligned(const char* op, std::initializer_list<at::Tensor> tensors) {
  for (const at::Tensor& t : tensors)
    TORCH_CHECK(is_aligned(t), op, ": tensors must start at a multiple of 16 bytes, got one of ", t.sizes(),
                " at a storage offset of ", t.storage_offset(), " elements");
}

// A type as a value, which a generic lambda can receive; Of<decltype(tag)> is the type.
template <typename T>
struct TypeTag {
  using type = T;
};
template <typename T>
using Of = typename T::type;

// Calls call(TypeTag<T>), T the kernels' type for a 16-bit torch type.
template <typename Call>
void for_16_bit(at::ScalarType type, const Call& call) {
  if (type == at::kHalf)
    call(TypeTag<Fp16>{});
  else
    call(TypeTag<Bf16>{});
}

// Calls call(TypeTag<G>, TypeTag<T>), G the gradient's type: the features' type T, or bfloat16 if they are float16.
template <typename Call>
void for_gradient(at::ScalarType gradient, at::ScalarType features, const Call& call) {
  if (features == at::kFloat)
    call(TypeTag<float>{}, TypeTag<float>{});
  else if (features == at::kDouble)
    call(TypeTag<double>{}, TypeTag<double>{});
  else if (features == at::kBFloat16)
    call(TypeTag<Bf16>{}, TypeTag<Bf16>{});
  else if (gradient == at::kHalf)
    call(TypeTag<Fp16>{}, TypeTag<Fp16>{});
  else
    call(TypeTag<Bf16>{}, TypeTag<Fp16>{});
}

}  // namespace gramophone
