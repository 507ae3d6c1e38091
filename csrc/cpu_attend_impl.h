// Attention of one query position over the paged cache, written once over V like everything in cpu_kernels_impl.h,
// which includes this file.

// Channels of a cache come in chunks of two vectors: its halves for floats; for bf16, whose pairs a 32-bit lane holds,
// its even and its odd channels, which a shift and a mask turn into floats. Queries and sums of values are arranged
// likewise; what is left after whole chunks keeps its place.
constexpr int64_t kChunk = 2 * V::lanes;
NANOCHAT_INLINE void load_chunk(const float* p, V::F& a, V::F& b) {
  a = V::load(p);
  b = V::load(p + V::lanes);
}
NANOCHAT_INLINE void load_chunk(const uint16_t* p, V::F& a, V::F& b) {
  const V::I w = V::words(reinterpret_cast<const uint32_t*>(p));
  a = V::bits(V::template shl<16>(w));
  b = V::bits(V::mask(w, 0xffff0000u));
}
NANOCHAT_INLINE float one_of(const float* p) { return *p; }
NANOCHAT_INLINE float one_of(const uint16_t* p) { return from_bf16(*p); }

// Calls body(channel, place) for the d channels of a head.
template <class T, class Body>
NANOCHAT_INLINE void places(int64_t d, Body&& body) {
  int64_t i = 0;
  if constexpr (sizeof(T) == 2)
    for (; i + kChunk <= d; i += kChunk)
      for (int64_t j = 0; j < V::lanes; ++j) body(i + 2 * j, i + j), body(i + 2 * j + 1, i + j + V::lanes);
  for (; i < d; ++i) body(i, i);
}

// out[t] = scale·q·k[t·stride …) for N keys at a time, which share the loads of q. A key's sum has the same order in
// any company.
template <int N, class T>
NANOCHAT_INLINE void dots(const float* q, const T* k, int64_t stride, int64_t d, float scale, float* out) {
  V::F even[N], odd[N];
  unroll<N>([&](auto t) { even[t] = odd[t] = V::zero(); });
  int64_t i = 0;
  for (; i + kChunk <= d; i += kChunk) {
    const V::F qa = V::load(q + i), qb = V::load(q + i + V::lanes);
    unroll<N>([&](auto t) {
      V::F a, b;
      load_chunk(k + t * stride + i, a, b);
      even[t] = V::fma(qa, a, even[t]);
      odd[t] = V::fma(qb, b, odd[t]);
    });
  }
  unroll<N>([&](auto t) {
    float total = V::sum(V::add(even[t], odd[t]));
    for (int64_t rest = i; rest < d; ++rest) total += q[rest] * one_of(k + t * stride + rest);
    out[t] = scale * total;
  });
}

// weights[0 … n) := exp(weights − max), in place; the sum.
float softmax_numerators(float* weights, int64_t n) {
  V::F tops = V::set(weights[0]), sum = V::zero();
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) tops = V::max(tops, V::load(weights + i));
  float lanes[V::lanes], top = weights[0];
  V::store(lanes, tops);
  for (float lane : lanes) top = lane > top ? lane : top;
  for (; i < n; ++i) top = weights[i] > top ? weights[i] : top;
  for (i = 0; i + V::lanes <= n; i += V::lanes) {
    const V::F e = exp_of(V::sub(V::load(weights + i), V::set(top)));
    V::store(weights + i, e);
    sum = V::add(sum, e);
  }
  float rest[V::lanes] = {}, total = V::sum(sum);
  for (int64_t j = i; j < n; ++j) rest[j - i] = weights[j] - top;
  V::store(rest, exp_of(V::load(rest)));
  for (int64_t j = i; j < n; ++j) total += weights[j] = rest[j - i];
  return total;
}

// A head's keys lie a whole slot apart, a stride that no hardware prefetcher follows: ask for what comes a block later.
template <class T>
NANOCHAT_INLINE void prefetch(const T* p, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + i);
}

// out[i … i + N chunks) += Σ_t p[t]·v[t·stride …), out arranged: the sums stay in registers. `later`: the block to
// prefetch meanwhile, or null.
template <int N, class T>
NANOCHAT_INLINE void add_chunks(float* out, const float* p, const T* v, const T* later, int64_t n, int64_t stride) {
  V::F acc[2 * N];
  unroll<2 * N>([&](auto j) { acc[j] = V::load(out + j * V::lanes); });
  for (int64_t t = 0; t < n; ++t) {
    if (later) prefetch(later + t * stride, N * kChunk);
    const V::F weight = V::set(p[t]);
    unroll<N>([&](auto j) {
      V::F a, b;
      load_chunk(v + t * stride + j * kChunk, a, b);
      acc[2 * j] = V::fma(weight, a, acc[2 * j]);
      acc[2 * j + 1] = V::fma(weight, b, acc[2 * j + 1]);
    });
  }
  unroll<2 * N>([&](auto j) { V::store(out + j * V::lanes, acc[j]); });
}

template <class T>
void add_weighted(float* out, const float* p, const T* v, const T* later, int64_t n, int64_t stride, int64_t d) {
  int64_t i = 0;
  for (; i + 4 * kChunk <= d; i += 4 * kChunk) add_chunks<4>(out + i, p, v + i, later ? later + i : later, n, stride);
  for (; i + kChunk <= d; i += kChunk) add_chunks<1>(out + i, p, v + i, later ? later + i : later, n, stride);
  for (; i < d; ++i)
    for (int64_t t = 0; t < n; ++t) out[i] += p[t] * one_of(v + t * stride + i);
}

template <class T>
void attend_of(const AttendArgs& a) {
  const int64_t keys = a.last - a.first + 1, d = a.head_dim, heads = a.groups * a.heads;
  float *totals = a.scratch + heads * keys, *q = totals + heads, *sums = q + heads * d;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
  // Calls body(first key's index, its address, the next block's or null, how many) for the stretch inside each block.
  const auto stretches = [&](const void* base, auto&& body) {
    for (int64_t position = a.first; position <= a.last;) {
      const int64_t slot = position % a.block_size, left = a.last - position + 1;
      const int64_t n = a.block_size - slot < left ? a.block_size - slot : left;
      const auto block_of = [&](int64_t p) {
        return static_cast<const T*>(base) + a.table[p / a.block_size] * a.block_stride;
      };
      const T* later = n < left ? block_of(position + n) : nullptr;
      body(position - a.first, block_of(position) + slot * a.slot_stride, later, n);
      position += n;
    }
  };
  for (int64_t h = 0; h < heads; ++h)
    places<T>(d, [&](int64_t channel, int64_t place) { q[h * d + place] = a.q[h * d + channel]; });
  const auto each_head = [&](auto&& body) {  // body(group's first channel, head, whether the first of its group)
    for (int64_t g = 0, h = 0; g < a.groups; ++g)
      for (int64_t i = 0; i < a.heads; ++i, ++h) body(g * d, h, i == 0);
  };
  stretches(a.k, [&](int64_t at, const T* k, const T* later, int64_t n) {
    for (int64_t t = 0; t < n;) {
      const int64_t together = n - t >= 4 ? 4 : 1;
      for (int64_t i = 0; later && i < together; ++i) prefetch(later + (t + i) * a.slot_stride, a.groups * d);
      each_head([&](int64_t channel, int64_t h, bool) {
        const T* first = k + t * a.slot_stride + channel;
        float* out = a.scratch + h * keys + at + t;
        if (together == 4) return dots<4>(q + h * d, first, a.slot_stride, d, scale, out);
        dots<1>(q + h * d, first, a.slot_stride, d, scale, out);
      });
      t += together;
    }
  });
  for (int64_t h = 0; h < heads; ++h) totals[h] = softmax_numerators(a.scratch + h * keys, keys);
  for (int64_t i = 0; i < heads * d; ++i) sums[i] = 0.0f;
  stretches(a.v, [&](int64_t at, const T* v, const T* later, int64_t n) {
    each_head([&](int64_t channel, int64_t h, bool first) {
      const T* ask = first && later ? later + channel : nullptr;
      add_weighted(sums + h * d, a.scratch + h * keys + at, v + channel, ask, n, a.slot_stride, d);
    });
  });
  for (int64_t h = 0; h < heads; ++h) {
    const float share = 1.0f / totals[h];
    places<T>(d, [&](int64_t channel, int64_t place) { a.out[h * d + channel] = sums[h * d + place] * share; });
  }
}

void attend(const AttendArgs& a) { a.bf16 ? attend_of<uint16_t>(a) : attend_of<float>(a); }
