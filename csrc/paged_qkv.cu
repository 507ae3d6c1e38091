// From the product of x with W_qkv to queries ready for attention and keys and values in the cache, in one launch:
//
//     q, k ← scale·rmsnorm(rotate(q)), …     v ← v + 3·sigmoid(W_gate·x[:12])·ve[token]     per head
//
// Queries are overwritten where they stand; keys and values go to block table[s, p div block_size], slot p mod
// block_size, in the cache's own format. Padding (a negative position, or no block) is written nowhere.
//
// Eight lanes hold a head, both halves of it, so the rotation needs no exchange and the norm three; the gate's twelve
// products are spread over the same lanes. FP8 caches need no scale: keys are normed, at most 1.2·√D, and values lie
// near one, while e4m3 reaches from 2⁻⁹ to 448; a scale would shift that range and sharpen nothing.
#include "cuda_kernels.h"
#include "device.cuh"

namespace nanochat {
namespace {

constexpr int kThreads = 128;
constexpr int kLanes = 8;  // of one head
constexpr int kHeld = 16;  // elements of each half that a lane keeps
constexpr float kGate = 3.0f;

template <typename T, typename CacheT, int WIDTH>
KERNEL(kThreads)
paged_qkv_kernel(PagedQkv p) {
  constexpr int kPieces = kHeld / WIDTH;
  const int lane = static_cast<int>(threadIdx.x) % kLanes, heads = p.heads + 2 * p.kv_heads, half = p.dims / 2;
  const int64_t item = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const bool inside = item < static_cast<int64_t>(p.count) * heads;  // no early exit: lanes sum together
  const int n = inside ? static_cast<int>(item / heads) : 0, head = inside ? static_cast<int>(item % heads) : 0;
  const bool is_query = head < p.heads, is_value = head >= p.heads + p.kv_heads;
  const int kv_head = is_value ? head - p.heads - p.kv_heads : head - p.heads;
  wait_for_previous_kernel();
  let_next_kernel_start();

  T* qkv = static_cast<T*>(p.qkv) + (static_cast<int64_t>(n) * heads + head) * p.dims;
  const int64_t position = p.positions[n], turn = position < 0 ? 0 : position;
  const T *cos = static_cast<const T*>(p.cos) + turn * half, *sin = static_cast<const T*>(p.sin) + turn * half;
  float low[kPieces][WIDTH], high[kPieces][WIDTH], square = 0;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = (i * kLanes + lane) * WIDTH;
    if (at >= half) continue;
    load<T>(qkv + at, low[i]);
    load<T>(qkv + half + at, high[i]);
    if (is_value) continue;
    float c[WIDTH], s[WIDTH];
    load<T>(cos + at, c);
    load<T>(sin + at, s);
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
      const float x1 = low[i][j], x2 = high[i][j];
      low[i][j] = x1 * c[j] + x2 * s[j];
      high[i][j] = x2 * c[j] - x1 * s[j];
      square += low[i][j] * low[i][j] + high[i][j] * high[i][j];
    }
  }
  square = sum_of_lanes<kLanes>(square);
  const bool gated = p.embeddings && p.gate_weight;
  float gate = 0;
  if (gated && is_value && inside) {
    const T *x = static_cast<const T*>(p.x) + n * p.x_stride,
            *w = static_cast<const T*>(p.gate_weight) + kv_head * p.gate_inputs;
    for (int i = lane; i < p.gate_inputs; i += kLanes) gate += widen(x[i]) * widen(w[i]);
  }
  gate = kGate / (1.0f + expf(-sum_of_lanes<kLanes>(gate)));
  const float factor = is_value ? 1.0f : p.scale / sqrtf(square / static_cast<float>(p.dims) + kEpsilon);

  CacheT* cache = nullptr;
  if (inside && !is_query && position >= 0) {
    const int sequence = sequence_of(n, p.starts, p.sequences);
    const int64_t block = p.table[static_cast<int64_t>(sequence) * p.table_width + position / p.block_size];
    const int64_t slot = block * p.block_size + position % p.block_size;
    cache = static_cast<CacheT*>(is_value ? p.v_cache : p.k_cache) + (slot * p.kv_heads + kv_head) * p.dims;
    if (block < 0) cache = nullptr;
  }
  const T* embedding = nullptr;
  if (gated && is_value && inside) {
    embedding = static_cast<const T*>(p.embeddings) + (p.tokens[n] * p.kv_heads + kv_head) * p.dims;
  }
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    const int at = (i * kLanes + lane) * WIDTH;
    if (at >= half || !inside) continue;
    if (embedding) {
      float e1[WIDTH], e2[WIDTH];
      load<T>(embedding + at, e1);
      load<T>(embedding + half + at, e2);
#pragma unroll
      for (int j = 0; j < WIDTH; ++j) low[i][j] += gate * e1[j], high[i][j] += gate * e2[j];
    }
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) low[i][j] *= factor, high[i][j] *= factor;
    if (is_query) {
      store<T>(qkv + at, low[i]);
      store<T>(qkv + half + at, high[i]);
    } else if (cache) {
      store<CacheT>(cache + at, low[i]);
      store<CacheT>(cache + half + at, high[i]);
    }
  }
}

template <typename T, typename CacheT>
const char* run(const PagedQkv& p, CUstream_st* stream) {
  constexpr int kWide = sizeof(Pack) / sizeof(T);
  const bool wide = p.dims / 2 % kWide == 0 && aligned(p.qkv) && aligned(p.cos) && aligned(p.sin) &&
                    aligned(p.embeddings) && aligned(p.k_cache) && aligned(p.v_cache);
  const int64_t lanes = static_cast<int64_t>(p.count) * (p.heads + 2 * p.kv_heads) * kLanes;
  const dim3 blocks(static_cast<unsigned>(divide_up<int64_t>(lanes, kThreads)));
  if (wide) return launch(paged_qkv_kernel<T, CacheT, kWide>, blocks, kThreads, 0, stream, p);
  if constexpr (sizeof(CacheT) == 1)
    return "an FP8 cache takes head sizes in multiples of 16, on 16-byte boundaries";
  else
    return launch(paged_qkv_kernel<T, CacheT, 1>, blocks, kThreads, 0, stream, p);
}

}  // namespace

const char* paged_qkv(const PagedQkv& p, CUstream_st* stream) {
  if (p.dims % 2 || p.dims > 2 * kLanes * kHeld) return "paged_qkv takes even head sizes up to 256";
  if (p.type == Type::float32) return run<float, float>(p, stream);
  return p.cache_type == Type::fp8 ? run<bf16, fp8>(p, stream) : run<bf16, bf16>(p, stream);
}

}  // namespace nanochat
