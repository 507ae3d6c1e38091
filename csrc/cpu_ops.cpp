// The CPU side of the ops: checks, pointers, threads. The arithmetic is in cpu_kernels_impl.h and model_step.cpp.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/zeros.h>
#include <sys/mman.h>
#include <torch/library.h>

#include <atomic>
#include <vector>

#include "cpu_kernels.h"
#include "model_step.h"

namespace nanochat {
namespace {

using at::Tensor;

Format format_of(c10::string_view name) {
  if (name == "fp32") return Format::fp32;
  if (name == "bf16") return Format::bf16;
  if (name == "int8") return Format::int8;
  TORCH_CHECK_VALUE(name == "int4", "weights ", name, ": use fp32, bf16, int8 or int4");
  return Format::int4;
}

int64_t per_word(Format format) { return int64_t{1} << static_cast<int>(format); }

Packed packed(Format format, const Tensor& words, const std::optional<Tensor>& scales) {
  TORCH_CHECK(words.scalar_type() == at::kInt && words.dim() == 3 && words.size(2) == kPanel && words.is_contiguous(),
              "packed words must be a contiguous int32 tensor (panels, blocks, ", kPanel, ")");
  Packed p{format, reinterpret_cast<const uint32_t*>(words.const_data_ptr<int32_t>()), nullptr,
           words.size(1) * per_word(format), words.size(0) * kPanel};
  TORCH_CHECK(per_word(format) < 4 || p.inputs % kGroup == 0, "int8 and int4 inputs must be whole groups of ", kGroup);
  if (format == Format::int8 || format == Format::int4) {
    TORCH_CHECK(scales && scales->is_contiguous(), "int8 and int4 weights need contiguous scales");
    const bool wide = format == Format::int8;
    const int64_t wanted = wide ? p.outputs : 2 * p.outputs * (p.inputs / kGroup);
    TORCH_CHECK(scales->scalar_type() == (wide ? at::kFloat : at::kHalf) && scales->numel() == wanted, "expected ",
                wanted, wide ? " float32" : " float16", " scales, not ", scales->numel(), " of ",
                scales->scalar_type());
    p.scales = scales->const_data_ptr();
  }
  return p;
}

Table table_of(const Tensor& t, const char* what) {
  TORCH_CHECK(t.is_contiguous() && (t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16), what,
              " must be contiguous and float32 or bfloat16, not ", t.scalar_type());
  return {t.data_ptr(), t.scalar_type() == at::kBFloat16};
}

float* scratch(int64_t floats) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(static_cast<size_t>(floats));
  return buffer.data();
}

Tensor allocate(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes > 0, "cannot allocate ", bytes, " bytes");
#if defined(MADV_HUGEPAGE)
  constexpr size_t huge = size_t{2} << 20;
  const size_t size = (static_cast<size_t>(bytes) + huge - 1) / huge * huge + huge;
  void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  TORCH_CHECK(base != MAP_FAILED, "no memory for ", bytes, " bytes of packed weights");
  const uintptr_t aligned = (reinterpret_cast<uintptr_t>(base) + huge - 1) / huge * huge;
  madvise(reinterpret_cast<void*>(aligned), size - huge, MADV_HUGEPAGE);  // a wish: small pages serve as well
  return at::from_blob(
      reinterpret_cast<void*>(aligned), {bytes}, [base, size](void*) { munmap(base, size); }, at::kByte);
#else
  return at::empty({bytes}, at::kByte);
#endif
}

Tensor packed_linear(const Tensor& x, const Tensor& words, const std::optional<Tensor>& scales, c10::string_view format,
                     int64_t outputs, c10::string_view epilogue, double softcap) {
  const Packed weight = packed(format_of(format), words, scales);
  TORCH_CHECK(x.dim() == 2 && x.scalar_type() == at::kFloat, "x must be (rows, inputs) float32");
  TORCH_CHECK(x.size(1) <= weight.inputs && weight.inputs - x.size(1) < kGroup, "x has ", x.size(1),
              " inputs, the weight ", weight.inputs);
  TORCH_CHECK(0 < outputs && outputs <= weight.outputs, "the weight has ", weight.outputs, " outputs, not ", outputs);
  Epilogue then = Epilogue::none;
  if (epilogue == "relu2") then = Epilogue::relu2;
  if (epilogue == "softcap") then = Epilogue::softcap;
  TORCH_CHECK_VALUE(then != Epilogue::none || epilogue == "none", "epilogue ", epilogue, ": use none, relu2, softcap");
  Tensor rows = x.stride(1) == 1 && x.size(1) == weight.inputs
                    ? x
                    : at::constant_pad_nd(x, {0, weight.inputs - x.size(1)}).contiguous();
  Tensor y = at::empty({x.size(0), weight.outputs}, x.options());
  const LinearArgs args{weight,    rows.const_data_ptr<float>(), rows.stride(0),
                        x.size(0), y.mutable_data_ptr<float>(),  weight.outputs,
                        then,      static_cast<float>(softcap)};
  const Kernels& kernels = cpu_kernels();
  const int64_t panels = weight.outputs / kPanel;
  if (args.rows)
    at::parallel_for(0, (panels + 1) / 2, 1, [&](int64_t begin, int64_t end) {
      float* room = scratch(linear_scratch(args.rows, weight.inputs));
      kernels.prepare(args, room);
      kernels.linear(args, 2 * begin, std::min(2 * end, panels), room);
    });
  return outputs == weight.outputs ? y : y.narrow(1, 0, outputs).contiguous();
}

// (rows) the sequence of each row, from starts; checks what would otherwise read out of bounds.
std::vector<int32_t> sequences_of(const Tensor& starts, const Tensor& lengths, int64_t rows) {
  TORCH_CHECK(starts.scalar_type() == at::kInt && lengths.scalar_type() == at::kInt && starts.is_contiguous() &&
                  lengths.is_contiguous() && starts.dim() == 1 && starts.numel() == lengths.numel() + 1,
              "starts (S+1) and lengths (S) must be contiguous int32");
  const int32_t* at = starts.const_data_ptr<int32_t>();
  std::vector<int32_t> sequence(static_cast<size_t>(rows));
  TORCH_CHECK(at[0] == 0 && at[lengths.numel()] == rows, "starts must run from 0 to ", rows);
  for (int64_t s = 0; s < lengths.numel(); ++s) {
    TORCH_CHECK(at[s] <= at[s + 1], "starts must not fall");
    for (int32_t row = at[s]; row < at[s + 1]; ++row) sequence[static_cast<size_t>(row)] = static_cast<int32_t>(s);
  }
  return sequence;
}

// Every block that positions first … last of a sequence need must be one of `blocks`.
void check_blocks(const int32_t* table, int64_t width, int64_t first, int64_t last, int64_t size, int64_t blocks) {
  TORCH_CHECK_INDEX(last / size < width, "position ", last, " lies behind a table of ", width, " blocks of ", size);
  for (int64_t block = first / size; block <= last / size; ++block)
    TORCH_CHECK_INDEX(0 <= table[block] && table[block] < blocks, "block ", block, " of a sequence is ", table[block],
                      ", not one of ", blocks);
}

void check_table(const Tensor& table, int64_t sequences) {
  TORCH_CHECK(
      table.scalar_type() == at::kInt && table.dim() == 2 && table.is_contiguous() && table.size(0) == sequences,
      "a block table must be a contiguous int32 tensor (", sequences, ", blocks)");
}

Tensor paged_attention(const Tensor& q_in, const Tensor& k_cache, const Tensor& v_cache, const Tensor& table,
                       const Tensor& starts, const Tensor& lengths, int64_t window) {
  TORCH_CHECK(q_in.dim() == 3 && k_cache.dim() == 4 && k_cache.sizes() == v_cache.sizes(),
              "q (N,H,D), caches (NB,BS,G,D)");
  const int64_t rows = q_in.size(0), heads = q_in.size(1), d = q_in.size(2), groups = k_cache.size(2);
  TORCH_CHECK(k_cache.size(3) == d && heads % groups == 0 && window >= 0, "heads must share the caches' ", groups,
              " heads of ", d);
  const Table k = table_of(k_cache, "k_cache"), v = table_of(v_cache, "v_cache");
  TORCH_CHECK(k.bf16 == v.bf16, "both caches must have one dtype");
  check_table(table, lengths.numel());
  const std::vector<int32_t> sequence = sequences_of(starts, lengths, rows);
  const Tensor q = q_in.to(at::kFloat).contiguous();
  Tensor out = at::zeros(q.sizes(), q.options());
  const int32_t *length = lengths.const_data_ptr<int32_t>(), *start = starts.const_data_ptr<int32_t>();
  const int64_t block = k_cache.size(1), shared = heads / groups, bytes = k.bf16 ? 2 : 4;
  std::vector<int64_t> position(static_cast<size_t>(rows));
  for (int64_t row = 0; row < rows; ++row) {
    const int32_t s = sequence[static_cast<size_t>(row)];
    const int64_t p = position[static_cast<size_t>(row)] = length[s] - (start[s + 1] - row);
    if (p >= 0)
      check_blocks(table.const_data_ptr<int32_t>() + s * table.size(1), table.size(1), std::max<int64_t>(p - window, 0),
                   p, block, k_cache.size(0));
  }
  const Kernels& kernels = cpu_kernels();
  at::parallel_for(0, rows * groups, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t row = item / groups, g = item % groups, p = position[static_cast<size_t>(row)];
      if (p < 0) continue;  // padding
      AttendArgs a;
      a.q = q.const_data_ptr<float>() + (row * heads + g * shared) * d;
      a.out = out.mutable_data_ptr<float>() + (row * heads + g * shared) * d;
      a.groups = 1;
      a.heads = shared;
      a.head_dim = d;
      a.k = static_cast<const char*>(k.data) + g * d * bytes;
      a.v = static_cast<const char*>(v.data) + g * d * bytes;
      a.bf16 = k.bf16;
      a.block_stride = block * groups * d;
      a.slot_stride = groups * d;
      a.table = table.const_data_ptr<int32_t>() + sequence[static_cast<size_t>(row)] * table.size(1);
      a.block_size = block;
      a.first = std::max<int64_t>(p - window, 0);
      a.last = p;
      a.scratch = scratch(attend_scratch(shared, a.last - a.first + 1, d));
      kernels.attend(a);
    }
  });
  return out.to(q_in.scalar_type());
}

// Hands out the weights in order, and says which one is wrong.
class Reader {
 public:
  Reader(at::TensorList tensors, Format format) : tensors_(tensors), format_(format) {}
  const Tensor& next() {
    TORCH_CHECK(at_ < tensors_.size(), "too few weights: ", tensors_.size());
    return tensors_[at_++];
  }
  Packed linear(int64_t outputs, int64_t inputs) {
    const Tensor &words = next(), &scales = next();
    const Packed p = packed(format_, words, scales);
    TORCH_CHECK(
        p.outputs >= outputs && p.outputs < outputs + kPanel && p.inputs >= inputs && p.inputs < inputs + kGroup,
        "weight ", at_ - 2, " is ", p.outputs, " x ", p.inputs, ", expected ", outputs, " x ", inputs);
    return p;
  }
  const float* floats(int64_t count) {
    const Tensor& t = next();
    if (t.numel() == 0) return nullptr;
    TORCH_CHECK(t.scalar_type() == at::kFloat && t.is_contiguous() && t.numel() == count, "weight ", at_ - 1, " has ",
                t.numel(), " elements, expected ", count, " in float32");
    return t.const_data_ptr<float>();
  }
  Table table(int64_t rows, int64_t width) {
    const Tensor& t = next();
    if (t.numel() == 0) return {nullptr, false};
    TORCH_CHECK(t.numel() == rows * width, "weight ", at_ - 1, " has ", t.numel(), " elements, expected ",
                rows * width);
    return table_of(t, "an embedding table");
  }
  void done() { TORCH_CHECK(at_ == tensors_.size(), "too many weights: ", tensors_.size()); }

 private:
  at::TensorList tensors_;
  Format format_;
  size_t at_ = 0;
};

const int64_t* indices(const Tensor& t, int64_t count, const char* what) {
  TORCH_CHECK(t.scalar_type() == at::kLong && t.is_contiguous() && t.numel() == count, what, " must hold ", count,
              " int64, contiguous");
  return t.const_data_ptr<int64_t>();
}

// sizes: width, heads, kv_heads, head_dim, layers, middle, stored vocabulary, gate inputs, smear inputs, then window
// and group of every layer. scalars: qk scale, softcap, smear scale, backout scale, then both stream scales of every
// layer. weights: embedding, cos, sin, smear gate, head (words, scales), then per layer qkv, o, fc, proj, gate, value
// embedding.
StepArgs model_args(at::IntArrayRef sizes, at::ArrayRef<double> scalars, Format format, at::TensorList weights,
                    at::TensorList k, at::TensorList v, std::vector<LayerArgs>& layers, int64_t* positions) {
  TORCH_CHECK(sizes.size() >= 9 && sizes.size() == 9 + 2 * static_cast<size_t>(sizes[4]) &&
                  scalars.size() == 4 + 2 * static_cast<size_t>(sizes[4]),
              "sizes and scalars do not belong to one model");
  StepArgs a{};
  int64_t* const fields[] = {&a.width,  &a.heads,      &a.kv_heads,    &a.head_dim,    &a.layers,
                             &a.middle, &a.vocabulary, &a.gate_inputs, &a.smear_inputs};
  for (size_t i = 0; i < 9; ++i) *fields[i] = sizes[i];
  TORCH_CHECK(a.width > 0 && a.kv_heads > 0 && a.head_dim > 0 && a.heads % a.kv_heads == 0, a.heads,
              " query heads do not share ", a.kv_heads, " key/value heads");
  float* const floats[] = {&a.qk_scale, &a.softcap, &a.smear_scale, &a.backout_scale};
  for (size_t i = 0; i < 4; ++i) *floats[i] = static_cast<float>(scalars[i]);
  Reader read(weights, format);
  const int64_t kv_width = a.kv_heads * a.head_dim, q_width = a.heads * a.head_dim;
  a.embedding = read.table(a.vocabulary, a.width);
  const Tensor &cos = read.next(), &sin = read.next();
  TORCH_CHECK(cos.scalar_type() == at::kFloat && cos.is_contiguous() && sin.is_contiguous() && cos.dim() == 2 &&
                  cos.size(1) == a.head_dim / 2 && sin.sizes() == cos.sizes() && sin.scalar_type() == at::kFloat,
              "rotary tables must be contiguous float32 (positions, head_dim/2)");
  a.cos = cos.const_data_ptr<float>();
  a.sin = sin.const_data_ptr<float>();
  *positions = cos.size(0);
  a.smear = read.floats(a.smear_inputs);
  a.head = read.linear(a.vocabulary, a.width);
  TORCH_CHECK(k.size() == layers.size() && v.size() == layers.size(), "a cache for each of ", layers.size(), " layers");
  for (size_t i = 0; i < layers.size(); ++i) {
    LayerArgs& l = layers[i];
    l.qkv = read.linear(q_width + 2 * kv_width, a.width);
    l.o = read.linear(a.width, q_width);
    l.fc = read.linear(4 * a.width, a.width);
    l.proj = read.linear(a.width, 4 * a.width);
    l.gate = read.floats(a.kv_heads * a.gate_inputs);
    l.values = read.table(a.vocabulary, kv_width);
    TORCH_CHECK(!l.gate == !l.values.data, "layer ", i, " has a gate or a value embedding alone");
    l.window = sizes[9 + 2 * i];
    l.group = static_cast<int>(sizes[10 + 2 * i]);
    l.stream_scale = static_cast<float>(scalars[4 + 2 * i]);
    l.first_scale = static_cast<float>(scalars[5 + 2 * i]);
    l.k = table_of(k[i], "a cache");
    l.v = table_of(v[i], "a cache");
    TORCH_CHECK(k[i].dim() == 4 && k[i].sizes() == v[i].sizes() && k[i].size(1) == k[0].size(1) &&
                    k[i].size(2) == a.kv_heads && k[i].size(3) == a.head_dim && l.k.bf16 == l.v.bf16,
                "caches must be (blocks, block size, ", a.kv_heads, ", ", a.head_dim, ")");
    TORCH_CHECK((l.group == 0 || l.group == 1) && l.window >= 0, "a layer's group is 0 or 1");
    l.blocks = k[i].size(0);
  }
  read.done();
  a.block_size = k[0].size(1);
  a.layer = layers.data();
  return a;
}

// Everything that would read or write out of bounds, found before the step begins.
void check_rows(const StepArgs& a, const std::vector<LayerArgs>& layers, int64_t positions, const Tensor& lengths) {
  for (int64_t i = 0; i < a.wanted; ++i)
    TORCH_CHECK_INDEX(0 <= a.outputs[i] && a.outputs[i] < a.rows, "output ", a.outputs[i], " of ", a.rows, " rows");
  int64_t window[2] = {-1, -1}, blocks[2] = {INT64_MAX, INT64_MAX};
  for (const LayerArgs& l : layers) {
    window[l.group] = std::max(window[l.group], l.window);
    blocks[l.group] = std::min(blocks[l.group], l.blocks);
  }
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t p = a.positions[row], s = a.sequence[row];
    TORCH_CHECK_INDEX(0 <= a.tokens[row] && a.tokens[row] < a.vocabulary, "token ", a.tokens[row], " of ",
                      a.vocabulary);
    TORCH_CHECK_INDEX(-1 <= a.previous[row] && a.previous[row] < a.vocabulary, "previous token ", a.previous[row]);
    TORCH_CHECK_INDEX(p < positions, "position ", p, " of ", positions, " in the rotary tables");
    if (p < 0) continue;  // padding
    TORCH_CHECK_INDEX(p < lengths.const_data_ptr<int32_t>()[s], "position ", p, " lies beyond its sequence");
    for (int group = 0; group < 2; ++group)
      if (window[group] >= 0)
        check_blocks(a.table[group] + s * a.table_width[group], a.table_width[group],
                     std::max<int64_t>(p - window[group], 0), p, a.block_size, blocks[group]);
  }
}

Tensor model_step(at::IntArrayRef sizes, at::ArrayRef<double> scalars, c10::string_view format, at::TensorList weights,
                  at::TensorList k, at::TensorList v, const Tensor& tokens, const Tensor& previous,
                  const Tensor& positions, const Tensor& starts, const Tensor& lengths, const Tensor& full_table,
                  const Tensor& window_table, const Tensor& outputs) {
  std::vector<LayerArgs> layers(sizes.size() > 4 ? static_cast<size_t>(std::max<int64_t>(sizes[4], 0)) : 0);
  TORCH_CHECK(!layers.empty(), "a model has at least one layer");
  int64_t known_positions = 0;
  StepArgs a = model_args(sizes, scalars, format_of(format), weights, k, v, layers, &known_positions);
  a.rows = tokens.numel();
  a.wanted = outputs.numel();
  a.tokens = indices(tokens, a.rows, "tokens");
  a.previous = indices(previous, a.rows, "previous");
  a.positions = indices(positions, a.rows, "positions");
  a.outputs = indices(outputs, a.wanted, "outputs");
  const std::vector<int32_t> sequence = sequences_of(starts, lengths, a.rows);
  a.sequence = sequence.data();
  a.alone = a.rows == lengths.numel();
  for (int64_t row = 0; a.alone && row < a.rows; ++row) a.alone = sequence[static_cast<size_t>(row)] == row;
  const Tensor* tables[] = {&full_table, &window_table};
  for (int group = 0; group < 2; ++group) {
    check_table(*tables[group], lengths.numel());
    a.table[group] = tables[group]->const_data_ptr<int32_t>();
    a.table_width[group] = tables[group]->size(1);
  }
  check_rows(a, layers, known_positions, lengths);
  Tensor logits = at::empty({a.wanted, a.head.outputs}, at::kFloat);
  if (!a.rows) return logits;
  const Tensor workspace = at::zeros({step_workspace(a)}, at::kFloat);
  a.workspace = workspace.mutable_data_ptr<float>();
  a.logits = logits.mutable_data_ptr<float>();
  a.threads = at::get_num_threads();
  const Kernels& kernels = cpu_kernels();
  Crew crew(step_phases(a.layers));
  at::parallel_for(0, a.threads, 1, [&](int64_t, int64_t) { step(a, kernels, crew); });
  return logits;
}

void softcap_cross_entropy(Tensor& panel, const Tensor& targets, Tensor& nll, double softcap, bool gradients) {
  TORCH_CHECK(panel.dim() == 2 && panel.is_contiguous(), "panel must be contiguous (rows, vocabulary)");
  const Table table = table_of(panel, "panel");
  const int64_t rows = panel.size(0), vocabulary = panel.size(1);
  const int64_t* target = indices(targets, rows, "targets");
  TORCH_CHECK(nll.scalar_type() == at::kFloat && nll.is_contiguous() && nll.numel() == rows,
              "nll must be contiguous float32 (rows)");
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK_INDEX(0 <= target[row] && target[row] < vocabulary, "target ", target[row], " of ", vocabulary);
  float* losses = nll.mutable_data_ptr<float>();
  const Kernels& kernels = cpu_kernels();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* at = table.bf16 ? scratch(vocabulary) : static_cast<float*>(table.data) + row * vocabulary;
      uint16_t* narrow = static_cast<uint16_t*>(table.data) + row * vocabulary;
      for (int64_t i = 0; table.bf16 && i < vocabulary; ++i) at[i] = from_bf16(narrow[i]);
      losses[row] = kernels.loss({at, vocabulary, target[row], static_cast<float>(softcap), gradients});
      for (int64_t i = 0; table.bf16 && gradients && i < vocabulary; ++i) narrow[i] = to_bf16(at[i]);
    }
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(nanochat, CPU, m) {
  m.impl("packed_linear", packed_linear);
  m.impl("paged_attention", paged_attention);
  m.impl("model_step", model_step);
  m.impl("softcap_cross_entropy", softcap_cross_entropy);
}

TORCH_LIBRARY_IMPL(nanochat, CompositeExplicitAutograd, m) { m.impl("allocate", allocate); }

}  // namespace nanochat
