// Which SIMD level runs: the best that this CPU has, or the one that NANOCHAT_SIMD names (read at every call, for
// tests).
#pragma once

namespace nanochat {

// Throws std::runtime_error when NANOCHAT_SIMD names a level that cannot run here.
const char* simd_level();
// The levels that run here, best first, separated by spaces.
const char* simd_levels();
// What this CPU has of what kernels can use.
const char* cpu_features();

}  // namespace nanochat
