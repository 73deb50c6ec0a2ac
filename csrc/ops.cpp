// Every op of the project, by schema. Contracts: checks.h. Kernels: cpu/. Fakes, gradients and docstrings: ops.py.
#include <torch/library.h>

TORCH_LIBRARY(gramophone, m) {
  const auto tags = std::vector<at::Tag>{at::Tag::pt2_compliant_tag};

  m.def("gram(Tensor features, float scale) -> Tensor", tags);
  m.def("gram_bwd(Tensor grad, Tensor features, float scale) -> Tensor", tags);
  m.def("style_loss(Tensor features, Tensor target, float weight, float scale) -> (Tensor loss, Tensor diff)", tags);
  m.def(
      "style_fwd(Tensor[] features, Tensor[] targets, Tensor weights, float[] scales)"
      " -> (Tensor losses, Tensor[] diffs)",
      tags);
  m.def("style_bwd(Tensor features, Tensor diff, Tensor? grad_loss) -> Tensor", tags);
  m.def("style_bwd_(Tensor(a!) grad, Tensor features, Tensor? diff, bool relu_mask) -> ()", tags);
  m.def("max_pool(Tensor features) -> Tensor", tags);
  m.def("max_pool_bwd(Tensor grad, Tensor features, Tensor pooled, bool relu_mask) -> Tensor", tags);
}
