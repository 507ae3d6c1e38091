// The kernels, written once over a vector type V that each level's file defines before it includes this one.
// V: F floats and I 32-bit words of `lanes` lanes; `rows` and `integer_rows`: how many rows of a float or an integer
// product fit into its registers.
// Everything here has internal linkage (an unnamed namespace around the include): code made for one level stays there.

#define NANOCHAT_INLINE inline __attribute__((always_inline))
#define NANOCHAT_APART __attribute__((noinline))  // inlined, a loop's sums lose their registers to what surrounds it

constexpr int kVecs = static_cast<int>(kPanel) / V::lanes;

template <int N, class Body>
NANOCHAT_INLINE void unroll(Body&& body) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) {
    (body(std::integral_constant<int, i>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}

// What a word holds. fp32 and bf16: at<i> is weight i of every lane as floats. int8: its four weights are bytes
// already; int4: at<i> is the four weights i, i + 2, i + 4, i + 6 as bytes: ready for a dot product with as many
// inputs. `parts` of them make a word.
template <Format format>
struct Code;
template <>
struct Code<Format::fp32> {
  static constexpr int per_word = 1, parts = 1;
  template <int i>
  static NANOCHAT_INLINE V::F at(V::I w) {
    return V::bits(w);
  }
};
template <>
struct Code<Format::bf16> {
  static constexpr int per_word = 2, parts = 2;
  template <int i>
  static NANOCHAT_INLINE V::F at(V::I w) {
    return V::bits(i == 0 ? V::template shl<16>(w) : V::mask(w, 0xffff0000u));
  }
};
template <>
struct Code<Format::int8> {
  static constexpr int per_word = 4, parts = 1;
  template <int i>
  static NANOCHAT_INLINE V::I at(V::I w) {
    return w;
  }
};
template <>
struct Code<Format::int4> {
  static constexpr int per_word = 8, parts = 2;
  template <int i>
  static NANOCHAT_INLINE V::I at(V::I w) {
    return V::mask(V::template shr16<4 * i>(w), 0x0f0f0f0fu);
  }
};
constexpr bool is_integer(Format format) { return format == Format::int8 || format == Format::int4; }
// Words of inputs (and of decoded weights per output) that k weights of an integer product meet.
constexpr int64_t input_words(int64_t k) { return k / 4; }

NANOCHAT_INLINE V::F exp_of(V::F x) {                    // Cephes' expf: 2^n · e^r with |r| ≤ ln2/2, about 1 ulp
  x = V::min(V::set(88.0f), V::max(V::set(-87.0f), x));  // in this order NaN stays NaN: a broken loss must show
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

// The inputs of integer products: 8-bit numbers with a scale per row and group. Their error of 1/254 of the group's
// largest input is well below the 1/30 of an int4 weight, and about that of an int8 one, whose scale is its whole
// row's.
struct Inputs {
  const uint32_t* words;       // (rows, stride), in the order in which weights come out of their words
  const float *scales, *sums;  // (rows, groups); sums: of the rounded inputs, scaled
  int64_t groups, stride;
};

struct Scratch {
  float* decoded;
  uint32_t* words;
  float *scales, *sums;
};

NANOCHAT_INLINE Scratch scratch_of(const LinearArgs& a, float* scratch) {
  Scratch s;
  s.decoded = scratch;
  s.words = reinterpret_cast<uint32_t*>(scratch + kDecode * kPanel);
  s.scales = scratch + kDecode * kPanel + a.rows * input_words(a.weight.inputs);
  s.sums = s.scales + a.rows * ((a.weight.inputs + kGroup - 1) / kGroup);
  return s;
}

// 64 inputs → 16 words of four bytes.
template <Format format>
NANOCHAT_INLINE void quantize_group(const float* x, uint32_t* words, float* scale, float* sum) {
  constexpr int per = Code<format>::per_word, parts = Code<format>::parts;
  V::F top = V::zero();
  for (int64_t k = 0; k < kGroup; k += V::lanes) {
    const V::F value = V::load(x + k);
    top = V::max(top, V::max(value, V::sub(V::zero(), value)));
  }
  float lanes[V::lanes], most = 0.0f;
  V::store(lanes, top);
  for (float lane : lanes) most = lane > most ? lane : most;
  const float step = most / 127.0f, inverse = step > 1e-35f ? 1.0f / step : 0.0f;
  int32_t codes[kGroup];
  int32_t total = 0;
  for (int64_t k = 0; k < kGroup; k += V::lanes) V::store_int(codes + k, V::mul(V::load(x + k), V::set(inverse)));
  for (int64_t k = 0; k < kGroup; ++k) total += codes[k];
  for (int64_t k = 0; k < kGroup; k += per)
    for (int i = 0; i < parts; ++i) {
      uint32_t word = 0;
      for (int j = 0; j < 4; ++j) word |= (static_cast<uint32_t>(codes[k + i + parts * j]) & 0xff) << (8 * j);
      *words++ = word;
    }
  *scale = step;
  *sum = step * static_cast<float>(total);
}

template <Format format>
void prepare_of(const LinearArgs& a, const Scratch& s) {
  const int64_t groups = a.weight.inputs / kGroup, words = input_words(kGroup);
  for (int64_t row = 0; row < a.rows; ++row)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = row * groups + g;
      quantize_group<format>(a.x + row * a.x_stride + g * kGroup, s.words + at * words, s.scales + at, s.sums + at);
    }
}

void prepare(const LinearArgs& a, float* scratch) {
  if (a.weight.format == Format::int8) prepare_of<Format::int8>(a, scratch_of(a, scratch));
  if (a.weight.format == Format::int4) prepare_of<Format::int4>(a, scratch_of(a, scratch));
}

// acc ← the dot products of a group of weights, weight(block, i, vector) as Code::at<i> gives them, with the inputs of
// R rows. int4's products may add up in 16 bits, which 8 times 2·15·127 do not fill, before they are widened.
template <Format format, int R, int N, class Weight>
NANOCHAT_INLINE void dot_group(V::I (&acc)[R][N], const Inputs& x, int64_t row, int64_t group, Weight&& weight) {
  constexpr bool narrow = format == Format::int4;
  constexpr int parts = Code<format>::parts;
  constexpr int64_t blocks = kGroup / Code<format>::per_word, run = narrow ? 4 : blocks;
  const uint32_t* inputs = x.words + row * x.stride + group * parts * blocks;
  unroll<R>([&](auto r) { unroll<N>([&](auto v) { acc[r][v] = V::set_words(0); }); });
  for (int64_t first = 0; first < blocks; first += run) {
    V::I sum[R][N];
    unroll<R>([&](auto r) { unroll<N>([&](auto v) { sum[r][v] = V::set_words(0); }); });
#pragma GCC unroll 1  // unrolled, all products come first and their sums last, through memory
    for (int64_t block = first; block < first + run; ++block)
      unroll<parts>([&](auto i) {
        V::I input[R];
        unroll<R>([&](auto r) { input[r] = V::set_words(inputs[r * x.stride + parts * block + i]); });
        unroll<N>([&](auto v) {
          const V::I w = weight(block, i, v);
          unroll<R>(
              [&](auto r) { sum[r][v] = narrow ? V::dot4(sum[r][v], w, input[r]) : V::dot8(sum[r][v], w, input[r]); });
        });
      });
    unroll<R>([&](auto r) {
      unroll<N>([&](auto v) { acc[r][v] = V::add_words(acc[r][v], narrow ? V::total4(sum[r][v]) : sum[r][v]); });
    });
  }
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

// out ← what a group of an integer product adds to it; `sum` holds Σ q·x of the group in units of the inputs' scale.
template <Format format>
NANOCHAT_INLINE void settle(const LinearArgs& a, const Tile& tile, int64_t group, int64_t lane, V::I sum, float scale,
                            float inputs_sum, float* out) {
  V::F value = V::mul(V::to_float(sum), V::set(scale));
  const V::F before = group == 0 ? V::zero() : V::load(out);
  const bool last = (group + 1) * kGroup == a.weight.inputs;
  if (format == Format::int8) {
    value = V::add(value, before);
    if (last) value = V::mul(value, V::load(tile.channel + lane));
  } else {
    const uint16_t* halves = tile.halves + group * 2 * kPanel + lane;
    value = V::fma(V::halves(halves), value, before);
    value = V::fma(V::halves(halves + kPanel), V::set(inputs_sum), value);
  }
  V::store(out, last ? finish(value, a.epilogue, a.softcap) : value);
}

// R rows (few) times P panels, decoding each word once, in as many independent sums as hide the latency of an fma.
template <int R>
constexpr int kTogether = R == 1 && kVecs >= 4 ? 4 : kVecs / 2;

template <Format format, int R, int P>
NANOCHAT_APART void direct(const LinearArgs& a, int64_t panel, const Inputs&) {
  using C = Code<format>;
  constexpr int per = C::per_word, vecs = P * kVecs, together = kTogether<R>;
  float* y = a.y + panel * kPanel;
  Tile tiles[P];
  for (int p = 0; p < P; ++p) tiles[p] = tile_of<format>(a.weight, panel + p);
  V::F acc[R][vecs];
  unroll<R>([&](auto r) { unroll<vecs>([&](auto v) { acc[r][v] = V::zero(); }); });
  for (int64_t k = 0; k < a.weight.inputs; k += per) {
    unroll<vecs / together>([&](auto part) {
      V::I word[together];
      unroll<together>([&](auto j) {
        constexpr int v = part * together + j;
        word[j] = V::words(tiles[v / kVecs].words + (k / per) * kPanel + (v % kVecs) * V::lanes);
      });
      unroll<per>([&](auto i) {
        V::F value[R];
        unroll<R>([&](auto r) { value[r] = V::set(a.x[r * a.x_stride + k + i]); });
        unroll<together>([&](auto j) {
          const V::F w = C::template at<i>(word[j]);
          constexpr int v = part * together + j;
          unroll<R>([&](auto r) { acc[r][v] = V::fma(value[r], w, acc[r][v]); });
        });
      });
    });
  }
  unroll<vecs>([&](auto v) {
    unroll<R>([&](auto r) { V::store(y + r * a.y_stride + v * V::lanes, finish(acc[r][v], a.epilogue, a.softcap)); });
  });
}

// Integer products do more between two loads than a core looks ahead over, so that the hardware's prefetcher alone
// leaves a fifth of the bandwidth unused: each line is asked for this many bytes before its use. (One panel at a time:
// two streams and their prefetches get in each other's way.)
constexpr int64_t kAhead = 2048;

template <Format format, int R>
NANOCHAT_APART void direct_integer(const LinearArgs& a, int64_t panel, const Inputs& x) {
  using C = Code<format>;
  constexpr int together = kTogether<R>, line = 64 / sizeof(V::I);
  constexpr int64_t blocks = kGroup / C::per_word;
  float* y = a.y + panel * kPanel;
  const Tile tile = tile_of<format>(a.weight, panel);
  for (int64_t group = 0; group < x.groups; ++group)
    unroll<kVecs / together>([&](auto part) {
      V::I acc[R][together];
      dot_group<format, R, together>(
          acc, x, 0, group, [&](int64_t block, auto i, auto j) __attribute__((always_inline)) {
            constexpr int v = part * together + j;
            const uint32_t* words = tile.words + (group * blocks + block) * kPanel + v * V::lanes;
            if constexpr (i == 0 && v % line == 0) __builtin_prefetch(words + kAhead / 4);
            return C::template at<i>(V::words(words));
          });
      unroll<together>([&](auto j) {
        constexpr int v = part * together + j;
        unroll<R>([&](auto r) {
          settle<format>(a, tile, group, v * V::lanes, acc[r][j], x.scales[r * x.groups + group],
                         x.sums[r * x.groups + group], y + r * a.y_stride + v * V::lanes);
        });
      });
    });
}

// R rows times one panel whose weights [begin, end) lie decoded in `decoded`; y carries the sums from span to span.
template <Format format, int R>
NANOCHAT_APART void blocked(const LinearArgs& a, const Tile&, const float* decoded, const Inputs&, int64_t panel,
                            int64_t row, int64_t begin, int64_t end) {
  const float* x = a.x + row * a.x_stride;
  float* y = a.y + row * a.y_stride + panel * kPanel;
  V::F acc[R][kVecs];
  unroll<R>([&](auto r) {
    unroll<kVecs>([&](auto v) { acc[r][v] = begin == 0 ? V::zero() : V::load(y + r * a.y_stride + v * V::lanes); });
  });
  for (int64_t k = begin; k < end; ++k) {
    V::F value[R];
    unroll<R>([&](auto r) { value[r] = V::set(x[r * a.x_stride + k]); });
    unroll<kVecs>([&](auto v) {
      const V::F w = V::load(decoded + (k - begin) * kPanel + v * V::lanes);
      unroll<R>([&](auto r) { acc[r][v] = V::fma(value[r], w, acc[r][v]); });
    });
  }
  const bool last = end == a.weight.inputs;
  unroll<kVecs>([&](auto v) {
    unroll<R>([&](auto r) {
      V::store(y + r * a.y_stride + v * V::lanes, last ? finish(acc[r][v], a.epilogue, a.softcap) : acc[r][v]);
    });
  });
}

template <Format format, int R>
NANOCHAT_APART void blocked_integer(const LinearArgs& a, const Tile& tile, const float* decoded, const Inputs& x,
                                    int64_t panel, int64_t row, int64_t begin, int64_t end) {
  float* y = a.y + row * a.y_stride + panel * kPanel;
  const uint32_t* weights = reinterpret_cast<const uint32_t*>(decoded);
  for (int64_t group = begin / kGroup; group < end / kGroup; ++group) {
    V::I acc[R][kVecs];
    dot_group<format, R, kVecs>(acc, x, row, group, [&](int64_t block, auto i, auto v) __attribute__((always_inline)) {
      return V::words(weights + (Code<format>::parts * block + i) * kPanel + v * V::lanes);
    });
    weights += input_words(kGroup) * kPanel;
    unroll<kVecs>([&](auto v) {
      unroll<R>([&](auto r) {
        settle<format>(a, tile, group, v * V::lanes, acc[r][v], x.scales[(row + r) * x.groups + group],
                       x.sums[(row + r) * x.groups + group], y + r * a.y_stride + v * V::lanes);
      });
    });
  }
}

template <Format format>
void decode(const Tile& tile, int64_t begin, int64_t end, float* decoded) {
  constexpr int per = Code<format>::per_word, parts = Code<format>::parts;
  for (int64_t block = begin / per; block < end / per; ++block, decoded += parts * kPanel) {
    unroll<kVecs>([&](auto v) {
      const V::I word = V::words(tile.words + block * kPanel + v * V::lanes);
      unroll<parts>(
          [&](auto i) { V::store_any(decoded + i * kPanel + v * V::lanes, Code<format>::template at<i>(word)); });
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
void linear_many(const LinearArgs& a, int64_t begin, int64_t end, float* decoded, const Inputs& x) {
  constexpr int64_t span = kDecode * (is_integer(format) ? kGroup / input_words(kGroup) : 1);  // what fills `decoded`
  constexpr int most = is_integer(format) ? V::integer_rows : V::rows;
  const int64_t inputs = a.weight.inputs;
  for (int64_t panel = begin; panel < end; ++panel) {
    const Tile tile = tile_of<format>(a.weight, panel);
    for (int64_t k = 0; k < inputs; k += span) {
      const int64_t stop = k + span < inputs ? k + span : inputs;
      const float* weights = decoded;
      if constexpr (format == Format::int8)  // whose words are ready as they are
        weights = reinterpret_cast<const float*>(tile.words + k / Code<format>::per_word * kPanel);
      else
        decode<format>(tile, k, stop, decoded);
      // The words of the next span (or panel: they follow) come from memory while this one's rows are computed.
      const char* next = reinterpret_cast<const char*>(tile.words + stop / Code<format>::per_word * kPanel);
      const char* const next_end = next + (stop - k) / Code<format>::per_word * kPanel * 4;
      const int64_t ahead = (next_end - next) * most / a.rows;  // bytes per group of rows
      for (int64_t row = 0; row < a.rows;) {
        for (const char* line_end = next + ahead; next < line_end && next < next_end; next += 64)
          __builtin_prefetch(next, 0, 2);
        const int64_t left = a.rows - row, even = left == most + 1 ? (left + 1) / 2 : left;  // no single row at the end
        with_rows<most>(even, [&](auto r) {
          if constexpr (is_integer(format))
            blocked_integer<format, r>(a, tile, weights, x, panel, row, k, stop);
          else
            blocked<format, r>(a, tile, weights, x, panel, row, k, stop);
          row += r;
        });
      }
    }
  }
}

template <Format format, int R, int P>
NANOCHAT_INLINE void few(const LinearArgs& a, int64_t panel, const Inputs& x) {
  if constexpr (is_integer(format))
    for (int p = 0; p < P; ++p) direct_integer<format, R>(a, panel + p, x);
  else
    direct<format, R, P>(a, panel, x);
}

template <Format format>
void linear_of(const LinearArgs& a, int64_t begin, int64_t end, float* scratch) {
  const Scratch s = scratch_of(a, scratch);
  const Inputs x{s.words, s.scales, s.sums, a.weight.inputs / kGroup, input_words(a.weight.inputs)};
  if (a.rows > V::rows) return linear_many<format>(a, begin, end, s.decoded, x);
  if (a.rows == 1)
    for (; begin + 2 <= end; begin += 2) few<format, 1, 2>(a, begin, x);
  for (; begin < end; ++begin) with_rows<V::rows>(a.rows, [&](auto r) { few<format, r, 1>(a, begin, x); });
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

// A capped logit is 2c·s − c, and probabilities are taken relative to the target's, which needs no maximum while 2c
// stays below 80 and loses nothing where the target is nearly certain. Two walks over a row that stays in the cache,
// the first leaving s behind. The sum of 32,768 terms is taken in pieces, as float32's last bits ask for.
float loss(const LossArgs& a) {
  constexpr int64_t kPiece = 512;
  const V::F one = V::set(1.0f), twice = V::set(2.0f * a.softcap);
  const int64_t whole = a.n / V::lanes * V::lanes;
  float rest[2 * V::lanes] = {};  // the last, incomplete vector: s, and the probabilities relative to the target's
  const auto sigmoid = [&](V::F x) { return V::div(one, V::add(one, exp_of(V::sub(V::zero(), x)))); };
  const V::F s_target = sigmoid(V::set(a.row[a.target]));
  const auto enter = [&](V::F x, float* to) {
    const V::F s = sigmoid(x);
    V::store(to, s);
    return exp_of(V::mul(twice, V::sub(s, s_target)));
  };
  double total = 0.0;
  for (int64_t begin = 0; begin < whole; begin += kPiece) {
    const int64_t end = begin + kPiece < whole ? begin + kPiece : whole;
    V::F sum = V::zero();
    for (int64_t i = begin; i < end; i += V::lanes) sum = V::add(sum, enter(V::load(a.row + i), a.row + i));
    total += static_cast<double>(V::sum(sum));
  }
  if (whole < a.n) {
    for (int64_t i = whole; i < a.n; ++i) rest[i - whole] = a.row[i];
    V::store(rest + V::lanes, enter(V::load(rest), rest));
    for (int64_t i = whole; i < a.n; ++i) {
      a.row[i] = rest[i - whole];
      total += static_cast<double>(rest[V::lanes + i - whole]);
    }
  }
  const float nll = static_cast<float>(__builtin_log(total));
  if (!a.gradients) return nll;
  const float s = a.row[a.target];
  const float p_target = static_cast<float>(1.0 / total);
  const V::F share = V::set(p_target);
  const auto leave = [&](V::F value) {
    const V::F p = V::mul(exp_of(V::mul(twice, V::sub(value, s_target))), share);
    return V::mul(V::mul(value, V::sub(one, value)), p);
  };
  for (int64_t i = 0; i < whole; i += V::lanes) V::store(a.row + i, leave(V::load(a.row + i)));
  if (whole < a.n) {
    V::store(rest, leave(V::load(rest)));
    for (int64_t i = whole; i < a.n; ++i) a.row[i] = rest[i - whole];
  }
  a.row[a.target] = s * (1.0f - s) * (p_target - 1.0f);
  return nll;
}

#include "cpu_attend_impl.h"
