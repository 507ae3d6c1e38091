// The residual stream's additions and the norm that follows them, and the embedding that begins the stream.
//
//     mixed = scale·(x + delta) + other_scale·other        y = mixed·(mean(mixed²) + ε)^-½
//
// One block of 256 threads per row; a row of up to 8,192 channels stays in registers between the sum of squares and the
// scaling, so each input is read once, 16 bytes a thread. Arithmetic is float32, rounded once at the end, where torch
// in bf16 rounds after each addition. At decode a row is 1.5 to 3 KB: the time is that of a launch and two trips to
// memory, which is why the additions ride along and why the kernel starts before its predecessor has ended
// (device.cuh).
#include "cuda_kernels.h"
#include "device.cuh"

namespace nanochat {
namespace {

constexpr int kThreads = 256;
constexpr int kHeld = 32;  // channels a thread keeps

// WIDTH channels at a time: what fills 16 bytes, or 1 where rows are not aligned.
template <typename T, int WIDTH>
KERNEL(kThreads)
rms_norm_kernel(RmsNorm p) {
  SHARED float partial[kThreads / kWarp];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.columns;
  const T *x = static_cast<const T*>(p.x) + row, *delta = static_cast<const T*>(p.delta) + row,
          *other = static_cast<const T*>(p.other) + row;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const float scale = p.scale ? *p.scale : 1.0f, other_scale = p.other_scale ? *p.other_scale : 1.0f;
  float held[kHeld / WIDTH][WIDTH], square = 0;
#pragma unroll
  for (int i = 0; i < kHeld / WIDTH; ++i) {
    const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * WIDTH;
    if (column >= p.columns) continue;
    float added[WIDTH];
    load<T>(x + column, held[i]);
    if (p.delta) {
      load<T>(delta + column, added);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) held[i][j] += added[j];
    }
    if (p.scale) {
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) held[i][j] *= scale;
    }
    if (p.other) {
      load<T>(other + column, added);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) held[i][j] += other_scale * added[j];
    }
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) square += held[i][j] * held[i][j];
  }
  const float total = sum_of_block<kThreads / kWarp>(square, partial);
  const float inverse = 1.0f / sqrtf(total / static_cast<float>(p.columns) + kEpsilon);
#pragma unroll
  for (int i = 0; i < kHeld / WIDTH; ++i) {
    const int column = (i * kThreads + static_cast<int>(threadIdx.x)) * WIDTH;
    if (column >= p.columns) continue;
    if (p.mixed) store<T>(static_cast<T*>(p.mixed) + row + column, held[i]);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) held[i][j] *= inverse;
    store<T>(static_cast<T*>(p.y) + row + column, held[i]);
  }
}

// Both embeddings of a position, its own and the one before, are normed here: no state is kept between steps.
template <typename T, int WIDTH>
KERNEL(kThreads)
embedding_kernel(Embedding p) {
  SHARED float partial[2][kThreads / kWarp], first[kWarp];
  const int thread = static_cast<int>(threadIdx.x);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t token = p.tokens[blockIdx.x], previous = p.previous[blockIdx.x];
  const bool smear = p.smear_weight && previous >= 0;
  const T* rows[2] = {static_cast<const T*>(p.table) + token * p.columns,
                      static_cast<const T*>(p.table) + (smear ? previous : token) * p.columns};
  float held[2][kHeld / WIDTH][WIDTH], inverse[2];
#pragma unroll
  for (int which = 0; which < 2; ++which) {
    float square = 0;
#pragma unroll
    for (int i = 0; i < kHeld / WIDTH; ++i) {
      const int column = (i * kThreads + thread) * WIDTH;
      if (column >= p.columns) continue;
      load<T>(rows[which] + column, held[which][i]);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) square += held[which][i][j] * held[which][i][j];
    }
    const float total = sum_of_block<kThreads / kWarp>(square, partial[which]);
    inverse[which] = 1.0f / sqrtf(total / static_cast<float>(p.columns) + kEpsilon);
  }
  float gate = 0;
  if (smear) {  // the same for the whole block
    if (thread < kWarp) first[thread] = thread < p.smear_inputs ? rounded<T>(widen(rows[0][thread]) * inverse[0]) : 0;
    sync_block();
    for (int i = 0; i < p.smear_inputs; ++i) gate += p.smear_weight[i] * first[i];
    gate = *p.smear_scale / (1.0f + expf(-gate));
  }
#pragma unroll
  for (int i = 0; i < kHeld / WIDTH; ++i) {
    const int column = (i * kThreads + thread) * WIDTH;
    if (column >= p.columns) continue;
    float y[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      y[j] = rounded<T>(held[0][i][j] * inverse[0]) + gate * rounded<T>(held[1][i][j] * inverse[1]);
    }
    store<T>(static_cast<T*>(p.y) + static_cast<int64_t>(blockIdx.x) * p.columns + column, y);
  }
}

template <typename T>
constexpr int kWide = static_cast<int>(sizeof(Pack) / sizeof(T));

bool all_aligned(const RmsNorm& p) {
  return aligned(p.x) && aligned(p.delta) && aligned(p.other) && aligned(p.y) && aligned(p.mixed);
}

template <typename T>
const char* run(const RmsNorm& p, CUstream_st* stream) {
  const bool wide = p.columns % kWide<T> == 0 && all_aligned(p);
  return launch(wide ? rms_norm_kernel<T, kWide<T>> : rms_norm_kernel<T, 1>, dim3(static_cast<unsigned>(p.rows)),
                kThreads, 0, stream, p);
}

template <typename T>
const char* run(const Embedding& p, CUstream_st* stream) {
  const bool wide = p.columns % kWide<T> == 0 && aligned(p.table) && aligned(p.y);
  return launch(wide ? embedding_kernel<T, kWide<T>> : embedding_kernel<T, 1>, dim3(static_cast<unsigned>(p.count)),
                kThreads, 0, stream, p);
}

}  // namespace

const char* rms_norm(const RmsNorm& p, CUstream_st* stream) {
  if (p.columns > kThreads * kHeld) return "rms_norm holds at most 8192 channels";
  return p.type == Type::bfloat16 ? run<bf16>(p, stream) : run<float>(p, stream);
}

const char* embedding(const Embedding& p, CUstream_st* stream) {
  if (p.columns > kThreads * kHeld) return "embedding holds at most 8192 channels";
  if (p.smear_weight && (p.smear_inputs > kWarp || p.smear_inputs > p.columns))
    return "the smear reads 32 channels at most";
  return p.type == Type::bfloat16 ? run<bf16>(p, stream) : run<float>(p, stream);
}

}  // namespace nanochat
