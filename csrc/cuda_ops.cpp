// The GPU side of the ops: shapes and dtypes checked, structs filled in, kernels launched on the current stream.
// Schemas stand in ops.cpp, kernels in the .cu files.
//
// Shapes are checked by letters: check.shape(q, "q", "NHD") binds N, H and D where they are new and compares them where
// they are known, so that every tensor of a call agrees with every other and a message names what does not. Nothing
// here waits for the device or reads from it, and results come from torch's allocator, so all of it can be captured in
// a graph.
//
// Built with NANOCHAT_EMULATED=1, and the .cu files as C++, the same ops run on CPU tensors in csrc/emulator.cuh.
#include "cuda_kernels.h"

#ifndef NANOCHAT_EMULATED
#define NANOCHAT_EMULATED 0
#endif
#if NANOCHAT_CUDA || NANOCHAT_EMULATED

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>
#if !NANOCHAT_EMULATED
#include <c10/cuda/CUDAStream.h>
#endif

#include <algorithm>
#include <array>
#include <string_view>
#include <tuple>

namespace nanochat {
namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

CUstream_st* stream() {
#if NANOCHAT_EMULATED
  return nullptr;
#else
  return c10::cuda::getCurrentCUDAStream().stream();
#endif
}

void launched(const char* error) { TORCH_CHECK(!error, "the kernel could not be launched: ", error); }

Type type_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return Type::float32;
    case at::kBFloat16:
      return Type::bfloat16;
    case at::kFloat8_e4m3fn:
      return Type::fp8;
    case at::kChar:
      return Type::int8;
    default:
      TORCH_CHECK_TYPE(false, name, " has the dtype ", x.scalar_type(), ", which these kernels do not read");
  }
}

// The sizes that a call's letters stand for, and the device that its tensors share.
class Check {
 public:
  explicit Check(const Tensor& first) : device_(first.device()) {}

  // Binds or compares the sizes of x, one letter a dimension; '*' is any size. Memory must be dense, except that rows
  // (the first dimension) may lie apart when `strided`.
  const Tensor& shape(const Tensor& x, const char* name, std::string_view letters, bool strided = false) {
    TORCH_CHECK_VALUE(x.dim() == static_cast<int64_t>(letters.size()), name, " must have ", letters.size(),
                      " dimensions (", letters, "), not ", x.dim());
    TORCH_CHECK_VALUE(x.device() == device_, name, " is on ", x.device(), ", the first argument on ", device_);
    for (size_t i = 0; i < letters.size(); ++i) {
      if (letters[i] == '*') continue;
      int64_t& size = sizes_[static_cast<unsigned char>(letters[i])];
      if (size < 0) size = x.size(static_cast<int64_t>(i));
      TORCH_CHECK_VALUE(size == x.size(static_cast<int64_t>(i)), name, " (", letters, ") has ",
                        x.size(static_cast<int64_t>(i)), " where ", letters[i], " is ", size);
    }
    int64_t dense = 1;
    for (int64_t i = x.dim() - 1; i >= (strided ? 1 : 0); --i) {
      TORCH_CHECK_VALUE(x.size(i) == 1 || x.stride(i) == dense, name, " must be contiguous",
                        strided ? " within a row" : "");
      dense *= x.size(i);
    }
    return x;
  }

  template <typename T>
  const T* data(const Tensor& x, const char* name, std::string_view letters, at::ScalarType type) {
    shape(x, name, letters);
    TORCH_CHECK_TYPE(x.scalar_type() == type, name, " must be ", type, ", not ", x.scalar_type());
    return static_cast<const T*>(x.const_data_ptr());
  }

  // The same for a tensor that may be absent, whose dtype is that of `like`.
  const void* maybe(Optional x, const char* name, std::string_view letters, const Tensor& like) {
    return x ? data<void>(*x, name, letters, like.scalar_type()) : nullptr;
  }

  // One float32 element, of any shape.
  const float* scalar(Optional x, const char* name) {
    if (!x) return nullptr;
    TORCH_CHECK_VALUE(x->numel() == 1 && x->scalar_type() == at::kFloat && x->device() == device_, name,
                      " must be one float32 element on ", device_);
    return x->const_data_ptr<float>();
  }

  int size(char letter) const {
    const int64_t size = sizes_[static_cast<unsigned char>(letter)];
    TORCH_CHECK_VALUE(size <= INT32_MAX, letter, " is ", size, ": too large");
    return static_cast<int>(size);
  }

 private:
  c10::Device device_;
  std::array<int64_t, 128> sizes_ = [] {
    std::array<int64_t, 128> unknown{};
    unknown.fill(-1);
    return unknown;
  }();
};

void check_compute_dtype(const Tensor& x, const char* name) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kBFloat16, name,
                   " must be float32 or bfloat16, not ", x.scalar_type());
}

void check_cache_dtype(const Tensor& x, const Tensor& cache) {
  const bool fp8 = x.scalar_type() == at::kBFloat16 && cache.scalar_type() == at::kFloat8_e4m3fn;
  TORCH_CHECK_TYPE(fp8 || cache.scalar_type() == x.scalar_type(), "a cache of ", cache.scalar_type(),
                   " does not go with ", x.scalar_type(), ": use the same, or float8_e4m3fn with bfloat16");
}

std::tuple<Tensor, Tensor> residual_norm(const Tensor& x, Optional delta, Optional scale, Optional other,
                                         Optional other_scale) {
  const c10::DeviceGuard guard(x.device());
  check_compute_dtype(x, "x");
  Check check(x);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_contiguous(), "x must be contiguous");
  const Tensor rows = x.view({-1, x.size(-1)});
  check.shape(rows, "x", "NC");
  const auto like_x = [&](Optional t, const char* name) -> const void* {
    if (!t) return nullptr;
    TORCH_CHECK_VALUE(t->sizes() == x.sizes() && t->is_contiguous() && t->scalar_type() == x.scalar_type() &&
                          t->device() == x.device(),
                      name, " must be like x: ", x.sizes(), " ", x.scalar_type(), ", contiguous");
    return t->const_data_ptr();
  };
  Tensor y = at::empty_like(x);
  const bool plain = !delta && !scale && !other;
  Tensor mixed = plain ? at::empty({0}, x.options()) : at::empty_like(x);
  RmsNorm p{type_of(x, "x"),
            x.const_data_ptr(),
            like_x(delta, "delta"),
            like_x(other, "other"),
            check.scalar(scale, "scale"),
            check.scalar(other_scale, "other_scale"),
            y.mutable_data_ptr(),
            plain ? nullptr : mixed.mutable_data_ptr(),
            rows.size(0),
            check.size('C')};
  if (p.rows > 0) launched(rms_norm(p, stream()));
  return {y, mixed};
}

Tensor smeared_embedding(const Tensor& tokens, const Tensor& previous, const Tensor& table, Optional smear_weight,
                         Optional smear_scale) {
  const c10::DeviceGuard guard(table.device());
  check_compute_dtype(table, "table");
  TORCH_CHECK_VALUE(smear_weight.has_value() == smear_scale.has_value(), "smear_weight and smear_scale go together");
  Check check(table);
  check.shape(table, "table", "VC");
  Embedding p{};
  p.type = type_of(table, "table");
  p.tokens = check.data<int64_t>(tokens, "tokens", "N", at::kLong);
  p.previous = check.data<int64_t>(previous, "previous", "N", at::kLong);
  p.table = table.const_data_ptr();
  if (smear_weight) p.smear_weight = check.data<float>(*smear_weight, "smear_weight", "I", at::kFloat);
  p.smear_scale = check.scalar(smear_scale, "smear_scale");
  p.count = check.size('N'), p.columns = check.size('C'), p.smear_inputs = smear_weight ? check.size('I') : 0;
  Tensor y = at::empty({p.count, p.columns}, table.options());
  p.y = y.mutable_data_ptr();
  if (p.count > 0) launched(embedding(p, stream()));
  return y;
}

Tensor thin_linear_op(const Tensor& x, const Tensor& weight, Optional scale, c10::string_view epilogue,
                      double softcap) {
  const c10::DeviceGuard guard(x.device());
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "x must be bfloat16, not ", x.scalar_type());
  TORCH_CHECK_VALUE(epilogue == "none" || epilogue == "relu2" || epilogue == "softcap", "epilogue ", epilogue,
                    ": use none, relu2 or softcap");
  Check check(x);
  check.shape(x, "x", "NC", true);
  check.shape(weight, "weight", "OC");
  ThinLinear p{};
  p.weight_type = type_of(weight, "weight");
  TORCH_CHECK_TYPE(p.weight_type != Type::float32, "weight must be bfloat16, float8_e4m3fn or int8");
  p.x = x.const_data_ptr(), p.weight = weight.const_data_ptr();
  p.scale = scale ? check.data<float>(*scale, "scale", "O", at::kFloat) : nullptr;
  p.rows = check.size('N'), p.inputs = check.size('C'), p.outputs = check.size('O');
  p.x_stride = p.rows > 1 ? x.stride(0) : p.inputs;
  p.epilogue = epilogue == "relu2" ? Epilogue::relu2 : epilogue == "softcap" ? Epilogue::softcap : Epilogue::none;
  p.softcap = static_cast<float>(softcap);
  Tensor y = at::empty({p.rows, p.outputs}, x.options().dtype(epilogue == "softcap" ? at::kFloat : at::kBFloat16));
  p.y = y.mutable_data_ptr();
  if (p.rows > 0 && p.outputs > 0) launched(thin_linear(p, stream()));
  return y;
}

void paged_qkv_op(Tensor& qkv, const Tensor& x, const Tensor& tokens, const Tensor& positions, const Tensor& table,
                  const Tensor& starts, const Tensor& cos, const Tensor& sin, Optional embeddings, Optional gate_weight,
                  Tensor& k_cache, Tensor& v_cache, double scale) {
  const c10::DeviceGuard guard(qkv.device());
  check_compute_dtype(qkv, "qkv");
  check_cache_dtype(qkv, k_cache);
  TORCH_CHECK_VALUE(embeddings.has_value() == gate_weight.has_value(), "embeddings and gate_weight go together");
  Check check(qkv);
  PagedQkv p{};
  p.type = type_of(qkv, "qkv"), p.cache_type = type_of(k_cache, "k_cache");
  p.qkv = check.shape(qkv, "qkv", "NW").mutable_data_ptr();
  p.tokens = check.data<int64_t>(tokens, "tokens", "N", at::kLong);
  p.positions = check.data<int64_t>(positions, "positions", "N", at::kLong);
  p.table = check.data<int32_t>(table, "table", "SM", at::kInt);
  p.starts = check.data<int32_t>(starts, "starts", "*", at::kInt);
  p.cos = check.data<void>(cos, "cos", "Ph", qkv.scalar_type());
  p.sin = check.data<void>(sin, "sin", "Ph", qkv.scalar_type());
  p.k_cache = check.shape(k_cache, "k_cache", "BLGD").mutable_data_ptr();
  check.data<void>(v_cache, "v_cache", "BLGD", k_cache.scalar_type());
  p.v_cache = v_cache.mutable_data_ptr();
  p.count = check.size('N'), p.sequences = check.size('S'), p.table_width = check.size('M');
  p.kv_heads = check.size('G'), p.dims = check.size('D'), p.block_size = check.size('L');
  p.heads = check.size('W') / p.dims - 2 * p.kv_heads;
  TORCH_CHECK_VALUE(check.size('W') % p.dims == 0 && p.heads > 0 && p.heads % p.kv_heads == 0, "qkv of width ",
                    check.size('W'), " does not hold heads of ", p.dims, " for ", p.kv_heads, " key/value heads");
  TORCH_CHECK_VALUE(2 * check.size('h') == p.dims && starts.numel() == p.sequences + 1,
                    "cos needs D/2 columns and starts one more element than there are sequences");
  if (embeddings) {
    TORCH_CHECK_TYPE(x.scalar_type() == qkv.scalar_type(), "x must have the dtype of qkv");
    p.x = check.shape(x, "x", "NC", true).const_data_ptr();
    p.x_stride = p.count > 1 ? x.stride(0) : x.size(1);
    p.embeddings = check.maybe(embeddings, "embeddings", "VE", qkv);
    p.gate_weight = check.maybe(gate_weight, "gate_weight", "GI", qkv);
    p.gate_inputs = check.size('I');
    TORCH_CHECK_VALUE(check.size('E') == p.kv_heads * p.dims && p.gate_inputs <= check.size('C'),
                      "embeddings must have G·D columns, and the gate must not read more channels than x has");
  }
  p.scale = static_cast<float>(scale);
  if (p.count > 0) launched(paged_qkv(p, stream()));
}

PagedAttention attention_arguments(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& table,
                                   const Tensor& starts, const Tensor& lengths, int64_t window) {
  check_compute_dtype(q, "q");
  check_cache_dtype(q, k_cache);
  Check check(q);
  PagedAttention p{};
  p.type = type_of(q, "q"), p.cache_type = type_of(k_cache, "k_cache");
  p.q = check.shape(q, "q", "NHD", true).const_data_ptr();
  p.k_cache = check.shape(k_cache, "k_cache", "BLGD").const_data_ptr();
  p.v_cache = check.data<void>(v_cache, "v_cache", "BLGD", k_cache.scalar_type());
  p.table = check.data<int32_t>(table, "table", "SM", at::kInt);
  p.starts = check.data<int32_t>(starts, "starts", "*", at::kInt);
  p.lengths = check.data<int32_t>(lengths, "lengths", "S", at::kInt);
  p.count = check.size('N'), p.sequences = check.size('S'), p.table_width = check.size('M');
  p.heads = check.size('H'), p.kv_heads = check.size('G'), p.dims = check.size('D'), p.block_size = check.size('L');
  TORCH_CHECK_VALUE(p.kv_heads > 0 && p.heads % p.kv_heads == 0, p.heads, " query heads cannot share ", p.kv_heads,
                    " key/value heads");
  TORCH_CHECK_VALUE(starts.numel() == p.sequences + 1 && window >= 0,
                    "starts needs one more element than there are sequences, the window at least 0");
  p.q_stride = p.count > 1 ? q.stride(0) : static_cast<int64_t>(p.heads) * p.dims;
  // Larger windows than the table can name see no more.
  const int64_t capacity = static_cast<int64_t>(p.table_width) * p.block_size;
  TORCH_CHECK_VALUE(capacity <= INT32_MAX, "the table names ", capacity, " positions: too many");
  p.window = static_cast<int>(std::min(window, capacity));
  const PagedAttentionPlan plan = plan_paged_attention(p);
  p.tile = plan.tile, p.splits = plan.splits;
  return p;
}

Tensor attend(PagedAttention& p, const Tensor& q, Tensor& arrivals) {
  Tensor out = at::empty({p.count, p.heads, p.dims}, q.options());
  Tensor values, sums;
  if (p.splits > 1) {
    const auto options = q.options().dtype(at::kFloat);
    values = at::empty({p.count, p.heads, p.splits, p.dims}, options);
    sums = at::empty({p.count, p.heads, p.splits, 2}, options);
    p.values = values.mutable_data_ptr<float>(), p.sums = sums.mutable_data_ptr<float>();
    p.arrivals = arrivals.mutable_data_ptr<int32_t>();
  }
  p.out = out.mutable_data_ptr();
  if (p.count > 0) launched(paged_attention(p, stream()));
  return out;
}

Tensor paged_attention_op(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& table,
                          const Tensor& starts, const Tensor& lengths, int64_t window) {
  const c10::DeviceGuard guard(q.device());
  PagedAttention p = attention_arguments(q, k_cache, v_cache, table, starts, lengths, window);
  Tensor arrivals = at::zeros({plan_paged_attention(p).arrivals}, q.options().dtype(at::kInt));
  return attend(p, q, arrivals);
}

Tensor split_paged_attention(const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& table,
                             const Tensor& starts, const Tensor& lengths, int64_t window, Tensor& arrivals) {
  const c10::DeviceGuard guard(q.device());
  PagedAttention p = attention_arguments(q, k_cache, v_cache, table, starts, lengths, window);
  const int needed = plan_paged_attention(p).arrivals;
  TORCH_CHECK_VALUE(arrivals.scalar_type() == at::kInt && arrivals.is_contiguous() && arrivals.numel() >= needed &&
                        arrivals.device() == q.device(),
                    "arrivals must be ", needed, " or more int32 zeros on ", q.device());
  return attend(p, q, arrivals);
}

Tensor draw_tokens(const Tensor& logits, const Tensor& seeds, const Tensor& positions, const Tensor& temperature,
                   const Tensor& top_k, const Tensor& top_p, const Tensor& min_p) {
  const c10::DeviceGuard guard(logits.device());
  Check check(logits);
  Sample p{};
  p.logits = check.data<float>(logits, "logits", "BV", at::kFloat);
  p.seeds = check.data<int64_t>(seeds, "seeds", "B", at::kLong);
  p.positions = check.data<int64_t>(positions, "positions", "B", at::kLong);
  p.temperature = check.data<float>(temperature, "temperature", "B", at::kFloat);
  p.top_k = check.data<int64_t>(top_k, "top_k", "B", at::kLong);
  p.top_p = check.data<float>(top_p, "top_p", "B", at::kFloat);
  p.min_p = check.data<float>(min_p, "min_p", "B", at::kFloat);
  p.rows = check.size('B'), p.vocabulary = check.size('V');
  Tensor drawn = at::empty({p.rows}, logits.options().dtype(at::kLong));
  p.drawn = drawn.mutable_data_ptr<int64_t>();
  if (p.rows > 0) launched(sample(p, stream()));
  return drawn;
}

void softcap_cross_entropy_op(Tensor& panel, const Tensor& targets, Tensor& nll, double softcap, bool gradients) {
  const c10::DeviceGuard guard(panel.device());
  check_compute_dtype(panel, "panel");
  Check check(panel);
  SoftcapCrossEntropy p{};
  p.type = type_of(panel, "panel");
  p.panel = check.shape(panel, "panel", "NV").mutable_data_ptr();
  p.targets = check.data<int64_t>(targets, "targets", "N", at::kLong);
  check.data<float>(nll, "nll", "N", at::kFloat);
  p.nll = nll.mutable_data_ptr<float>();
  p.rows = check.size('N'), p.vocabulary = check.size('V');
  p.softcap = static_cast<float>(softcap), p.gradients = gradients;
  if (p.rows > 0) launched(softcap_cross_entropy(p, stream()));
}

}  // namespace
}  // namespace nanochat

#if NANOCHAT_EMULATED
#define NANOCHAT_IMPLEMENT(m) TORCH_LIBRARY_IMPL(nanochat_emulated, CPU, m)
#else
#define NANOCHAT_IMPLEMENT(m) TORCH_LIBRARY_IMPL(nanochat, CUDA, m)
#endif

NANOCHAT_IMPLEMENT(m) {
  m.impl("residual_norm", nanochat::residual_norm);
  m.impl("smeared_embedding", nanochat::smeared_embedding);
  m.impl("thin_linear", nanochat::thin_linear_op);
  m.impl("paged_qkv", nanochat::paged_qkv_op);
  m.impl("paged_attention", nanochat::paged_attention_op);
  m.impl("split_paged_attention", nanochat::split_paged_attention);
  m.impl("draw_tokens", nanochat::draw_tokens);
  m.impl("softcap_cross_entropy", nanochat::softcap_cross_entropy_op);
}

#endif
