// The elementwise heart of the head's loss: a panel of logits becomes its own gradient, read once and written once.
//
// The panel holds 2l/c (the factor rides in the matrix product). With s = sigmoid(2l/c) a capped logit is 2c·s − c, so
//
//     nll = log Σ exp(2c(s_v − 1)) − 2c(s_target − 1)        panel ← s(1 − s)·(exp(2c(s − 1))/Σ − [v = target])
//
// and the bound itself, c, takes the place of a running maximum. One block of 1,024 threads a row: 32,768 words are
// four 16-byte loads a thread, and their s stay in registers while the block adds up the sum. A row that is longer, or
// not aligned, is walked twice, the second time out of the second-level cache, as the Triton kernel does. Three special
// functions a word before the sum and one after keep the arithmetic just under the time of four bytes of traffic.
#include "cuda_kernels.h"
#include "device.cuh"

namespace nanochat {
namespace {

constexpr int kThreads = 1024;

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// HELD > 0: that many pieces of WIDTH words per thread stay in registers. HELD = 0: two walks.
template <typename T, int WIDTH, int HELD>
KERNEL(kThreads)
softcap_cross_entropy_kernel(SoftcapCrossEntropy p) {
  SHARED float partial[kThreads / kWarp];
  const int64_t row = blockIdx.x;
  T* panel = static_cast<T*>(p.panel) + row * p.vocabulary;
  const int thread = static_cast<int>(threadIdx.x), stride = kThreads * WIDTH;
  const float twice = 2.0f * p.softcap;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t target = p.targets[row];
  const float s_target = sigmoid(widen(panel[target]));  // every thread, before any word is overwritten
  float held[HELD > 0 ? HELD : 1][WIDTH], sum = 0;
  if constexpr (HELD > 0) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int first = i * stride + thread * WIDTH;
      if (first < p.vocabulary) load<T>(panel + first, held[i]);
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      if (i * stride + thread * WIDTH >= p.vocabulary) continue;
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) {
        held[i][j] = sigmoid(held[i][j]);
        sum += expf(twice * (held[i][j] - 1.0f));
      }
    }
  } else {
    for (int first = thread * WIDTH; first < p.vocabulary; first += stride) {
      load<T>(panel + first, held[0]);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) sum += expf(twice * (sigmoid(held[0][j]) - 1.0f));
    }
  }
  const float log_sum = logf(sum_of_block<kThreads / kWarp>(sum, partial));  // its barrier comes before the first store
  if (thread == 0) p.nll[row] = log_sum - twice * (s_target - 1.0f);
  if (!p.gradients) return;
  const auto finish = [&](int first, float (&s)[WIDTH]) {
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const float share = expf(twice * (s[j] - 1.0f) - log_sum) - (first + j == target ? 1.0f : 0.0f);
      s[j] = s[j] * (1.0f - s[j]) * share;
    }
    store<T>(panel + first, s);
  };
  if constexpr (HELD > 0) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int first = i * stride + thread * WIDTH;
      if (first < p.vocabulary) finish(first, held[i]);
    }
  } else {
    for (int first = thread * WIDTH; first < p.vocabulary; first += stride) {
      load<T>(panel + first, held[0]);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) held[0][j] = sigmoid(held[0][j]);
      finish(first, held[0]);
    }
  }
}

template <typename T>
const char* run(const SoftcapCrossEntropy& p, CUstream_st* stream) {
  constexpr int kWide = sizeof(Pack) / sizeof(T);
  const dim3 grid(static_cast<unsigned>(p.rows));
  if (p.vocabulary % kWide || !aligned(p.panel)) {
    return launch(softcap_cross_entropy_kernel<T, 1, 0>, grid, kThreads, 0, stream, p);
  }
  if constexpr (sizeof(T) == 2) {
    if (p.vocabulary <= 4 * kThreads * kWide) {
      return launch(softcap_cross_entropy_kernel<T, kWide, 4>, grid, kThreads, 0, stream, p);
    }
  }
  return launch(softcap_cross_entropy_kernel<T, kWide, 0>, grid, kThreads, 0, stream, p);
}

}  // namespace

const char* softcap_cross_entropy(const SoftcapCrossEntropy& p, CUstream_st* stream) {
  return p.type == Type::bfloat16 ? run<bf16>(p, stream) : run<float>(p, stream);
}

}  // namespace nanochat
