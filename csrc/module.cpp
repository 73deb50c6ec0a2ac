// The Python face of the compiled module: what was built, with what, for what. No torch headers here, so that this file
// compiles in a second; the ops register themselves (ops.cpp) when the module is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

// The instruction sets that the ops or torch's kernels choose by, of the machine that runs this.
std::vector<std::string> cpu_features() {
  std::vector<std::string> found;
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2")) found.emplace_back("avx2");
  if (__builtin_cpu_supports("avx512f")) found.emplace_back("avx512f");
  if (__builtin_cpu_supports("avx512bf16")) found.emplace_back("avx512_bf16");
#endif
  return found;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cuda"] = pybind11::none();  // no CUDA kernels yet
  info["cuda_architectures"] = std::vector<std::string>{};
  info["cpu_features"] = cpu_features();
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Gramophone's compiled ops; importing it registers them with torch as torch.ops.gramophone.*";
  m.def("build_info", &build_info,
        "Compiler, CUDA version and architectures built for (None and [] without CUDA), and the instruction sets of "
        "this CPU.");
}
