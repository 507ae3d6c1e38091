// Every schema of the extension, on one page. The implementations stand at the foot of the file that holds them; fake
// implementations, where an op has a result that shapes can tell, are registered in kernels/nanochat_kernels/native.py.
#include <torch/library.h>

TORCH_LIBRARY(nanochat, m) {
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
}
