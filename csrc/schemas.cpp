// The schema of every op. Argument checks are in checks/, kernels in cpu/ and cuda/. The Python side is in
// server/gramophone_server/ops: functional.py documents the ops, meta_registrations.py has their meta kernels and
// gradients.
#include <torch/library.h>

// The tests compile the CUDA kernels for the CPU (tests/emulator) and register them under another library name.
#ifndef GRAMOPHONE_LIBRARY
#define GRAMOPHONE_LIBRARY gramophone
#endif
#define GRAMOPHONE_SCHEMAS(library, m) TORCH_LIBRARY(library, m)

GRAMOPHONE_SCHEMAS(GRAMOPHONE_LIBRARY, m) {
  const auto tags = std::vector<at::Tag>{at::Tag::pt2_compliant_tag};

  // style
  m.def("gram(Tensor features, float scale) -> Tensor", tags);
  m.def("gram_bwd(Tensor grad, Tensor features, float scale) -> Tensor", tags);
  m.def("style_loss(Tensor features, Tensor target, float weight, float scale) -> (Tensor loss, Tensor diff)", tags);
  m.def(
      "style_fwd(Tensor[] features, Tensor[] targets, Tensor weights, float[] scales, bool persistent=False)"
      " -> (Tensor losses, Tensor[] diffs)",
      tags);
  m.def("style_bwd(Tensor features, Tensor diff, Tensor? grad_loss) -> Tensor", tags);
  m.def("style_bwd_(Tensor(a!) grad, Tensor features, Tensor? diff, bool relu_mask) -> ()", tags);

  // terms
  m.def("content_(Tensor(a!) grad, Tensor features, Tensor target, Tensor weight, bool relu_mask) -> Tensor", tags);
  m.def("tv_(Tensor(a!) grad, Tensor image, Tensor weight) -> Tensor", tags);
  m.def(
      "tv_check_finite_(Tensor(a!) grad, Tensor image, Tensor weight, Tensor(b!) terms, Tensor(c!) alive,"
      " Tensor(d!) diverged_at, Tensor(e!) count) -> ()",
      tags);

  // layers: those of the network that no library computes in one pass
  m.def("max_pool(Tensor features) -> Tensor", tags);
  m.def("max_pool_bwd(Tensor grad, Tensor features, Tensor pooled, bool relu_mask) -> Tensor", tags);
  m.def("first_layer(Tensor image, Tensor weight, Tensor bias, float[] scale, float[] shift, int[] order) -> Tensor",
        tags);
  m.def("first_layer_bwd(Tensor grad, Tensor weight, float[] scale, int[] order) -> Tensor", tags);
  m.def("bias_relu_(Tensor(a!) features, Tensor bias) -> ()", tags);
  m.def("bias_relu_pool(Tensor features, Tensor bias) -> (Tensor pooled, Tensor codes)", tags);
  m.def("pool_codes_bwd(Tensor grad, Tensor codes, int height, int width) -> Tensor", tags);

  // optimisers
  m.def("check_finite_(Tensor terms, Tensor grad, Tensor(a!) alive, Tensor(b!) diverged_at, Tensor(c!) count) -> ()",
        tags);
  m.def(
      "descent_(Tensor(a!) image, Tensor(b!) last_good, Tensor(c!)? mean, Tensor grad, Tensor step, Tensor alive,"
      " float average, bool normalised) -> ()",
      tags);
  m.def(
      "adam_(Tensor(a!) image, Tensor(b!) last_good, Tensor(c!)? mean, Tensor(d!) first, Tensor(e!) second,"
      " Tensor grad, Tensor step, Tensor count, Tensor alive, float average) -> ()",
      tags);
  m.def(
      "lbfgs_(Tensor(a!) image, Tensor(b!) last_good, Tensor(c!)? mean, Tensor(d!) history, Tensor(e!) before,"
      " Tensor(f!) products, Tensor(g!) inverse, Tensor(h!) scale, Tensor(i!) seen, Tensor grad, Tensor step,"
      " Tensor alive, float average) -> ()",
      tags);
}
