// What the CUDA kernels are asked to do: one struct and one function for each, without CUDA's or torch's headers, so
// that cuda_ops.cpp fills them in and the .cu files read them. Pointers are to device memory. A function launches on
// the stream and returns null, or the text of the error; it neither allocates nor waits, so all of it can be captured
// in a CUDA graph. Letters in the shapes: N tokens, S sequences, H query heads, G key/value heads, D head size, C
// channels.
#pragma once

#include <cstdint>

struct CUstream_st;

namespace nanochat {

enum class Type { float32, bfloat16, fp8, int8 };

// mixed = scale·(x + delta) + other_scale·other; y = mixed / rms(mixed). Absent terms are null.
struct RmsNorm {
  Type type;
  const void *x, *delta, *other;     // (rows, columns)
  const float *scale, *other_scale;  // one element
  void *y, *mixed;                   // (rows, columns)
  int64_t rows;
  int columns;
};
const char* rms_norm(const RmsNorm&, CUstream_st*);

// y = e(token) + smear_scale·sigmoid(smear_weight·e(token))·e(previous), e(i) = row i of the table over its rms.
struct Embedding {
  Type type;
  const int64_t *tokens, *previous;  // (N,); previous −1: none
  const void* table;                 // (vocabulary, columns)
  const float* smear_weight;         // (smear_inputs,) or null: no smear
  const float* smear_scale;          // one element
  void* y;                           // (N, columns)
  int64_t count;
  int columns, smear_inputs;
};
const char* embedding(const Embedding&, CUstream_st*);

enum class Epilogue { none, relu2, softcap };

// y = epilogue(scale·x·Wᵀ) for up to 16 rows of x: the weights are read once, whatever the rows.
struct ThinLinear {
  Type weight_type;
  const void* x;       // (rows, inputs) bf16, rows x_stride elements apart
  const void* weight;  // (outputs, inputs)
  const float* scale;  // (outputs,) or null
  void* y;             // (rows, outputs), bf16 or, after the softcap, float32
  int rows, inputs, outputs;
  int64_t x_stride;
  Epilogue epilogue;
  float softcap;
};
const char* thin_linear(const ThinLinear&, CUstream_st*);

// Rotation, norm and value gate in place on the queries, and into the paged cache for keys and values.
struct PagedQkv {
  Type type, cache_type;
  void* qkv;                          // (N, (H + 2G)·D), queries first
  const void* x;                      // (N, C): its first gate_inputs channels open the gate
  const int64_t *tokens, *positions;  // (N,); a negative position is padding
  const int32_t *table, *starts;      // (S, table_width), (S + 1)
  const void *cos, *sin;              // (positions, D/2)
  const void* embeddings;             // (vocabulary, G·D) or null
  const void* gate_weight;            // (G, gate_inputs) or null
  void *k_cache, *v_cache;            // (blocks, block_size, G, D)
  int64_t x_stride;
  int count, sequences, table_width, heads, kv_heads, dims, block_size, gate_inputs;
  float scale;
};
const char* paged_qkv(const PagedQkv&, CUstream_st*);

// Windowed grouped attention over a paged cache; see paged_attention.cu for the workspace.
struct PagedAttention {
  Type type, cache_type;
  const void* q;                            // (N, H, D), tokens q_stride elements apart
  const void *k_cache, *v_cache;            // (blocks, block_size, G, D)
  const int32_t *table, *starts, *lengths;  // (S, table_width), (S + 1), (S)
  void* out;                                // (N, H, D)
  float *values, *sums;                     // (N, H, splits, D), (N, H, splits, 2)
  int32_t* arrivals;                        // arrivals_needed() zeros; left as zeros
  int64_t q_stride;
  int count, sequences, table_width, heads, kv_heads, dims, block_size, window;
  int splits, tile;  // from plan_paged_attention
  int block_shift;   // found by paged_attention: log2 of block_size, −1 where that is no integer
};
struct PagedAttentionPlan {
  int tile;      // tokens of one block
  int splits;    // blocks among which the keys of one query are divided
  int arrivals;  // counters needed
};
PagedAttentionPlan plan_paged_attention(const PagedAttention&);
const char* paged_attention(const PagedAttention&, CUstream_st*);

// The next token of each row.
struct Sample {
  const float* logits;               // (rows, vocabulary)
  const int64_t *seeds, *positions;  // (rows,)
  const float *temperature, *top_p, *min_p;
  const int64_t* top_k;
  int64_t* drawn;  // (rows,)
  int rows, vocabulary;
};
const char* sample(const Sample&, CUstream_st*);

// nll of each row, and the panel of 2l/c overwritten by s(1 − s)·(softmax − onehot).
struct SoftcapCrossEntropy {
  Type type;
  void* panel;             // (rows, vocabulary)
  const int64_t* targets;  // (rows,)
  float* nll;              // (rows,)
  int64_t rows;
  int vocabulary;
  float softcap;
  bool gradients;
};
const char* softcap_cross_entropy(const SoftcapCrossEntropy&, CUstream_st*);

// May 16-byte accesses be used on this pointer?
inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace nanochat
