// One step of the whole model: new tokens in, logits out, keys and values written to the paged cache on the way.
//
// Every phase of a layer is a number of independent items, and threads take items from a shared counter until none is
// left. Nobody owns an item and nobody is waited for by name: a thread that comes late finds the work done, and one
// thread alone does all of it. So the step needs a single fork and join, and a phase costs two atomic operations per
// item and a short spin, a fraction of a microsecond, where a fork and join of OpenMP costs several.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "cpu_kernels.h"

namespace nanochat {

struct Table {  // an embedding table or a cache: floats or bf16
  void* data;
  bool bf16;
};

struct LayerArgs {
  Packed qkv, o, fc, proj;
  const float* gate;  // (kv_heads, gate_inputs), null where the layer has no value embedding
  Table values;       // (vocabulary, kv_heads·head_dim)
  Table k, v;         // (blocks, block_size, kv_heads, head_dim)
  int64_t blocks;     // of this layer's group
  float stream_scale, first_scale;
  int64_t window;
  int group;  // 0: the full table, 1: the windowed one
};

struct StepArgs {
  int64_t width, heads, kv_heads, head_dim, layers, middle, vocabulary, block_size;
  int64_t gate_inputs, smear_inputs;
  float qk_scale, softcap, smear_scale, backout_scale;
  const float* smear;  // (smear_inputs), null for the older architecture
  Table embedding;     // (vocabulary, width)
  Packed head;
  const float *cos, *sin;  // (positions, head_dim/2)
  const LayerArgs* layer;

  int64_t threads, rows, wanted;
  bool alone;  // every sequence has one new token: no row needs the keys that another writes
  const int64_t *tokens, *previous, *positions;  // (rows); a negative position is padding
  const int64_t* outputs;                        // (wanted)
  const int32_t* sequence;                       // (rows) which sequence a row belongs to
  const int32_t* table[2];                       // per group: (sequences, table_width)
  int64_t table_width[2];
  float* workspace;  // step_workspace(...) floats, zeroed
  float* logits;     // (wanted, head.outputs)
};

// Phases done by whichever threads come. One object serves one step.
class Crew {
 public:
  explicit Crew(int64_t phases) : phases_(new Phase[static_cast<size_t>(phases)]) {}

  // Every thread calls run with the same phases in the same order; returns when all items of this one are done.
  template <class Body>
  void run(int64_t phase, int64_t items, Body&& body) {
    Phase& p = phases_[static_cast<size_t>(phase)];
    for (int64_t item; (item = p.next.fetch_add(1, std::memory_order_relaxed)) < items;) {
      body(item);
      p.done.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; p.done.load(std::memory_order_acquire) < items;) pause(spins);
  }

 private:
  struct alignas(64) Phase {
    std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int64_t> done{0};
  };
  static void pause(int& spins);
  std::unique_ptr<Phase[]> phases_;
};

int64_t step_phases(int64_t layers);
int64_t step_workspace(const StepArgs& args);
// The part of one thread: call it from all of them with the same crew.
void step(const StepArgs& args, const Kernels& kernels, Crew& crew);

}  // namespace nanochat
