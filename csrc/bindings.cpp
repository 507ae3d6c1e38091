// What is not a tensor op: facts about the build and this CPU, for `nanochat doctor` and the tests.
#include <pybind11/pybind11.h>

#include "simd.h"

#if defined(__clang__)
#define NANOCHAT_COMPILER "clang " __clang_version__
#else
#define NANOCHAT_COMPILER "g++ " __VERSION__
#endif

PYBIND11_MODULE(_bindings, m) {
  m.doc() = "Build facts and CPU features of the C++ extension.";
  m.attr("compiler") = NANOCHAT_COMPILER;
  m.attr("cuda") = static_cast<bool>(NANOCHAT_CUDA);
  m.attr("cuda_archs") = NANOCHAT_ARCHS;
  m.def("simd_level", &nanochat::simd_level, "The level that runs now: see NANOCHAT_SIMD.");
  m.def("simd_levels", &nanochat::simd_levels, "Levels that were built and run on this CPU, best first.");
  m.def("cpu_features", &nanochat::cpu_features, "What this CPU has of what the kernels can use.");
}
