// The vocabulary of the CUDA kernels: 16-byte accesses, narrow number formats, groups of lanes, the tensor core.
//
// Kernels are written against the names in this file alone. They come from hardware.cuh (nvcc: PTX) or, when a plain
// C++ compiler reads the same .cu files, from emulator.cuh, which runs every thread of a block on the CPU: so the very
// text that a GPU runs is tested where there is none. What the emulator cannot tell is speed, and races that need two
// blocks at once.
//
// No torch header comes in here: a .cu file sees raw pointers, sizes and a stream, and compiles in seconds.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#ifdef __CUDACC__
#include "hardware.cuh"
#else
#include "emulator.cuh"
#endif

namespace nanochat {

constexpr int kWarp = 32;
constexpr float kEpsilon = 1.1920929e-07f;  // the model's norm: float32's machine epsilon, whatever the dtype

// Sixteen bytes: what one thread should move at a time. Half of it where eight FP8 values belong together.
struct alignas(16) Pack {
  uint32_t word[4];
};
struct alignas(8) HalfPack {
  uint32_t word[2];
};

// A value of T as a float, and back with rounding to the nearest.
DEVICE float widen(float x) { return x; }
DEVICE float widen(bf16 x) { return from_bits(uint32_t{x.bits} << 16); }
DEVICE float widen(fp8 x) { return fp8_to_float(x.bits); }
template <typename T>
DEVICE T narrow(float x);
template <>
DEVICE float narrow<float>(float x) {
  return x;
}
template <>
DEVICE bf16 narrow<bf16>(float x) {
  return bf16{float_to_bf16(x)};
}
template <>
DEVICE fp8 narrow<fp8>(float x) {
  return fp8{float_to_fp8(x)};
}

// What a T holds after rounding: intermediate results that the reference keeps in T.
template <typename T>
DEVICE float rounded(float x) {
  return widen(narrow<T>(x));
}

// WIDTH elements from memory, widened: one 16-byte access where WIDTH fills it, single elements otherwise.
template <typename T, int WIDTH>
DEVICE void load(const T* from, float (&to)[WIDTH]) {
  if constexpr (WIDTH * sizeof(T) == sizeof(Pack)) {
    const Pack pack = *reinterpret_cast<const Pack*>(from);
    T element[WIDTH];
    memcpy(element, &pack, sizeof(Pack));
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) to[i] = widen(element[i]);
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) to[i] = widen(from[i]);
  }
}

template <typename T, int WIDTH>
DEVICE void store(T* to, const float (&from)[WIDTH]) {
  if constexpr (WIDTH > 1 && (WIDTH * sizeof(T) == sizeof(Pack) || WIDTH * sizeof(T) == sizeof(HalfPack))) {
    using Whole = std::conditional_t<WIDTH * sizeof(T) == sizeof(Pack), Pack, HalfPack>;
    T element[WIDTH];
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) element[i] = narrow<T>(from[i]);
    Whole whole;
    memcpy(&whole, element, sizeof(Whole));
    *reinterpret_cast<Whole*>(to) = whole;
  } else {
#pragma unroll
    for (int i = 0; i < WIDTH; ++i) to[i] = narrow<T>(from[i]);
  }
}

// Sum and maximum over aligned groups of LANES lanes; every lane of the warp takes part and gets its group's result.
template <int LANES = kWarp>
DEVICE float sum_of_lanes(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x += shuffle_xor(x, step);
  return x;
}

template <int LANES = kWarp>
DEVICE float max_of_lanes(float x) {
#pragma unroll
  for (int step = LANES / 2; step > 0; step /= 2) x = fmaxf(x, shuffle_xor(x, step));
  return x;
}

// Sum over a block of WARPS warps, the same bits in every thread. `shared` holds WARPS floats and may be used again
// after the next barrier.
template <int WARPS>
DEVICE float sum_of_block(float x, float* shared) {
  x = sum_of_lanes(x);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = x;
  sync_block();
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; ++warp) total += shared[warp];
  return total;
}

// The sequence that owns token n: starts (sequences + 1) rises from 0 to the number of tokens. In decoding, where every
// sequence has one token, it is number n, and two independent loads tell instead of a search.
DEVICE int sequence_of(int n, const int32_t* starts, int sequences) {
  if (n < sequences && starts[n] == n && starts[n + 1] == n + 1) return n;
  int low = 0, high = sequences - 1;
  while (low < high) {  // the last s with starts[s] ≤ n: empty sequences before it share that start
    const int middle = (low + high + 1) / 2;
    if (starts[middle] <= n) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <typename T>
HOST_DEVICE constexpr T divide_up(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace nanochat
