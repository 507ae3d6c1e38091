// The kernels, written once over a vector type V that each level's file defines before it includes this one.
// V: F floats and I 32-bit words of `lanes` lanes; `rows` is how many rows of a product fit into its registers.
// Everything here has internal linkage (an unnamed namespace around the include): code made for one level stays there.

#define NANOCHAT_INLINE inline __attribute__((always_inline))

constexpr int kVecs = static_cast<int>(kPanel) / V::lanes;

template <int N, class Body>
NANOCHAT_INLINE void unroll(Body&& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// Weight `i` of every lane's word as a float: the stored value for fp32 and bf16, the integer for int8 and int4.
template <Format format>
struct Code;
template <>
struct Code<Format::fp32> {
  static constexpr int per_word = 1;
  template <int i>
  static NANOCHAT_INLINE V::F at(V::I w) {
    return V::bits(w);
  }
};
template <>
struct Code<Format::bf16> {
  static constexpr int per_word = 2;
  template <int i>
  static NANOCHAT_INLINE V::F at(V::I w) {
    return V::bits(i == 0 ? V::template shl<16>(w) : V::mask(w, 0xffff0000u));
  }
};
template <>
struct Code<Format::int8> {
  static constexpr int per_word = 4;
  template <int i>
  static NANOCHAT_INLINE V::F at(V::I w) {
    return V::to_float(V::template sar<24>(V::template shl<24 - 8 * i>(w)));
  }
};
template <>
struct Code<Format::int4> {
  static constexpr int per_word = 8;
  template <int i>
  static NANOCHAT_INLINE V::F at(V::I w) {
    return V::to_float(i == 7 ? V::template shr<28>(w) : V::mask(V::template shr<4 * i>(w), 15u));
  }
};

NANOCHAT_INLINE V::F exp_of(V::F x) {  // Cephes' expf: 2^n · e^r with |r| ≤ ln2/2, about 1 ulp
  x = V::min(V::max(x, V::set(-87.0f)), V::set(88.0f));
  const V::F n = V::round(V::mul(x, V::set(1.44269504088896341f)));
  V::F r = V::fma(n, V::set(-0.693359375f), x);
  r = V::fma(n, V::set(2.12194440e-4f), r);
  V::F p = V::set(1.9875691500e-4f);
  p = V::fma(p, r, V::set(1.3981999507e-3f));
  p = V::fma(p, r, V::set(8.3334519073e-3f));
  p = V::fma(p, r, V::set(4.1665795894e-2f));
  p = V::fma(p, r, V::set(1.6666665459e-1f));
  p = V::fma(p, r, V::set(5.0000001201e-1f));
  p = V::add(V::fma(p, V::mul(r, r), r), V::set(1.0f));
  return V::scale2(p, n);
}

NANOCHAT_INLINE V::F tanh_of(V::F x) {  // odd polynomial near 0, where 1 − 2/(e^2x + 1) would cancel
  const V::F z = V::mul(x, x), magnitude = V::max(x, V::sub(V::zero(), x));
  V::F p = V::set(-5.70498872745e-3f);
  p = V::fma(p, z, V::set(2.06390887954e-2f));
  p = V::fma(p, z, V::set(-5.37397155531e-2f));
  p = V::fma(p, z, V::set(1.33314422036e-1f));
  p = V::fma(p, z, V::set(-3.33332819422e-1f));
  const V::F near = V::fma(V::mul(p, z), x, x);
  const V::F e = exp_of(V::add(x, x));
  const V::F far = V::sub(V::set(1.0f), V::div(V::set(2.0f), V::add(e, V::set(1.0f))));
  return V::where_less(magnitude, V::set(0.625f), near, far);
}

NANOCHAT_INLINE V::F finish(V::F y, Epilogue epilogue, float softcap) {
  if (epilogue == Epilogue::relu2) {
    y = V::max(y, V::zero());
    return V::mul(y, y);
  }
  if (epilogue == Epilogue::softcap) return V::mul(V::set(softcap), tanh_of(V::div(y, V::set(softcap))));
  return y;
}

NANOCHAT_INLINE float group_sum(const float* x) {
  V::F sum = V::load(x);
  for (int64_t k = V::lanes; k < kGroup; k += V::lanes) sum = V::add(sum, V::load(x + k));
  return V::sum(sum);
}

struct Tile {  // where a product's panel finds its parts
  const uint32_t* words;
  const float* channel;    // int8
  const uint16_t* halves;  // int4
};

template <Format format>
NANOCHAT_INLINE Tile tile_of(const Packed& w, int64_t panel) {
  Tile tile{w.words + panel * kPanel * (w.inputs / Code<format>::per_word), nullptr, nullptr};
  if (format == Format::int8) tile.channel = static_cast<const float*>(w.scales) + panel * kPanel;
  if (format == Format::int4)
    tile.halves = static_cast<const uint16_t*>(w.scales) + panel * (w.inputs / kGroup) * 2 * kPanel;
  return tile;
}

// R rows (few) times P panels, decoding each word once. x: R rows; y: R rows at the first panel's outputs.
template <Format format, int R, int P>
void direct(const LinearArgs& a, int64_t panel, int64_t row) {
  using C = Code<format>;
  constexpr int per = C::per_word, vecs = P * kVecs;
  const float* x = a.x + row * a.x_stride;
  float* y = a.y + row * a.y_stride + panel * kPanel;
  Tile tiles[P];
  for (int p = 0; p < P; ++p) tiles[p] = tile_of<format>(a.weight, panel + p);
  const int64_t inputs = a.weight.inputs, span = format == Format::int4 ? kGroup : inputs;
  for (int64_t start = 0; start < inputs; start += span) {
    V::F acc[R][vecs];
    unroll<R>([&](auto r) { unroll<vecs>([&](auto v) { acc[r][v] = V::zero(); }); });
    for (int64_t k = start; k < start + span; k += per) {
      unroll<vecs>([&](auto v) {
        const V::I word = V::words(tiles[v / kVecs].words + (k / per) * kPanel + (v % kVecs) * V::lanes);
        unroll<per>([&](auto i) {
          const V::F w = C::template at<i>(word);
          unroll<R>([&](auto r) { acc[r][v] = V::fma(V::set(x[r * a.x_stride + k + i]), w, acc[r][v]); });
        });
      });
    }
    float sums[R];
    if (format == Format::int4) unroll<R>([&](auto r) { sums[r] = group_sum(x + r * a.x_stride + start); });
    const bool last = start + span == inputs;
    unroll<vecs>([&](auto v) {
      const Tile& tile = tiles[v / kVecs];
      const int64_t lane = (v % kVecs) * V::lanes, group = (start / kGroup) * 2 * kPanel + lane;
      unroll<R>([&](auto r) {
        float* out = y + r * a.y_stride + v * V::lanes;
        V::F value = acc[r][v];
        if (format == Format::int8) value = V::mul(value, V::load(tile.channel + lane));
        if (format == Format::int4) {
          const V::F before = start == 0 ? V::zero() : V::load(out);
          value = V::fma(V::halves(tile.halves + group), value, before);
          value = V::fma(V::halves(tile.halves + group + kPanel), V::set(sums[r]), value);
        }
        V::store(out, last ? finish(value, a.epilogue, a.softcap) : value);
      });
    });
  }
}

// R rows times one panel whose weights [begin, end) lie decoded in `decoded`; y carries the sums from span to span.
template <Format format, int R>
void blocked(const LinearArgs& a, const Tile& tile, const float* decoded, const float* sums, int64_t panel, int64_t row,
             int64_t begin, int64_t end) {
  const float* x = a.x + row * a.x_stride;
  float* y = a.y + row * a.y_stride + panel * kPanel;
  const int64_t inputs = a.weight.inputs, groups = inputs / kGroup,
                span = format == Format::int4 ? kGroup : end - begin;
  for (int64_t start = begin; start < end; start += span) {
    const bool first = start == 0, last = start + span == inputs;
    V::F acc[R][kVecs];
    unroll<R>([&](auto r) {
      unroll<kVecs>([&](auto v) {
        const bool fresh = first || format == Format::int4;
        acc[r][v] = fresh ? V::zero() : V::load(y + r * a.y_stride + v * V::lanes);
      });
    });
    for (int64_t k = start; k < start + span; ++k) {
      V::F value[R];
      unroll<R>([&](auto r) { value[r] = V::set(x[r * a.x_stride + k]); });
      unroll<kVecs>([&](auto v) {
        const V::F w = V::load(decoded + (k - begin) * kPanel + v * V::lanes);
        unroll<R>([&](auto r) { acc[r][v] = V::fma(value[r], w, acc[r][v]); });
      });
    }
    unroll<kVecs>([&](auto v) {
      const int64_t lane = v * V::lanes, group = (start / kGroup) * 2 * kPanel + lane;
      unroll<R>([&](auto r) {
        float* out = y + r * a.y_stride + lane;
        V::F value = acc[r][v];
        if (format == Format::int8 && last) value = V::mul(value, V::load(tile.channel + lane));
        if (format == Format::int4) {
          const V::F before = first ? V::zero() : V::load(out);
          value = V::fma(V::halves(tile.halves + group), value, before);
          value =
              V::fma(V::halves(tile.halves + group + kPanel), V::set(sums[(row + r) * groups + start / kGroup]), value);
        }
        V::store(out, last ? finish(value, a.epilogue, a.softcap) : value);
      });
    });
  }
}

template <Format format>
void decode(const Tile& tile, int64_t begin, int64_t end, float* decoded) {
  constexpr int per = Code<format>::per_word;
  for (int64_t k = begin; k < end; k += per) {
    const uint32_t* words = tile.words + (k / per) * kPanel;
    float* out = decoded + (k - begin) * kPanel;
    unroll<kVecs>([&](auto v) {
      const V::I word = V::words(words + v * V::lanes);
      unroll<per>([&](auto i) { V::store(out + i * kPanel + v * V::lanes, Code<format>::template at<i>(word)); });
    });
  }
}

// Calls body(R) with the compile-time number of rows: V::rows at a time, then what is left.
template <int R, class Body>
NANOCHAT_INLINE void with_rows(int64_t rows, Body&& body) {
  if (rows >= R) return body(std::integral_constant<int, R>{});
  if constexpr (R > 1) with_rows<R - 1>(rows, body);
}

template <Format format>
void linear_many(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  float *decoded = scratch, *sums = scratch + kDecode * kPanel;
  const int64_t inputs = a.weight.inputs, groups = inputs / kGroup;
  if (format == Format::int4)
    for (int64_t row = 0; row < a.rows; ++row)
      for (int64_t g = 0; g < groups; ++g) sums[row * groups + g] = group_sum(a.x + row * a.x_stride + g * kGroup);
  for (int64_t panel = begin; panel < end; ++panel) {
    const Tile tile = tile_of<format>(a.weight, panel);
    for (int64_t k = 0; k < inputs; k += kDecode) {
      const int64_t stop = k + kDecode < inputs ? k + kDecode : inputs;
      decode<format>(tile, k, stop, decoded);
      for (int64_t row = 0; row < a.rows;)
        with_rows<V::rows>(a.rows - row, [&](auto r) {
          blocked<format, r>(a, tile, decoded, sums, panel, row, k, stop);
          row += r;
        });
    }
  }
}

template <Format format>
void linear_of(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  if (a.rows > V::rows) return linear_many<format>(a, begin, end, scratch);
  if (a.rows == 1) {
    for (; begin + 2 <= end; begin += 2) direct<format, 1, 2>(a, begin, 0);
  }
  for (; begin < end; ++begin) with_rows<V::rows>(a.rows, [&](auto r) { direct<format, r, 1>(a, begin, 0); });
}

void linear(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  switch (a.weight.format) {
    case Format::fp32:
      return linear_of<Format::fp32>(a, begin, end, scratch);
    case Format::bf16:
      return linear_of<Format::bf16>(a, begin, end, scratch);
    case Format::int8:
      return linear_of<Format::int8>(a, begin, end, scratch);
    case Format::int4:
      return linear_of<Format::int4>(a, begin, end, scratch);
  }
}

float inverse_rms(const float* x, int64_t n) {
  V::F sum = V::zero();
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
    const V::F value = V::load(x + i);
    sum = V::fma(value, value, sum);
  }
  float total = V::sum(sum);
  for (; i < n; ++i) total += x[i] * x[i];
  return 1.0f / __builtin_sqrtf(total / static_cast<float>(n) + 1.1920929e-07f);
}

void norm(const NormArgs& a) {
  float* mixed = a.mixed ? a.mixed : a.y;
  for (int64_t i = 0; i < a.n; ++i) {
    float value = a.delta ? a.x[i] + a.delta[i] : a.x[i];
    value *= a.scale;
    mixed[i] = a.other ? value + a.other_scale * a.other[i] : value;
  }
  if (!a.y) return;
  const float factor = inverse_rms(mixed, a.n);
  for (int64_t i = 0; i < a.n; ++i) a.y[i] = mixed[i] * factor;
}

void rope_norm(float* head, const float* cos, const float* sin, int64_t d, float scale) {
  float *low = head, *high = head + d / 2;
  for (int64_t i = 0; i < d / 2; ++i) {
    const float a = low[i], b = high[i];
    low[i] = a * cos[i] + b * sin[i];
    high[i] = b * cos[i] - a * sin[i];
  }
  const float factor = scale * inverse_rms(head, d);
  for (int64_t i = 0; i < d; ++i) head[i] *= factor;
}

NANOCHAT_INLINE V::F load_cache(const float* p) { return V::load(p); }
NANOCHAT_INLINE V::F load_cache(const uint16_t* p) { return V::bf16s(p); }
NANOCHAT_INLINE float one_of(const float* p) { return *p; }
NANOCHAT_INLINE float one_of(const uint16_t* p) { return from_bf16(*p); }

template <class T>
float dot(const float* q, const T* k, int64_t d) {
  V::F a = V::zero(), b = V::zero(), c = V::zero(), e = V::zero();
  int64_t i = 0;
  for (; i + 4 * V::lanes <= d; i += 4 * V::lanes) {
    a = V::fma(V::load(q + i), load_cache(k + i), a);
    b = V::fma(V::load(q + i + V::lanes), load_cache(k + i + V::lanes), b);
    c = V::fma(V::load(q + i + 2 * V::lanes), load_cache(k + i + 2 * V::lanes), c);
    e = V::fma(V::load(q + i + 3 * V::lanes), load_cache(k + i + 3 * V::lanes), e);
  }
  for (; i + V::lanes <= d; i += V::lanes) a = V::fma(V::load(q + i), load_cache(k + i), a);
  float total = V::sum(V::add(V::add(a, b), V::add(c, e)));
  for (; i < d; ++i) total += q[i] * one_of(k + i);
  return total;
}

// weights[0 … n) := exp(weights − max), in place; the sum.
float softmax_numerators(float* weights, int64_t n) {
  float top = weights[0];
  for (int64_t i = 1; i < n; ++i) top = weights[i] > top ? weights[i] : top;
  V::F sum = V::zero();
  int64_t i = 0;
  for (; i + V::lanes <= n; i += V::lanes) {
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

// out[0 … d) += Σ_t p[t]·v[t·stride …), eight vectors of channels at a time so that they stay in registers.
template <class T>
void add_weighted(float* out, const float* p, const T* v, int64_t n, int64_t stride, int64_t d) {
  int64_t i = 0;
  for (; i + 8 * V::lanes <= d; i += 8 * V::lanes) {
    V::F acc[8];
    unroll<8>([&](auto j) { acc[j] = V::load(out + i + j * V::lanes); });
    for (int64_t t = 0; t < n; ++t) {
      const V::F weight = V::set(p[t]);
      unroll<8>([&](auto j) { acc[j] = V::fma(weight, load_cache(v + t * stride + i + j * V::lanes), acc[j]); });
    }
    unroll<8>([&](auto j) { V::store(out + i + j * V::lanes, acc[j]); });
  }
  for (; i < d; ++i)
    for (int64_t t = 0; t < n; ++t) out[i] += p[t] * one_of(v + t * stride + i);
}

template <class T>
void attend_of(const AttendArgs& a) {
  const int64_t keys = a.last - a.first + 1, d = a.head_dim;
  const float scale = 1.0f / __builtin_sqrtf(static_cast<float>(d));
  // Calls body(first key's index, its address, how many) for the stretch inside each block.
  const auto stretches = [&](const void* base, auto&& body) {
    for (int64_t position = a.first; position <= a.last;) {
      const int64_t slot = position % a.block_size, left = a.last - position + 1;
      const int64_t n = a.block_size - slot < left ? a.block_size - slot : left;
      const int64_t block = a.table[position / a.block_size];
      body(position - a.first, static_cast<const T*>(base) + block * a.block_stride + slot * a.slot_stride, n);
      position += n;
    }
  };
  stretches(a.k, [&](int64_t at, const T* k, int64_t n) {
    for (int64_t h = 0; h < a.heads; ++h)
      for (int64_t t = 0; t < n; ++t) a.scratch[h * keys + at + t] = scale * dot(a.q + h * d, k + t * a.slot_stride, d);
  });
  float totals[64];  // the caller passes at most 64 heads
  for (int64_t h = 0; h < a.heads; ++h) totals[h] = softmax_numerators(a.scratch + h * keys, keys);
  for (int64_t i = 0; i < a.heads * d; ++i) a.out[i] = 0.0f;
  stretches(a.v, [&](int64_t at, const T* v, int64_t n) {
    for (int64_t h = 0; h < a.heads; ++h)
      add_weighted(a.out + h * d, a.scratch + h * keys + at, v, n, a.slot_stride, d);
  });
  for (int64_t h = 0; h < a.heads; ++h)
    for (int64_t i = 0; i < d; ++i) a.out[h * d + i] /= totals[h];
}

void attend(const AttendArgs& a) { a.bf16 ? attend_of<uint16_t>(a) : attend_of<float>(a); }
