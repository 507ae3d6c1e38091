// Attention of a few new tokens per sequence against a paged cache, windowed and grouped: the decode step's other
// stream of bytes, beside the weights.
//
// A query at position p reads the keys of positions max(0, p − window) … p. They are divided at multiples of kSpan
// positions among blocks of 128 threads (split-KV), because one sequence's cache must be read by many multiprocessors
// at once. The cuts are at fixed positions, and so is the lane that takes a key: a decoded token's numbers depend on
// its own keys alone, not on the batch or the width of the table.
//
// In a block, eight lanes share a key: 16 bytes a lane and piece, so 4 keys a warp and 16 a block at a time, each with
// up to two keys and two values on their way. Each group of eight lanes keeps its own maximum m, sum l and accumulator
// (softmax in one pass: an arriving score s rescales what is there by 2^(m − max(m, s))); they merge at the end, first
// within the warp, then in shared memory. Scores are taken to base 2, the 1/ln 2 folded into the query.
//
// A block's ROWS queries, several heads of one key/value head (grouped attention) or several new tokens of a sequence
// (a draft to verify, a piece of a prompt), share each key that is read. This pays up to a few tokens; long prompts
// want tensor cores.
//
// Parts of a query meet without a second launch: each block leaves its values, m and l in the workspace and counts
// itself; the last to arrive adds them up and sets the counter back to zero for the next launch. (The counters are why
// two launches that share a workspace must be in the order of one stream.)
#include "cuda_kernels.h"
#include "device.cuh"

namespace nanochat {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kLanes = 8;                   // of one key
constexpr int kGroups = kThreads / kLanes;  // keys at a time
constexpr int kSpan = 128;                  // positions of one split
constexpr float kLog2E = 1.4426950408889634f;

// A piece of a tile: the rows that belong to one sequence, and the keys that any of them sees.
struct Segment {
  int sequence, first_token, last_token;  // of the tile's tokens, inclusive
  int position;                           // of first_token
  int oldest, newest;                     // keys, inclusive; none when newest < 0
};

DEVICE Segment segment_at(const PagedAttention& p, int token, int tile_end) {
  Segment g;
  g.sequence = sequence_of(token, p.starts, p.sequences);
  const int next = p.starts[g.sequence + 1];
  g.first_token = token;
  g.last_token = (next < tile_end ? next : tile_end) - 1;
  g.position = p.lengths[g.sequence] - (next - token);
  g.newest = g.position + g.last_token - token;
  g.oldest = g.position - p.window > 0 ? g.position - p.window : 0;
  return g;
}

// What a group of lanes, a warp or a block knows of ROWS queries: HELD dimensions a lane.
template <int ROWS, int HELD>
struct State {
  float m[ROWS], l[ROWS], value[ROWS][HELD];

  DEVICE void clear() {
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      m[r] = -INFINITY, l[r] = 0;
#pragma unroll
      for (int i = 0; i < HELD; ++i) value[r][i] = 0;
    }
  }
};

// How much of what was gathered under the maximum m counts under the larger maximum.
DEVICE float rescaling(float m, float larger) { return m == -INFINITY ? 0.0f : exp2f(m - larger); }

template <typename T, typename CacheT, int ROWS, int PIECES, int WIDTH>
struct Block {
  static constexpr int kHeld = PIECES * WIDTH;
  static constexpr int kUnroll =
      ROWS == 1 && WIDTH > 1 ? 2 : 1;  // keys of a group loaded before the first is used: registers
  static constexpr int kStride = kGroups * kUnroll;
  static_assert(kSpan % kStride == 0);  // which group of lanes reads a key follows from its position
  const PagedAttention& p;
  float q[ROWS][kHeld];
  int lane, group;

  DEVICE int dimension(int piece) const { return (piece * kLanes + lane) * WIDTH; }

  // The head and token of a row: heads of the group first.
  static DEVICE int heads_of(const PagedAttention& p) { return ROWS / p.tile; }

  DEVICE void load_queries(const Segment& g, int tile_start, int first_head, int last_head) {
    const float scale = kLog2E / sqrtf(static_cast<float>(p.dims));
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const int token = tile_start + r / heads_of(p), head = first_head + r % heads_of(p);
      const bool inside = token >= g.first_token && token <= g.last_token && head <= last_head;
#pragma unroll
      for (int piece = 0; piece < PIECES; ++piece) {
        const T* from = static_cast<const T*>(p.q) + token * p.q_stride + static_cast<int64_t>(head) * p.dims;
        constexpr int kOnce = WIDTH > 1 ? sizeof(Pack) / sizeof(T) : 1;  // elements of a 16-byte load
#pragma unroll
        for (int i = 0; i < WIDTH; i += kOnce) {
          float part[kOnce] = {};
          if (inside && dimension(piece) < p.dims) load<T>(from + dimension(piece) + i, part);
#pragma unroll
          for (int j = 0; j < kOnce; ++j) q[r][piece * WIDTH + i + j] = part[j] * scale;
        }
      }
    }
  }

  DEVICE void load_entry(const void* cache, int64_t entry, bool inside, float (&to)[kHeld]) const {
    const CacheT* from = static_cast<const CacheT*>(cache) + entry;
#pragma unroll
    for (int piece = 0; piece < PIECES; ++piece) {
      const int d = dimension(piece);
      float part[WIDTH] = {};
      if (inside && d < p.dims) {
        if constexpr (WIDTH > 1) {
          const Pack pack = load_once(reinterpret_cast<const Pack*>(from + d));
          CacheT element[WIDTH];
          memcpy(element, &pack, sizeof(Pack));
#pragma unroll
          for (int i = 0; i < WIDTH; ++i) part[i] = widen(element[i]);
        } else {
          part[0] = widen(from[d]);
        }
      }
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) to[piece * WIDTH + i] = part[i];
    }
  }

  // Blocks of a power of two, the usual case, cost no division a key.
  DEVICE int64_t slot_of(const int32_t* table, int key) const {
    if (p.block_shift >= 0) {
      return (static_cast<int64_t>(table[key >> p.block_shift]) << p.block_shift) + (key & (p.block_size - 1));
    }
    return static_cast<int64_t>(table[key / p.block_size]) * p.block_size + key % p.block_size;
  }

  // Adds keys begin … end (inclusive) of the segment's sequence to the state; those before the oldest are not read.
  DEVICE void attend(const Segment& g, int tile_start, int kv_head, int begin, int end, State<ROWS, kHeld>& s) const {
    const int32_t* table = p.table + static_cast<int64_t>(g.sequence) * p.table_width;
    for (int base = begin; base <= end; base += kStride) {
      float k[kUnroll][kHeld], v[kUnroll][kHeld], score[kUnroll][ROWS];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int key = base + u * kGroups + group;
        const bool inside = key <= end && key >= g.oldest;
        const int64_t slot = inside ? slot_of(table, key) : 0;
        const int64_t entry = (slot * p.kv_heads + kv_head) * p.dims;
        load_entry(p.k_cache, entry, inside, k[u]);
        load_entry(p.v_cache, entry, inside, v[u]);
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int key = base + u * kGroups + group;
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          float dot = 0;
#pragma unroll
          for (int i = 0; i < kHeld; ++i) dot += q[r][i] * k[u][i];
          dot = sum_of_lanes<kLanes>(dot);
          const int position = g.position + tile_start + r / heads_of(p) - g.first_token;
          const bool seen = key <= end && key <= position && key >= position - p.window;
          score[u][r] = seen ? dot : -INFINITY;
        }
      }
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        float larger = s.m[r];
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) larger = fmaxf(larger, score[u][r]);
        if (larger == -INFINITY) continue;
        const float keep = rescaling(s.m[r], larger);
        s.m[r] = larger;
        s.l[r] *= keep;
#pragma unroll
        for (int i = 0; i < kHeld; ++i) s.value[r][i] *= keep;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const float weight = rescaling(score[u][r], larger);
          s.l[r] += weight;
#pragma unroll
          for (int i = 0; i < kHeld; ++i) s.value[r][i] += weight * v[u][i];
        }
      }
    }
  }

  // The block's state of every row: [ROWS][dims + 2] in shared memory, m and l last. Ends with a barrier.
  DEVICE void merge(State<ROWS, kHeld>& s, float* shared) const {
    const int stride = p.dims + 2, warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      const float larger =
          fmaxf(fmaxf(s.m[r], shuffle_xor(s.m[r], 8)), fmaxf(shuffle_xor(s.m[r], 16), shuffle_xor(s.m[r], 24)));
      const float keep = rescaling(s.m[r], larger);
      float* row = shared + (warp * ROWS + r) * stride;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        float value = s.value[r][i] * keep;
        value += shuffle_xor(value, 8);
        value += shuffle_xor(value, 16);
        const int d = dimension(i / WIDTH) + i % WIDTH;
        if (group % (kWarp / kLanes) == 0 && d < p.dims) row[d] = value;
      }
      float l = s.l[r] * keep;
      l += shuffle_xor(l, 8);
      l += shuffle_xor(l, 16);
      if (threadIdx.x % kWarp == 0) row[p.dims] = larger, row[p.dims + 1] = l;
    }
    sync_block();
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * p.dims; i += kThreads) {
      const int r = i / p.dims, d = i % p.dims;
      float larger = -INFINITY, l = 0, value = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) larger = fmaxf(larger, shared[(w * ROWS + r) * stride + p.dims]);
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        const float* row = shared + (w * ROWS + r) * stride;
        const float keep = rescaling(row[p.dims], larger);
        value += keep * row[d];
        l += keep * row[p.dims + 1];
      }
      float* to = shared + (kWarps * ROWS + r) * stride;
      to[d] = value;
      if (d == 0) to[p.dims] = larger, to[p.dims + 1] = l;
    }
    sync_block();
  }
};

template <typename T>
DEVICE void write_row(const PagedAttention& p, int token, int head, int d, float value, float l) {
  const int64_t place = (static_cast<int64_t>(token) * p.heads + head) * p.dims + d;
  static_cast<T*>(p.out)[place] = narrow<T>(l > 0 ? value / l : 0.0f);  // l = 0: padding sees nothing
}

template <typename T, typename CacheT, int ROWS, int PIECES, int WIDTH>
KERNEL(kThreads)
paged_attention_kernel(PagedAttention p) {
  using Work = Block<T, CacheT, ROWS, PIECES, WIDTH>;
  SHARED int32_t last_to_arrive;
  float* shared = dynamic_shared<float>();
  const int thread = static_cast<int>(threadIdx.x), stride = p.dims + 2;
  const int heads = Work::heads_of(p), per_kv_head = p.heads / p.kv_heads;
  const int parts = divide_up(per_kv_head, heads), kv_head = static_cast<int>(blockIdx.y) / parts;
  const int first_head = kv_head * per_kv_head + static_cast<int>(blockIdx.y) % parts * heads;
  const int last_head = (kv_head + 1) * per_kv_head - 1, split = static_cast<int>(blockIdx.z);
  const int tile_start = static_cast<int>(blockIdx.x) * p.tile;
  const int tile_end = tile_start + p.tile < p.count ? tile_start + p.tile : p.count;
  Work work{p, {}, thread % kLanes, thread / kLanes};
  wait_for_previous_kernel();
  let_next_kernel_start();

  for (int token = tile_start; token < tile_end;) {
    const Segment g = segment_at(p, token, tile_end);
    const int span = g.oldest / kSpan + split;
    const int begin = g.oldest > span * kSpan ? g.oldest / Work::kStride * Work::kStride : span * kSpan;
    const int end = g.newest < span * kSpan + kSpan - 1 ? g.newest : span * kSpan + kSpan - 1;
    if (begin <= end || p.splits == 1) {  // the same for the whole block
      State<ROWS, Work::kHeld> state;
      state.clear();
      work.load_queries(g, tile_start, first_head, last_head);
      work.attend(g, tile_start, kv_head, begin, end, state);
      work.merge(state, shared);
      const float* merged = shared + kWarps * ROWS * stride;
      for (int i = thread; i < ROWS * p.dims; i += kThreads) {
        const int r = i / p.dims, d = i % p.dims, n = tile_start + r / heads, head = first_head + r % heads;
        if (n < g.first_token || n > g.last_token || head > last_head) continue;
        const float value = merged[r * stride + d], m = merged[r * stride + p.dims],
                    l = merged[r * stride + p.dims + 1];
        if (p.splits == 1) {
          write_row<T>(p, n, head, d, value, l);
        } else {
          const int64_t part = (static_cast<int64_t>(n) * p.heads + head) * p.splits + split;
          p.values[part * p.dims + d] = value;
          if (d == 0) p.sums[2 * part] = m, p.sums[2 * part + 1] = l;
        }
      }
      sync_block();  // shared memory is used again
    }
    token = g.last_token + 1;
  }
  if (p.splits == 1) return;

  publish();
  sync_block();
  if (thread == 0) {
    int32_t* arrivals = p.arrivals + blockIdx.y * gridDim.x + blockIdx.x;
    last_to_arrive = add_atomically(arrivals, 1) == p.splits - 1;
    if (last_to_arrive) *arrivals = 0;
    publish();
  }
  sync_block();
  if (!last_to_arrive) return;
  for (int i = thread; i < ROWS * p.dims; i += kThreads) {
    const int r = i / p.dims, d = i % p.dims, n = tile_start + r / heads, head = first_head + r % heads;
    if (n >= tile_end || head > last_head) continue;
    // Only splits that hold keys of the token's segment have written; it begins where the sequence's share of the tile
    // does.
    const int sequence = sequence_of(n, p.starts, p.sequences);
    const int start = p.starts[sequence] > tile_start ? p.starts[sequence] : tile_start;
    const Segment g = segment_at(p, start, tile_end);
    const int used = g.newest < 0 ? 0 : g.newest / kSpan - g.oldest / kSpan + 1;
    const int64_t part = (static_cast<int64_t>(n) * p.heads + head) * p.splits;
    float larger = -INFINITY, value = 0, l = 0;
    for (int j = 0; j < used; ++j) larger = fmaxf(larger, load_shared_by_blocks(p.sums + 2 * (part + j)));
    for (int j = 0; j < used; ++j) {
      const float keep = rescaling(load_shared_by_blocks(p.sums + 2 * (part + j)), larger);
      value += keep * load_shared_by_blocks(p.values + (part + j) * p.dims + d);
      l += keep * load_shared_by_blocks(p.sums + 2 * (part + j) + 1);
    }
    write_row<T>(p, n, head, d, value, l);
  }
}

int rows_of(const PagedAttention& p) { return p.count == p.sequences && p.heads == p.kv_heads ? 1 : 4; }

bool wide(const PagedAttention& p) {
  const int bytes = p.cache_type == Type::float32 ? 4 : p.cache_type == Type::bfloat16 ? 2 : 1;
  const int64_t q_row = p.q_stride * (p.type == Type::float32 ? 4 : 2);
  return p.dims * bytes % 16 == 0 && q_row % 16 == 0 && aligned(p.q) && aligned(p.k_cache) && aligned(p.v_cache);
}

template <typename T, typename CacheT, int ROWS, int PIECES, int WIDTH>
const char* start(const PagedAttention& p, CUstream_st* stream) {
  const int heads = ROWS / p.tile, parts = divide_up(p.heads / p.kv_heads, heads);
  const dim3 grid(static_cast<unsigned>(divide_up(p.count, p.tile)), static_cast<unsigned>(p.kv_heads * parts),
                  static_cast<unsigned>(p.splits));
  const int bytes = (kWarps + 1) * ROWS * (p.dims + 2) * static_cast<int>(sizeof(float));
  return launch(paged_attention_kernel<T, CacheT, ROWS, PIECES, WIDTH>, grid, kThreads, bytes, stream, p);
}

// PIECES so that 8 lanes · PIECES · WIDTH dimensions hold a head.
template <typename T, typename CacheT>
const char* run(const PagedAttention& p, CUstream_st* stream) {
  constexpr int kWide = sizeof(Pack) / sizeof(CacheT), kOnce = kLanes * kWide;
  if (!wide(p)) {
    if constexpr (sizeof(CacheT) == 1)
      return "an FP8 cache takes head sizes in multiples of 16, on 16-byte boundaries";
    else
      return start<T, CacheT, 1, 32, 1>(p, stream);
  }
  const bool single = rows_of(p) == 1;
  if constexpr (kOnce < 128) {
    if (p.dims <= 64) {
      return single ? start<T, CacheT, 1, 64 / kOnce, kWide>(p, stream)
                    : start<T, CacheT, 4, 64 / kOnce, kWide>(p, stream);
    }
  }
  if (p.dims <= 128) {
    return single ? start<T, CacheT, 1, 128 / kOnce, kWide>(p, stream)
                  : start<T, CacheT, 4, 128 / kOnce, kWide>(p, stream);
  }
  return start<T, CacheT, 1, 256 / kOnce, kWide>(p, stream);
}

}  // namespace

PagedAttentionPlan plan_paged_attention(const PagedAttention& p) {
  const int per_kv_head = p.heads / p.kv_heads;
  const int rows = wide(p) && p.dims <= 128 ? rows_of(p) : 1;
  const int tile = p.count == p.sequences ? 1 : per_kv_head >= rows ? 1 : per_kv_head == 3 ? 1 : rows / per_kv_head;
  const int64_t capacity = static_cast<int64_t>(p.table_width) * p.block_size;
  const int64_t seen = static_cast<int64_t>(p.window) + tile;
  const int64_t whole = divide_up<int64_t>(capacity, kSpan), windowed = divide_up<int64_t>(seen, kSpan) + 1;
  const int splits = static_cast<int>(whole < windowed ? whole : windowed);
  const int parts = divide_up(per_kv_head, rows / tile);
  return {tile, splits < 1 ? 1 : splits, divide_up(p.count, tile) * p.kv_heads * parts};
}

const char* paged_attention(const PagedAttention& asked, CUstream_st* stream) {
  PagedAttention p = asked;
  p.block_shift = 0;
  while (1 << p.block_shift < p.block_size) ++p.block_shift;
  if (1 << p.block_shift != p.block_size) p.block_shift = -1;
  if (p.dims > 256) return "paged_attention takes head sizes up to 256";
  if (p.splits > 65535) return "the table is too wide: at most 8,388,480 positions";
  if (p.type == Type::float32) return run<float, float>(p, stream);
  return p.cache_type == Type::fp8 ? run<bf16, fp8>(p, stream) : run<bf16, bf16>(p, stream);
}

}  // namespace nanochat
