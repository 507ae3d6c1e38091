// The CPU kernels behind the native ops: one table of function pointers per SIMD level, chosen at run time.
//
// Weights are stored as 32-bit words, lane = output channel: word (panel p, block b, lane j) holds the P weights
// k = b·P … b·P + P−1 of output 32·p + j, with P = 1 (fp32), 2 (bf16), 4 (int8) or 8 (int4), the first in the low bits.
// One layout serves every vector width that divides 32, and every output adds up its products in the order of k,
// whatever the number of rows: a row's result does not depend on the batch, bit for bit.
//
//   fp32, bf16   y = Σ x·w in float32
//   int8         y = s·Σ_g Σ x·q, |q| ≤ 127       scales: float s per output
//   int4         y = Σ_g (s_g·Σ x·q + o_g·Σ x)    scales: half s, o per group of 64 inputs, (panel, group, 2, 32)
//
// Their inputs are rounded too, each group of 64 to 8 bits and a scale of its own, so that products add up exactly in
// 32-bit integers, four at a time. That takes a quarter of the instructions of a conversion to float, and gives the
// same numbers on every machine within a group.
//
// No torch header is included here or in any file that is compiled for a SIMD level: these build in seconds, and no
// inline function of a library can leak instructions that a smaller machine lacks.
#pragma once

#include <cstdint>

namespace nanochat {

constexpr int64_t kPanel = 32;    // outputs per panel
constexpr int64_t kGroup = 64;    // inputs per int4 scale, and per scale of rounded inputs
constexpr int64_t kDecode = 128;  // inputs decoded at a time for many rows: 16 KB of floats, half of an L1 cache

enum class Format : int { fp32 = 0, bf16 = 1, int8 = 2, int4 = 3 };
enum class Epilogue : int { none = 0, relu2 = 1, softcap = 2 };

struct Packed {
  Format format;
  const uint32_t* words;
  const void* scales;  // null for fp32 and bf16
  int64_t inputs;      // padded to what the format needs
  int64_t outputs;     // padded to whole panels
};

struct LinearArgs {
  Packed weight;
  const float* x;  // (rows, inputs), zeros in the padding
  int64_t x_stride;
  int64_t rows;
  float* y;  // (rows, outputs)
  int64_t y_stride;
  Epilogue epilogue;
  float softcap;
};

// mixed = scale·(x + delta) + other_scale·other;  y = mixed/rms(mixed). Null pointers drop their term or result.
struct NormArgs {
  int64_t n;
  const float *x, *delta, *other;
  float scale, other_scale;
  float *mixed, *y;
};

// One query position of one sequence against the paged cache, for `groups` key/value heads that lie side by side.
struct AttendArgs {
  const float* q;                   // (groups, heads, head_dim)
  float* out;                       // like q
  int64_t groups, heads, head_dim;  // heads: that share a key/value head
  const void *k, *v;                // at the first key/value head of block 0, slot 0; float or bf16
  bool bf16;
  int64_t block_stride, slot_stride;  // in elements
  const int32_t* table;
  int64_t block_size, first, last;  // positions first … last are seen
  float* scratch;                   // attend_scratch(...) floats
};

// A row of the head's logits, 2l/c each (the factor rides in the matrix product). If gradients are wanted it becomes
// s(1 − s)·(softmax − onehot) with s = sigmoid(2l/c), otherwise it is left as anything.
struct LossArgs {
  float* row;
  int64_t n, target;
  float softcap;
  bool gradients;
};

struct Kernels {
  const char* name;
  // What all panels of a product share, written to scratch (linear_scratch(...) floats): once per thread and product.
  void (*prepare)(const LinearArgs&, float* scratch);
  // Panels [begin, end) of a product.
  void (*linear)(const LinearArgs&, int64_t begin, int64_t end, float* scratch);
  void (*norm)(const NormArgs&);
  // A head (d) in place: rotated by −θ, then scale·rmsnorm.
  void (*rope_norm)(float* head, const float* cos, const float* sin, int64_t d, float scale);
  void (*attend)(const AttendArgs&);
  float (*loss)(const LossArgs&);  // −log of the target's probability
};

inline int64_t linear_scratch(int64_t rows, int64_t inputs) {
  return kDecode * kPanel + rows * (inputs / 4 + 2 * ((inputs + kGroup - 1) / kGroup));
}
inline int64_t attend_scratch(int64_t heads, int64_t keys, int64_t head_dim) {
  return heads * (keys + 1 + 2 * head_dim);
}

inline float from_bf16(uint16_t bits) {
  union {
    uint32_t word;
    float value;
  } u{static_cast<uint32_t>(bits) << 16};
  return u.value;
}

inline uint16_t to_bf16(float value) {  // round to nearest even; NaN stays NaN
  union {
    float value;
    uint32_t word;
  } u{value};
  if (value != value) return 0x7fc0;
  return static_cast<uint16_t>((u.word + 0x7fff + ((u.word >> 16) & 1)) >> 16);
}

// The kernels of the level that runs now: see simd.h.
const Kernels& cpu_kernels();

}  // namespace nanochat
