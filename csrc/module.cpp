// The Python module `_C`. It has one function, build_info; the ops register themselves with torch when the module is
// loaded (schemas.cpp, cpu/, cuda/). This file includes no torch headers, so that it compiles in a second.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

// setup.py defines GRAMOPHONE_CUDA_VERSION and GRAMOPHONE_CUDA_ARCHITECTURES without quotes, such as 13.0 and
// 8.0,9.0+PTX. These macros turn them into strings.
#define GRAMOPHONE_TEXT(...) #__VA_ARGS__
#define GRAMOPHONE_TEXT_OF(...) GRAMOPHONE_TEXT(__VA_ARGS__)

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

// The instruction sets of this machine that decide which loops the ops and torch's kernels use.
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

pybind11::object cuda_version() {
#ifdef GRAMOPHONE_CUDA_VERSION
  return pybind11::str(GRAMOPHONE_TEXT_OF(GRAMOPHONE_CUDA_VERSION));
#else
  return pybind11::none();
#endif
}

std::vector<std::string> cuda_architectures() {
  std::vector<std::string> all;
#ifdef GRAMOPHONE_CUDA_ARCHITECTURES
  std::istringstream text(GRAMOPHONE_TEXT_OF(GRAMOPHONE_CUDA_ARCHITECTURES));
  for (std::string one; std::getline(text, one, ',');) all.push_back(one);
#endif
  return all;
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = compiler();
  info["cuda"] = cuda_version();
  info["cuda_architectures"] = cuda_architectures();
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
