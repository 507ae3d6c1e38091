// The order of things in one step is that of nanochat/model/gpt.py, which says why each part exists.
#include "model_step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

namespace nanochat {
namespace {

constexpr int64_t kPhasesPerLayer = 8;

int64_t padded(int64_t n) { return (n + kGroup - 1) / kGroup * kGroup; }

void load_row(const Table& table, int64_t row, int64_t width, float* out) {
  if (!table.bf16) {
    std::memcpy(out, static_cast<const float*>(table.data) + row * width, static_cast<size_t>(width) * sizeof(float));
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(table.data) + row * width;
  for (int64_t i = 0; i < width; ++i) out[i] = from_bf16(from[i]);
}

void store_row(const Table& table, int64_t offset, int64_t width, const float* from) {
  if (!table.bf16) {
    std::memcpy(static_cast<float*>(table.data) + offset, from, static_cast<size_t>(width) * sizeof(float));
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(table.data) + offset;
  for (int64_t i = 0; i < width; ++i) out[i] = to_bf16(from[i]);
}

float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

float* scratch(int64_t floats) {  // one per thread, kept: a step asks for it hundreds of times
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(static_cast<size_t>(floats));
  return buffer.data();
}

// The activations of all rows. Strides are padded to whole groups of zeros, which int4 products read.
struct Buffers {
  int64_t width, qkv_width, attended_width, hidden_width;
  float *x, *first, *middle, *normed, *delta, *qkv, *attended, *hidden, *last;

  explicit Buffers(const StepArgs& a) {
    width = padded(a.width);
    qkv_width = padded((a.heads + 2 * a.kv_heads) * a.head_dim);
    attended_width = padded(a.heads * a.head_dim);
    hidden_width = padded(4 * a.width);
    float* at = a.workspace;
    const auto take = [&](int64_t rows, int64_t stride) {
      float* here = at;
      at += rows * stride;
      return here;
    };
    for (float** buffer : {&x, &first, &middle, &normed, &delta}) *buffer = take(a.rows, width);
    qkv = take(a.rows, qkv_width);
    attended = take(a.rows, attended_width);
    hidden = take(a.rows, hidden_width);
    last = take(a.wanted, width);
  }
  int64_t floats(const StepArgs& a) const {
    return a.rows * (5 * width + qkv_width + attended_width + hidden_width) + a.wanted * width;
  }
};

class Step {
 public:
  Step(const StepArgs& args, const Kernels& kernels, Crew& crew) : a(args), f(kernels), crew(crew), b(args) {}

  void run() {
    crew.run(phase++, a.rows, [&](int64_t row) { embed(row); });
    for (int64_t i = 0; i < a.layers; ++i) layer(i);
    crew.run(phase++, a.wanted, [&](int64_t i) {
      const int64_t row = a.outputs[i];
      const float scale = a.smear ? -a.backout_scale : 0.0f;
      const float* other = a.smear ? b.middle + row * b.width : nullptr;
      if (a.smear && a.middle == a.layers - 1) enter(row, a.layers);  // a middle that nobody has kept yet
      const int64_t at = row * b.width;
      f.norm({a.width, b.x + at, b.delta + at, other, 1.0f, scale, nullptr, b.last + i * b.width});
    });
    linear(a.head, b.last, b.width, a.wanted, a.logits, a.head.outputs, Epilogue::softcap);
  }

 private:
  const StepArgs& a;
  const Kernels& f;
  Crew& crew;
  const Buffers b;
  int64_t phase = 0;

  void embed(int64_t row) {
    float* x = b.x + row * b.width;
    float* first = b.first + row * b.width;
    load_row(a.embedding, a.tokens[row], a.width, x);
    f.norm({a.width, x, nullptr, nullptr, 1.0f, 0.0f, nullptr, first});
    if (a.smear && a.previous[row] >= 0) {
      float gate = 0.0f;
      for (int64_t i = 0; i < a.smear_inputs; ++i) gate += a.smear[i] * first[i];
      gate = a.smear_scale * sigmoid(gate);
      float* before = b.normed + row * b.width;
      load_row(a.embedding, a.previous[row], a.width, x);
      f.norm({a.width, x, nullptr, nullptr, 1.0f, 0.0f, nullptr, before});
      for (int64_t i = 0; i < a.width; ++i) first[i] += gate * before[i];
    }
    std::memcpy(x, first, static_cast<size_t>(a.width) * sizeof(float));
  }

  // x ← r·(x + delta) + s·x0 and its norm; keeps the sum before mixing where the backout wants it.
  void enter(int64_t row, int64_t layer) {
    const int64_t at = row * b.width;
    const float* delta = layer ? b.delta + at : nullptr;
    if (layer == a.middle + 1)
      for (int64_t i = 0; i < a.width; ++i) b.middle[at + i] = b.x[at + i] + b.delta[at + i];
    if (layer == a.layers) return;
    const LayerArgs& l = a.layer[layer];
    const float* first = a.smear ? b.first + at : nullptr;
    f.norm({a.width, b.x + at, delta, first, l.stream_scale, l.first_scale, b.x + at, b.normed + at});
  }

  void layer(int64_t index) {
    const LayerArgs& l = a.layer[index];
    crew.run(phase++, a.rows, [&](int64_t row) { enter(row, index); });
    linear(l.qkv, b.normed, b.width, a.rows, b.qkv, b.qkv_width, Epilogue::none);
    // Key/value heads of a row lie side by side in the cache: as many to an item as leave every thread one.
    const int64_t parts = std::min(a.kv_heads, (a.threads + a.rows - 1) / a.rows);
    const int64_t each = (a.kv_heads + parts - 1) / parts;
    const auto heads = [&](int64_t item, auto&& body) {
      const int64_t first = item % parts * each;
      body(item / parts, first, std::min(each, a.kv_heads - first));
    };
    const auto prepare_all = [&](int64_t row, int64_t first, int64_t count) {
      for (int64_t g = first; g < first + count; ++g) prepare(l, row, g);
    };
    if (!a.alone) crew.run(phase, a.rows * parts, [&](int64_t item) { heads(item, prepare_all); });
    ++phase;
    crew.run(phase++, a.rows * parts, [&](int64_t item) {
      heads(item, [&](int64_t row, int64_t first, int64_t count) {
        if (a.alone) prepare_all(row, first, count);
        attend(l, row, first, count);
      });
    });
    linear(l.o, b.attended, b.attended_width, a.rows, b.delta, b.width, Epilogue::none);
    crew.run(phase++, a.rows, [&](int64_t row) {
      const int64_t at = row * b.width;
      f.norm({a.width, b.x + at, b.delta + at, nullptr, 1.0f, 0.0f, b.x + at, b.normed + at});
    });
    linear(l.fc, b.normed, b.width, a.rows, b.hidden, b.hidden_width, Epilogue::relu2);
    linear(l.proj, b.hidden, b.hidden_width, a.rows, b.delta, b.width, Epilogue::none);
  }

  void linear(const Packed& w, const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride, Epilogue e) {
    const int64_t panels = w.outputs / kPanel, items = (panels + 1) / 2;
    const LinearArgs args{w, x, x_stride, rows, y, y_stride, e, a.softcap};
    float* room = scratch(linear_scratch(rows, w.inputs));
    bool prepared = false;  // by this thread
    crew.run(phase++, rows ? items : 0, [&](int64_t item) {
      if (!prepared) f.prepare(args, room);
      prepared = true;
      f.linear(args, 2 * item, 2 * item + 2 < panels ? 2 * item + 2 : panels, room);
    });
  }

  int64_t slot(const LayerArgs& l, int64_t row) const {
    const int32_t* table = a.table[l.group] + a.sequence[row] * a.table_width[l.group];
    const int64_t position = a.positions[row];
    return table[position / a.block_size] * a.block_size + position % a.block_size;
  }

  // Rotates and norms the heads of key/value head g, gates the value embedding in, writes k and v to the cache.
  void prepare(const LayerArgs& l, int64_t row, int64_t g) {
    const int64_t d = a.head_dim, shared = a.heads / a.kv_heads, position = a.positions[row];
    if (position < 0) return;  // padding
    const float *cos = a.cos + position * (d / 2), *sin = a.sin + position * (d / 2);
    float* q = b.qkv + row * b.qkv_width;
    float *k = q + (a.heads + g) * d, *v = q + (a.heads + a.kv_heads + g) * d;
    for (int64_t h = g * shared; h < (g + 1) * shared; ++h) f.rope_norm(q + h * d, cos, sin, d, a.qk_scale);
    f.rope_norm(k, cos, sin, d, a.qk_scale);
    if (l.gate) {
      const float* x = b.normed + row * b.width;
      float gate = 0.0f;
      for (int64_t i = 0; i < a.gate_inputs; ++i) gate += l.gate[g * a.gate_inputs + i] * x[i];
      gate = 3.0f * sigmoid(gate);
      float* value = scratch(d);
      const Table part{static_cast<char*>(l.values.data) + g * d * (l.values.bf16 ? 2 : 4), l.values.bf16};
      load_strided(part, a.tokens[row] * a.kv_heads * d, d, value);
      for (int64_t i = 0; i < d; ++i) v[i] += gate * value[i];
    }
    const int64_t at = (slot(l, row) * a.kv_heads + g) * d;
    store_row(l.k, at, d, k);
    store_row(l.v, at, d, v);
  }

  static void load_strided(const Table& table, int64_t offset, int64_t n, float* out) {
    const Table moved{static_cast<char*>(table.data) + offset * (table.bf16 ? 2 : 4), table.bf16};
    load_row(moved, 0, n, out);
  }

  void attend(const LayerArgs& l, int64_t row, int64_t g, int64_t count) {
    const int64_t d = a.head_dim, shared = a.heads / a.kv_heads, position = a.positions[row];
    if (position < 0 || count <= 0) return;
    const int64_t first = position > l.window ? position - l.window : 0, size = l.k.bf16 ? 2 : 4;
    AttendArgs args;
    args.q = b.qkv + row * b.qkv_width + g * shared * d;
    args.out = b.attended + row * b.attended_width + g * shared * d;
    args.groups = count;
    args.heads = shared;
    args.head_dim = d;
    args.k = static_cast<const char*>(l.k.data) + g * d * size;
    args.v = static_cast<const char*>(l.v.data) + g * d * size;
    args.bf16 = l.k.bf16;
    args.block_stride = a.block_size * a.kv_heads * d;
    args.slot_stride = a.kv_heads * d;
    args.table = a.table[l.group] + a.sequence[row] * a.table_width[l.group];
    args.block_size = a.block_size;
    args.first = first;
    args.last = position;
    args.scratch = scratch(attend_scratch(count * shared, position - first + 1, d));
    f.attend(args);
  }
};

}  // namespace

void Crew::pause(int& spins) {
  if (++spins > 4000) return std::this_thread::yield();  // somebody has taken the other core: do not burn this one
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t step_phases(int64_t layers) { return 3 + kPhasesPerLayer * layers; }

int64_t step_workspace(const StepArgs& args) { return Buffers(args).floats(args); }

void step(const StepArgs& args, const Kernels& kernels, Crew& crew) { Step(args, kernels, crew).run(); }

}  // namespace nanochat
