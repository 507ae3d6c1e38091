// The names of device.cuh as Hopper's instructions. Everything here has a twin of the same meaning in emulator.cuh.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#define DEVICE __device__ __forceinline__
#define HOST_DEVICE __host__ __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)
#define SHARED __shared__

namespace nanochat {

using Stream = cudaStream_t;

struct bf16 {
  uint16_t bits;
};
struct fp8 {  // e4m3: four bits of exponent, three of mantissa, largest 448, no infinity
  uint8_t bits;
};

DEVICE float from_bits(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }

DEVICE uint16_t float_to_bf16(float x) {
  uint16_t y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

// Two at once: low in the lower half of the word.
DEVICE uint32_t floats_to_bf16(float low, float high) {
  uint32_t y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}

DEVICE uint32_t multiply_bf16(uint32_t a, uint32_t b) {  // two products, each rounded
  uint32_t y;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

DEVICE uint8_t float_to_fp8(float x) {  // values beyond the largest become the largest
  uint16_t y;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(y) : "f"(0.0f), "f"(x));
  return static_cast<uint8_t>(y);
}

DEVICE float fp8_to_float(uint8_t x) {
  uint32_t halves;
  float y;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(static_cast<uint16_t>(x)));
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low; }" : "=f"(y) : "r"(halves));
  return y;
}

// Bytes of a and b (a holds numbers 0 to 3, b 4 to 7) picked by the hexadecimal digits of `order`, lowest first.
DEVICE uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t order) { return __byte_perm(a, b, order); }

// Read once and not again: past the first-level cache. The first form takes the read-only path, for what no kernel
// writes (weights): a kernel that starts before its predecessor has ended must not read that one's results so.
template <typename Pack>
DEVICE Pack load_constant(const Pack* from) {
  static_assert(sizeof(Pack) == 16);
  Pack p;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
               : "l"(from));
  return p;
}

template <typename Pack>
DEVICE Pack load_once(const Pack* from) {
  static_assert(sizeof(Pack) == 16);
  Pack p;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(p.word[0]), "=r"(p.word[1]), "=r"(p.word[2]), "=r"(p.word[3])
               : "l"(from)
               : "memory");
  return p;
}

// Asks for memory to be brought into the second-level cache: address and bytes in multiples of 16.
DEVICE void prefetch(const void* from, uint32_t bytes) {
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
}

template <typename T>
DEVICE T shuffle_xor(T x, int lanes) {
  return __shfl_xor_sync(0xffffffffu, x, lanes);
}

template <typename T>
DEVICE T shuffle(T x, int lane) {  // what that lane shows
  return __shfl_sync(0xffffffffu, x, lane);
}

DEVICE void sync_block() { __syncthreads(); }
DEVICE void sync_warp() { __syncwarp(); }
DEVICE void publish() { __threadfence(); }  // what was written before is seen before what is written after

DEVICE int32_t add_atomically(int32_t* to, int32_t x) { return atomicAdd(to, x); }
DEVICE void add_shared(uint32_t* to, uint32_t x) { atomicAdd(to, x); }
DEVICE void add_shared(uint64_t* to, uint64_t x) { atomicAdd(reinterpret_cast<unsigned long long*>(to), x); }

// Written by other blocks of this launch: read where they meet, in the second-level cache.
DEVICE float load_shared_by_blocks(const float* from) { return __ldcg(from); }

template <typename T>
DEVICE T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

// d += a·b for a warp: a (16 × 16) row-major, b (16 × 8), in bf16; d (16 × 8) in float32. With group = lane / 4 and
// member = lane % 4 a lane holds a[group, 2·member + {0,1}], a[group + 8, same], a[group, same + 8], a[group + 8,
// same + 8]; b[2·member + {0,1}, group], b[same + 8, group]; d[group, 2·member + {0,1}], d[group + 8, same].
DEVICE void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Launches of one stream may overlap: a kernel starts while the one before it still runs, prefetches what that one
// does not write (weights), and waits here for its end. Every kernel waits before it touches anything else, and before
// it ends, so that each sees all that came before. The second call says that the next kernel may start.
DEVICE void wait_for_previous_kernel() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void let_next_kernel_start() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }

// Launches and returns the error's text, null when there is none.
template <typename Parameters>
const char* launch(void (*kernel)(Parameters), dim3 grid, int threads, int shared_bytes, Stream stream,
                   const Parameters& parameters) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return cudaGetErrorString(error);
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, parameters);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace nanochat
