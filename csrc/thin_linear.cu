// y = epilogue(scale·x·Wᵀ) for 1 to 16 rows of x: the matrix products of decoding, where time is the weights' bytes.
//
// The weights are the operand that streams: each is read once, straight from memory into the registers from which the
// tensor core takes it, and serves all rows. A tensor-core product (16 × 16 times 16 × 8) takes x as its 16 rows and
// eight outputs as its columns, so a single row costs no more than sixteen.
//
// Why no shared memory and no shuffles: a lane owns pairs of k scattered over the product's 16 (device.cuh), but a dot
// product does not mind the order of k as long as both sides agree. So a lane loads 16 bytes that lie together, of W
// and of x alike, and calls them the pairs that the instruction wants: four lanes cover 64 bytes of a row of W.
//
// A block is 8 warps and TILES·8 outputs. The warps divide k between them in turn, so that the block walks along each
// row in pieces of 512 bytes, and their sums meet in shared memory once at the end. TILES follows the number of outputs
// alone: a row's result does not depend on the other rows, nor on how many there are.
//
// FP8 (e4m3) and int8 weights become bf16 on the way, exactly; their scales, one per output, multiply the sum. About
// 2.5 integer instructions a weight: the conversion stays below the time to read it.
#include "cuda_kernels.h"
#include "device.cuh"

namespace nanochat {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kRows = 16;  // of x: the height of a tensor-core product
constexpr int kColumns = 8;

// Four bytes → four bf16 in two words.
template <typename W>
DEVICE void expand(uint32_t bytes, uint32_t& low, uint32_t& high);

template <>
DEVICE void expand<fp8>(uint32_t bytes, uint32_t& low, uint32_t& high) {
  // s eeee mmm → s 0000eeee mmm0000: the exponent is 120 too small, which one exact product with 2¹²⁰ sets right.
  constexpr uint32_t kTwoTo120 = 0x7B807B80;
  const uint32_t a = pick_bytes(bytes, 0, 0x1404), b = pick_bytes(bytes, 0, 0x3424);  // each byte on top of its half
  low = multiply_bf16((a & 0x80008000) | (a >> 4 & 0x07F007F0), kTwoTo120);
  high = multiply_bf16((b & 0x80008000) | (b >> 4 & 0x07F007F0), kTwoTo120);
}

template <>
DEVICE void expand<int8_t>(uint32_t bytes, uint32_t& low, uint32_t& high) {
  // 0x4B0000uu is the float 2²³ + u; u = value + 128.
  const uint32_t shifted = bytes ^ 0x80808080;
  constexpr uint32_t kExponent = 0x4B000000;
  constexpr float kOffset = 8388608.0f + 128.0f;
  low = floats_to_bf16(from_bits(pick_bytes(shifted, kExponent, 0x7440)) - kOffset,
                       from_bits(pick_bytes(shifted, kExponent, 0x7441)) - kOffset);
  high = floats_to_bf16(from_bits(pick_bytes(shifted, kExponent, 0x7442)) - kOffset,
                        from_bits(pick_bytes(shifted, kExponent, 0x7443)) - kOffset);
}

// The eight words of bf16 pairs (four for bf16 itself) that 16 bytes of weights hold.
template <typename W>
DEVICE void unpack(const Pack& pack, uint32_t (&pairs)[8 / sizeof(W)]) {
  if constexpr (sizeof(W) == 2) {
#pragma unroll
    for (int i = 0; i < 4; ++i) pairs[i] = pack.word[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) expand<W>(pack.word[i], pairs[2 * i], pairs[2 * i + 1]);
  }
}

DEVICE float finish(const ThinLinear& p, float x) {
  if (p.epilogue == Epilogue::relu2) {
    x = fmaxf(rounded<bf16>(x), 0.0f);
    return x * x;
  }
  return p.epilogue == Epilogue::softcap ? p.softcap * tanhf(rounded<bf16>(x) / p.softcap) : x;
}

// One block's view of W: where its lanes read.
template <typename W, int TILES>
struct Stream16 {
  static constexpr int kOwn = sizeof(Pack) / sizeof(W);  // k of one lane in one step
  static constexpr int kStep = kWarps * 4 * kOwn;        // k of the block in one step
  static constexpr int kAhead = 4 / TILES;               // steps whose weights are fetched together
  const W* weight;
  int inputs, outputs, output, k;

  DEVICE void fetch(int step, Pack (&to)[kAhead][TILES]) const {
#pragma unroll
    for (int ahead = 0; ahead < kAhead; ++ahead) {
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) {
        const int row = output + tile * kColumns, at = k + (step + ahead) * kStep;
        const W* from = weight + static_cast<int64_t>(row) * inputs + at;
        to[ahead][tile] = at < inputs && row < outputs ? load_constant(reinterpret_cast<const Pack*>(from)) : Pack{};
      }
    }
  }
};

// total += x·Wᵀ for the weights of one step. rows: the lane's two rows of x, null where there is none.
template <typename W, int TILES>
DEVICE void multiply(const bf16* const (&rows)[2], int k, bool inside, const Pack (&weights)[TILES],
                     float (&total)[TILES][4]) {
  constexpr int kPairs = 8 / sizeof(W);
  Pack x[2][kPairs / 4];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int i = 0; i < kPairs / 4; ++i) {
      x[half][i] = inside && rows[half] ? *reinterpret_cast<const Pack*>(rows[half] + k + 8 * i) : Pack{};
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
    uint32_t pairs[kPairs];
    unpack<W>(weights[tile], pairs);
#pragma unroll
    for (int i = 0; i < kPairs / 2; ++i) {  // products of 16 k: two pairs of every lane
      const int word = 2 * i % 4;
      const uint32_t a[4] = {x[0][i / 2].word[word], x[1][i / 2].word[word], x[0][i / 2].word[word + 1],
                             x[1][i / 2].word[word + 1]};
      const uint32_t b[2] = {pairs[2 * i], pairs[2 * i + 1]};
      multiply_accumulate(total[tile], a, b);
    }
  }
}

template <typename W, int TILES>
KERNEL(kThreads)
thin_linear_kernel(ThinLinear p) {
  using Source = Stream16<W, TILES>;
  SHARED float sums[kWarps][kRows][TILES * kColumns];
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  const int group = lane / 4, member = lane % 4;
  const int first = static_cast<int>(blockIdx.x) * TILES * kColumns;
  const Source source{static_cast<const W*>(p.weight), p.inputs, p.outputs, first + group,
                      (warp * 4 + member) * Source::kOwn};
  const bf16* x = static_cast<const bf16*>(p.x);
  const bf16* const rows[2] = {group < p.rows ? x + group * p.x_stride : nullptr,
                               group + 8 < p.rows ? x + (group + 8) * p.x_stride : nullptr};
  float total[TILES][4] = {};
  Pack now[Source::kAhead][TILES], next[Source::kAhead][TILES];
  // Weights are nobody's result: while the last kernel ends, this block's rows are on their way to the second-level
  // cache. (Loads that stand before the wait do not do: the assembler moves them behind it.)
  if (thread < TILES * kColumns && first + thread < p.outputs) {
    prefetch(source.weight + static_cast<int64_t>(first + thread) * p.inputs, p.inputs * sizeof(W));
  }
  wait_for_previous_kernel();
  let_next_kernel_start();
  source.fetch(0, now);
  const int steps = divide_up(p.inputs, Source::kStep);
  for (int step = 0; step < steps; step += Source::kAhead) {
    source.fetch(step + Source::kAhead, next);
#pragma unroll
    for (int ahead = 0; ahead < Source::kAhead; ++ahead) {
      const int k = source.k + (step + ahead) * Source::kStep;
      if (k - member * Source::kOwn < p.inputs) {  // the whole warp or none of it
        multiply<W, TILES>(rows, k, k < p.inputs, now[ahead], total);
      }
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile) now[ahead][tile] = next[ahead][tile];
    }
  }
#pragma unroll
  for (int tile = 0; tile < TILES; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[warp][group + 8 * (i / 2)][tile * kColumns + 2 * member + i % 2] = total[tile][i];
    }
  }
  sync_block();
  for (int i = thread; i < p.rows * TILES * kColumns; i += kThreads) {
    const int row = i / (TILES * kColumns), column = i % (TILES * kColumns), output = first + column;
    if (output >= p.outputs) continue;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][row][column];
    const float y = finish(p, p.scale ? sum * p.scale[output] : sum);
    const int64_t place = static_cast<int64_t>(row) * p.outputs + output;
    if (p.epilogue == Epilogue::softcap) {
      static_cast<float*>(p.y)[place] = y;
    } else {
      static_cast<bf16*>(p.y)[place] = narrow<bf16>(y);
    }
  }
}

// Few outputs: small blocks, so that every multiprocessor gets one. Many: fewer readings of x.
constexpr int kEnough = 264;  // blocks: two for each of an H100's multiprocessors

template <typename W>
const char* run(const ThinLinear& p, CUstream_st* stream) {
  const auto blocks = [&](int tiles) { return static_cast<unsigned>(divide_up(p.outputs, tiles * kColumns)); };
  if (blocks(4) >= kEnough) return launch(thin_linear_kernel<W, 4>, dim3(blocks(4)), kThreads, 0, stream, p);
  if (blocks(2) >= kEnough) return launch(thin_linear_kernel<W, 2>, dim3(blocks(2)), kThreads, 0, stream, p);
  return launch(thin_linear_kernel<W, 1>, dim3(blocks(1)), kThreads, 0, stream, p);
}

}  // namespace

const char* thin_linear(const ThinLinear& p, CUstream_st* stream) {
  if (p.rows > kRows) return "thin_linear takes 16 rows at most";
  if (p.inputs % 16 || !aligned(p.x) || !aligned(p.weight) || p.x_stride % 8) {
    return "thin_linear needs inputs in multiples of 16 and rows on 16-byte boundaries";
  }
  if (p.weight_type == Type::fp8) return run<fp8>(p, stream);
  return p.weight_type == Type::int8 ? run<int8_t>(p, stream) : run<bf16>(p, stream);
}

}  // namespace nanochat
