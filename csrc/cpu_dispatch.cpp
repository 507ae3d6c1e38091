// From the name of a SIMD level to its kernels.
#include <cstring>

#include "cpu_kernels.h"
#include "simd.h"

namespace nanochat {

extern const Kernels kPortable;
#if defined(__x86_64__)
extern const Kernels kAvx2, kAvx512, kAvx512Vnni;
#elif defined(__aarch64__)
extern const Kernels kNeon;
#endif

const Kernels& cpu_kernels() {
#if defined(__x86_64__)
  static const Kernels* const all[] = {&kAvx512Vnni, &kAvx512, &kAvx2};
#elif defined(__aarch64__)
  static const Kernels* const all[] = {&kNeon};
#else
  static const Kernels* const all[] = {&kPortable};
#endif
  const char* level = simd_level();
  for (const Kernels* kernels : all)
    if (!std::strcmp(level, kernels->name)) return *kernels;
  return kPortable;
}

}  // namespace nanochat
