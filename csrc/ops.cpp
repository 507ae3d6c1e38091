// Every schema of the extension, on one page. The implementations stand at the foot of the file that holds them; fake
// implementations, where an op has a result that shapes can tell, are registered in kernels/nanochat_kernels/native.py.
#include <torch/library.h>

// The emulator of the CUDA kernels (csrc/emulator.cuh) declares the same ops under a name of its own.
#ifndef NANOCHAT_LIBRARY
#define NANOCHAT_LIBRARY nanochat
#endif
#define NANOCHAT_DECLARE(name, m) TORCH_LIBRARY(name, m)

NANOCHAT_DECLARE(NANOCHAT_LIBRARY, m) {
  // An uninitialized uint8 tensor in memory that asks for huge pages: weights are streamed, and page walks cost.
  m.def("allocate(int bytes) -> Tensor");

  // y = x·Wᵀ with packed weights (see csrc/cpu_kernels.h): x (rows, k) float32, words (panels, blocks, 32) int32,
  // scales as the format needs; (rows, outputs) float32. format: fp32 | bf16 | int8 | int4; epilogue: none | relu2 |
  // softcap.
  m.def(
      "packed_linear(Tensor x, Tensor words, Tensor? scales, str format, int outputs, str epilogue=\"none\", "
      "float softcap=15.0) -> Tensor");

  // Windowed, grouped attention over a paged cache; see kernels/nanochat_kernels/paged_attention.py.
  m.def(
      "paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor table, Tensor starts, Tensor lengths, "
      "int window) -> Tensor");

  // One step of the whole model on the CPU. weights, caches and tables in the order of
  // nanochat/inference/native_runner.py; (wanted, padded vocabulary) float32 logits. Writes the new keys and values.
  m.def(
      "model_step(int[] sizes, float[] scalars, str format, Tensor[] weights, Tensor(a!)[] k, Tensor(b!)[] v, "
      "Tensor tokens, Tensor previous, Tensor positions, Tensor starts, Tensor lengths, Tensor full_table, "
      "Tensor window_table, Tensor outputs) -> Tensor");

  // On CPUs and CUDA: panel (rows, vocabulary) holds 2l/c and becomes s(1 − s)·(softmax − onehot), s = sigmoid(2l/c),
  // if gradients are wanted.
  m.def("softcap_cross_entropy(Tensor(a!) panel, Tensor targets, Tensor(b!) nll, float softcap, bool gradients) -> ()");

  // What follows runs on CUDA alone: the kernels of the .cu files, whose heads say what they compute.

  // (y, mixed) of kernels/nanochat_kernels/rms_norm.py; mixed is empty when it would be x itself. Scales are one
  // float32.
  m.def(
      "residual_norm(Tensor x, Tensor? delta, Tensor? scale, Tensor? other, Tensor? other_scale) -> (Tensor, Tensor)");

  m.def(
      "smeared_embedding(Tensor tokens, Tensor previous, Tensor table, Tensor? smear_weight, Tensor? smear_scale) -> "
      "Tensor");

  // Up to 16 rows of bfloat16 x; weight bfloat16, float8_e4m3fn or int8, scale (outputs) float32. epilogue: none |
  // relu2 | softcap, the last with a float32 result.
  m.def(
      "thin_linear(Tensor x, Tensor weight, Tensor? scale=None, str epilogue=\"none\", float softcap=15.0) -> Tensor");

  // Queries are overwritten in qkv, keys and values go into the cache.
  m.def(
      "paged_qkv(Tensor(a!) qkv, Tensor x, Tensor tokens, Tensor positions, Tensor table, Tensor starts, Tensor cos, "
      "Tensor sin, Tensor? embeddings, Tensor? gate_weight, Tensor(b!) k_cache, Tensor(c!) v_cache, float scale) -> "
      "()");

  // paged_attention with counters of one's own: int32 zeros, left as zeros, so that no launch has to clear them.
  m.def(
      "split_paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor table, Tensor starts, Tensor lengths, "
      "int window, Tensor(a!) arrivals) -> Tensor");

  m.def(
      "draw_tokens(Tensor logits, Tensor seeds, Tensor positions, Tensor temperature, Tensor top_k, Tensor top_p, "
      "Tensor min_p) -> Tensor");
}
