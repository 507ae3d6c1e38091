// The CPU kernels and the model step under sanitizers, without torch: every buffer is as large as promised and no
// larger, so that a read beyond it is found; results are compared with plain loops in double. Built and run by
// tests/native/test_sanitized.py.
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "cpu_kernels.h"
#include "model_step.h"
#include "simd.h"

using namespace nanochat;

namespace {

uint64_t state = 88172645463325252ull;
float draw() {  // xorshift, −1 … 1
  state ^= state << 13;
  state ^= state >> 7;
  state ^= state << 17;
  return static_cast<float>(static_cast<double>(state >> 11) / 4503599627370496.0 - 1.0);
}

std::vector<float> floats(int64_t n, float scale = 1.0f) {
  std::vector<float> x(static_cast<size_t>(n));
  for (float& value : x) value = scale * draw();
  return x;
}

void expect(bool fine, const char* what) {
  if (fine) return;
  std::fprintf(stderr, "wrong: %s at %s\n", what, simd_level());
  std::exit(1);
}

struct Weights {  // random codes: the kernels do not care where they come from
  std::vector<uint32_t> words;
  std::vector<float> channel;
  std::vector<uint16_t> halves;
  Packed packed;
};

int per_word(Format format) { return 1 << static_cast<int>(format); }

std::unique_ptr<Weights> weights(Format format, int64_t outputs, int64_t inputs) {
  auto w = std::make_unique<Weights>();
  const int64_t step = format == Format::int8 || format == Format::int4 ? kGroup : per_word(format);
  inputs = (inputs + step - 1) / step * step;
  outputs = (outputs + kPanel - 1) / kPanel * kPanel;
  w->words.resize(static_cast<size_t>(outputs * inputs / per_word(format)));
  for (uint32_t& word : w->words) {
    if (format == Format::fp32)
      word = std::bit_cast<uint32_t>(draw() * 0.1f);
    else if (format == Format::bf16)
      word = to_bf16(draw() * 0.1f) | (static_cast<uint32_t>(to_bf16(draw() * 0.1f)) << 16);
    else
      word = static_cast<uint32_t>((static_cast<double>(draw()) + 1.0) * 2147483647.0);
    for (int shift = 0; format == Format::int8 && shift < 32; shift += 8)
      if (((word >> shift) & 0xff) == 0x80) word += 1u << shift;  // no weight is −128
  }
  if (format == Format::int8) w->channel = floats(outputs, 0.001f);
  if (format == Format::int4)
    for (int64_t i = 0; i < 2 * outputs * (inputs / kGroup); ++i)
      w->halves.push_back(static_cast<uint16_t>(0x1c00 + i % 99));
  const void* scales = format == Format::int8 ? static_cast<const void*>(w->channel.data()) : w->halves.data();
  w->packed = {format, w->words.data(), scales, inputs, outputs};
  return w;
}

float half_value(uint16_t h) { return std::ldexp(static_cast<float>((h & 1023) | 1024), ((h >> 10) & 31) - 25); }

double weight_at(const Weights& w, int64_t output, int64_t input) {
  const Packed& p = w.packed;
  const int per = per_word(p.format);
  const int64_t panel = output / kPanel, lane = output % kPanel;
  const uint32_t word = w.words[static_cast<size_t>((panel * (p.inputs / per) + input / per) * kPanel + lane)];
  const int part = static_cast<int>(input % per);
  switch (p.format) {
    case Format::fp32:
      return std::bit_cast<float>(word);
    case Format::bf16:
      return from_bf16(static_cast<uint16_t>(word >> (16 * part)));
    case Format::int8:
      return static_cast<int8_t>(word >> (8 * part)) * static_cast<double>(w.channel[static_cast<size_t>(output)]);
    default: {
      const size_t at = static_cast<size_t>(((panel * (p.inputs / kGroup) + input / kGroup) * 2) * kPanel + lane);
      return ((word >> (4 * part)) & 15) * static_cast<double>(half_value(w.halves[at])) +
             half_value(w.halves[at + kPanel]);
    }
  }
}

void test_linear(const Kernels& kernels, Format format, int64_t outputs, int64_t inputs, int64_t rows) {
  const auto w = weights(format, outputs, inputs);
  const Packed& p = w->packed;
  const std::vector<float> x = floats(rows * p.inputs);
  std::vector<float> y(static_cast<size_t>(rows * p.outputs)),
      scratch(static_cast<size_t>(linear_scratch(rows, p.inputs)));
  const LinearArgs args{p, x.data(), p.inputs, rows, y.data(), p.outputs, Epilogue::none, 15.0f};
  const double tolerance = format == Format::int8 || format == Format::int4 ? 0.02 : 1e-4;  // inputs have 8 bits
  kernels.prepare(args, scratch.data());
  kernels.linear(args, 0, p.outputs / kPanel, scratch.data());
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t n = 0; n < p.outputs; ++n) {
      double sum = 0, size = 0;
      for (int64_t k = 0; k < p.inputs; ++k) {
        const double term = static_cast<double>(x[static_cast<size_t>(r * p.inputs + k)]) * weight_at(*w, n, k);
        sum += term;
        size += std::fabs(term);
      }
      expect(std::fabs(sum - y[static_cast<size_t>(r * p.outputs + n)]) <= tolerance * size + 1e-6, "linear");
    }
}

void test_attend(const Kernels& kernels, bool bf16, int64_t groups, int64_t shared, int64_t d, int64_t block,
                 int64_t first, int64_t last) {
  const int64_t heads = groups * shared, width = groups * d;
  const int64_t blocks = last / block + 1;
  std::vector<int32_t> table;
  for (int64_t i = 0; i < blocks; ++i) table.push_back(i < first / block ? -1 : static_cast<int32_t>(blocks - 1 - i));
  const std::vector<float> q = floats(heads * d), k = floats(blocks * block * width),
                           v = floats(blocks * block * width);
  std::vector<uint16_t> kb, vb;
  for (size_t i = 0; i < k.size(); ++i) kb.push_back(to_bf16(k[i])), vb.push_back(to_bf16(v[i]));
  std::vector<float> out(static_cast<size_t>(heads * d)),
      scratch(static_cast<size_t>(attend_scratch(heads, last - first + 1, d)));
  const void* keys = bf16 ? static_cast<const void*>(kb.data()) : k.data();
  const void* values = bf16 ? static_cast<const void*>(vb.data()) : v.data();
  kernels.attend({q.data(), out.data(), groups, shared, d, keys, values, bf16, block * width, width, table.data(),
                  block, first, last, scratch.data()});
  for (int64_t h = 0; h < heads; ++h) {
    std::vector<double> p, sum(static_cast<size_t>(d));
    double total = 0;
    for (int64_t t = first; t <= last; ++t) {
      const int64_t slot = table[static_cast<size_t>(t / block)] * block + t % block;
      const size_t at = static_cast<size_t>(slot * width + h / shared * d);
      double score = 0;
      for (int64_t i = 0; i < d; ++i)
        score += static_cast<double>(q[static_cast<size_t>(h * d + i)]) *
                 (bf16 ? from_bf16(kb[at + static_cast<size_t>(i)]) : k[at + static_cast<size_t>(i)]);
      score = std::exp(score / std::sqrt(static_cast<double>(d)));
      total += score;
      for (int64_t i = 0; i < d; ++i)
        sum[static_cast<size_t>(i)] +=
            score * (bf16 ? from_bf16(vb[at + static_cast<size_t>(i)]) : v[at + static_cast<size_t>(i)]);
    }
    for (int64_t i = 0; i < d; ++i)
      expect(std::fabs(sum[static_cast<size_t>(i)] / total - out[static_cast<size_t>(h * d + i)]) < 1e-4, "attend");
  }
}

void test_norm(const Kernels& kernels, int64_t n) {
  const std::vector<float> x = floats(n), delta = floats(n), other = floats(n);
  std::vector<float> mixed(static_cast<size_t>(n)), y(static_cast<size_t>(n));
  kernels.norm({n, x.data(), delta.data(), other.data(), 1.1f, -0.2f, mixed.data(), y.data()});
  double squares = 0;
  for (float value : mixed) squares += static_cast<double>(value) * value;
  for (size_t i = 0; i < y.size(); ++i) {
    expect(std::fabs(mixed[i] - (1.1 * (x[i] + delta[i]) - 0.2 * other[i])) < 1e-5, "mixed");
    expect(std::fabs(y[i] - mixed[i] / std::sqrt(squares / static_cast<double>(n) + 1.1920929e-07)) < 1e-5, "norm");
  }
}

// A whole step by several threads equals the step of one, bit for bit.
void test_step(const Kernels& kernels, Format format, bool bf16) {
  const int64_t width = 48, heads = 4, groups = 2, d = 12, layers = 3, vocabulary = 70, rows = 9, block = 4;
  std::vector<std::unique_ptr<Weights>> kept;
  const auto make = [&](int64_t outputs, int64_t inputs) {
    kept.push_back(weights(format, outputs, inputs));
    return kept.back()->packed;
  };
  std::vector<float> table = floats(vocabulary * width), values = floats(vocabulary * groups * d),
                     gate = floats(groups * 12);
  std::vector<float> cos = floats(64 * d / 2), sin = floats(64 * d / 2), smear = floats(24);
  std::vector<LayerArgs> layer;
  StepArgs a{width,
             heads,
             groups,
             d,
             layers,
             1,
             vocabulary,
             block,
             12,
             24,
             1.2f,
             15.0f,
             0.3f,
             0.2f,
             smear.data(),
             {table.data(), false},
             make(vocabulary, width),
             cos.data(),
             sin.data(),
             nullptr,
             1,
             rows,
             rows,
             false,
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             nullptr,
             {nullptr, nullptr},
             {4, 4},
             nullptr,
             nullptr};
  const size_t cache = static_cast<size_t>(8 * block * groups * d);
  std::vector<std::vector<float>> memory(2 * layers, std::vector<float>(cache));
  for (int64_t i = 0; i < layers; ++i)
    layer.push_back({make((heads + 2 * groups) * d, width),
                     make(width, heads * d),
                     make(4 * width, width),
                     make(width, 4 * width),
                     i % 2 ? gate.data() : nullptr,
                     {values.data(), false},
                     {memory[static_cast<size_t>(2 * i)].data(), bf16},
                     {memory[static_cast<size_t>(2 * i + 1)].data(), bf16},
                     8,
                     1.1f,
                     0.1f,
                     i == 1 ? 3 : 100,
                     i == 1 ? 1 : 0});
  a.layer = layer.data();
  const std::vector<int64_t> tokens{1, 2, 3, 4, 5, 69, 7, 8, 0}, previous{-1, 1, 2, 3, -1, 5, 69, 7, -1};
  const std::vector<int64_t> positions{0, 1, 2, 3, 0, 1, 2, 3, -1}, outputs{0, 1, 2, 3, 4, 5, 6, 7, 8};
  const std::vector<int32_t> sequence{0, 0, 0, 0, 1, 1, 1, 1, 2}, blocks{0, 1, 2, 3, 4, 5, 6, 7, -1, -1, -1, -1};
  a.tokens = tokens.data(), a.previous = previous.data(), a.positions = positions.data(), a.outputs = outputs.data();
  a.sequence = sequence.data(), a.table[0] = a.table[1] = blocks.data();
  std::vector<float> first;
  for (int count : {1, 2, 3, 5}) {
    std::vector<float> workspace(static_cast<size_t>(step_workspace(a)));
    std::vector<float> logits(static_cast<size_t>(rows * a.head.outputs));
    a.workspace = workspace.data(), a.logits = logits.data();
    a.threads = count;
    Crew crew(step_phases(layers));
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back([&] { step(a, kernels, crew); });
    for (std::thread& thread : threads) thread.join();
    if (first.empty()) first = logits;
    expect(logits == first, "threads");
    for (float logit : logits) expect(std::fabs(logit) <= 15.0f, "softcap");
  }
}

void test_loss(const Kernels& kernels, int64_t n) {
  for (int64_t target : {int64_t{0}, n / 2, n - 1}) {
    const std::vector<float> row = floats(n, 4.0f);
    double total = 0;
    const auto logit = [&](int64_t i) { return 30.0 / (1.0 + std::exp(-double{row[static_cast<size_t>(i)]})); };
    for (int64_t i = 0; i < n; ++i) total += std::exp(logit(i) - logit(target));
    for (bool gradients : {false, true}) {
      std::vector<float> copy = row;
      const float nll = kernels.loss({copy.data(), n, target, 15.0f, gradients});
      expect(std::fabs(nll - std::log(total)) < 1e-5 * (1 + std::log(total)), "loss");
      expect(!gradients || copy[static_cast<size_t>(target)] <= 0.0f, "the target's gradient");
    }
  }
}

}  // namespace

int main() {
  const Kernels& kernels = cpu_kernels();
  constexpr Format formats[] = {Format::fp32, Format::bf16, Format::int8, Format::int4};
  for (Format format : formats)
    for (int64_t rows : {1, 2, 3, 4, 7, 13})
      for (int64_t inputs : {1, 64, 130, 320}) test_linear(kernels, format, inputs % 3 ? 40 : 70, inputs, rows);
  for (bool bf16 : {false, true})
    for (int64_t d : {2, 6, 24, 64, 128, 130})
      for (int64_t last : {0, 1, 15, 16, 40})
        test_attend(kernels, bf16, 1 + d % 3, 1 + d % 5, d, 1 + d % 7, last / 3, last);
  for (int64_t n : {1, 7, 8, 64, 131}) test_norm(kernels, n);
  for (int64_t n : {1, 7, 16, 131, 1030}) test_loss(kernels, n);
  for (Format format : formats)
    for (bool bf16 : {false, true}) test_step(kernels, format, bf16);
  std::printf("fine at %s\n", simd_level());
}
