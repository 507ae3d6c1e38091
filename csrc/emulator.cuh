// The names of device.cuh on a CPU: a CUDA kernel runs here thread by thread, so that tests find wrong indices, missing
// barriers and wrong arithmetic without a GPU.
//
// Every thread of a block is a fiber with a stack of its own; a fiber runs until it meets a barrier or a warp-wide
// instruction and then hands over to the next. Blocks run one after the other. Fibers that run far ahead of each other
// are what a missing barrier needs to show: NANOCHAT_EMULATOR_ORDER=reversed starts each round with the last thread, so
// that two runs cover both orders. Dynamic shared memory is filled with NaN before each block. A barrier that some
// threads never reach, or a warp-wide instruction without all lanes, ends the process with a message.
//
// One block at a time means that blocks which wait for each other cannot be emulated; no kernel here does that.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define DEVICE inline
#define HOST_DEVICE inline
#define KERNEL(threads) static void
#define SHARED static

namespace nanochat {

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using Stream = void*;

namespace emulator {

constexpr size_t kStack = 64 * 1024;
constexpr int kMaxShared = 227 * 1024;  // of a Hopper multiprocessor

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2][32][4];  // what lanes show each other, twice: the next exchange may begin before all have read
  int parity[32] = {};
};

struct Fiber {
  ucontext_t start;
  jmp_buf resume;
  bool started = false, done = false;
};

struct Machine {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<char> stacks;
  std::vector<unsigned char> shared;
  Barrier barrier;
  ucontext_t scheduler_start;
  jmp_buf scheduler;
  int current = 0, live = 0;
  long progress = 0;
  void (*run)(const void*) = nullptr;
  const void* argument = nullptr;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda emulator: %s\n", what);
  std::abort();
}

inline void hand_over() {
  if (_setjmp(machine.fibers[machine.current].resume) == 0) _longjmp(machine.scheduler, 1);
}

inline void meet(Barrier& barrier, int expected) {
  const int generation = barrier.generation;
  ++machine.progress;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) hand_over();
}

}  // namespace emulator

inline dim3 blockIdx, gridDim, blockDim;
inline dim3 threadIdx;

namespace emulator {

inline void enter() {
  Machine& m = machine;
  m.run(m.argument);
  m.fibers[m.current].done = true;
  --m.live;
  ++m.progress;
  if (m.barrier.arrived) fail("a thread ended while others of its block wait at a barrier");
  _longjmp(m.scheduler, 1);
}

inline void resume(int thread) {
  Machine& m = machine;
  Fiber& fiber = m.fibers[thread];
  m.current = thread;
  threadIdx = dim3(static_cast<unsigned>(thread));
  if (_setjmp(m.scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.resume, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = m.stacks.data() + static_cast<size_t>(thread) * kStack;
  fiber.start.uc_stack.ss_size = kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, enter, 0);
  setcontext(&fiber.start);
}

inline void run_block(int threads, int shared_bytes) {
  Machine& m = machine;
  m.fibers.assign(threads, Fiber{});
  m.warps.assign((threads + 31) / 32, Warp{});
  m.stacks.resize(static_cast<size_t>(threads) * kStack);
  m.shared.assign(shared_bytes + 16, 0xFF);
  m.barrier = Barrier{};
  m.live = threads;
  static const char* order = std::getenv("NANOCHAT_EMULATOR_ORDER");
  const bool reversed = order && std::strcmp(order, "reversed") == 0;
  while (m.live) {
    const long before = m.progress;
    for (int i = 0; i < threads; ++i) {
      const int thread = reversed ? threads - 1 - i : i;
      if (!m.fibers[thread].done) resume(thread);
    }
    if (m.live && m.progress == before) fail("threads wait at barriers that the others never reach");
  }
}

}  // namespace emulator

struct bf16 {
  uint16_t bits;
};
struct fp8 {
  uint8_t bits;
};

inline float from_bits(uint32_t x) { return std::bit_cast<float>(x); }
inline uint32_t to_bits(float x) { return std::bit_cast<uint32_t>(x); }

inline uint16_t float_to_bf16(float x) {
  if (std::isnan(x)) return 0x7FFF;
  const uint32_t bits = to_bits(x);
  return static_cast<uint16_t>((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

inline uint32_t floats_to_bf16(float low, float high) {
  return float_to_bf16(low) | uint32_t{float_to_bf16(high)} << 16;
}

inline uint32_t multiply_bf16(uint32_t a, uint32_t b) {
  const auto half = [](uint32_t x) { return from_bits(x << 16); };
  return floats_to_bf16(half(a) * half(b), half(a >> 16) * half(b >> 16));
}

inline float fp8_to_float(uint8_t x) {
  const int exponent = x >> 3 & 15, mantissa = x & 7;
  if ((x & 0x7F) == 0x7F) return NAN;
  const float magnitude = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return x & 0x80 ? -magnitude : magnitude;
}

inline uint8_t float_to_fp8(float x) {
  if (std::isnan(x)) return 0x7F;
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float magnitude = std::fmin(std::fabs(x), 448.0f);
  const int exponent = std::fmax(magnitude > 0 ? std::ilogb(magnitude) : -6, -6);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 3 - exponent)));  // 8 to 16, fewer: subnormal
  return sign | static_cast<uint8_t>(steps < 8 ? steps : (exponent + 7) * 8 + steps - 8);
}

inline uint32_t pick_bytes(uint32_t a, uint32_t b, uint32_t order) {
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t y = 0;
  for (int i = 0; i < 4; ++i) y |= static_cast<uint32_t>(both >> 8 * (order >> 4 * i & 7) & 0xFF) << 8 * i;
  return y;
}

template <typename Pack>
inline Pack load_constant(const Pack* from) {
  return *from;
}
template <typename Pack>
inline Pack load_once(const Pack* from) {
  return *from;
}

inline void prefetch(const void* from, uint32_t bytes) {
  if (reinterpret_cast<uintptr_t>(from) % 16 || bytes % 16)
    emulator::fail("a prefetch that is not in units of 16 bytes");
}

// Every lane shows `words` 64-bit words and gets to see those of all lanes.
inline const uint64_t (*exchange(const uint64_t* mine, int words))[4] {
  emulator::Machine& m = emulator::machine;
  const int thread = m.current, lane = thread % 32;
  emulator::Warp& warp = m.warps[thread / 32];
  const int parity = warp.parity[lane] ^= 1;
  std::memcpy(warp.slot[parity][lane], mine, words * sizeof(uint64_t));
  const int threads = static_cast<int>(blockDim.x), first = thread - lane;
  const int lanes = threads - first < 32 ? threads - first : 32;
  for (int i = 0; i < lanes; ++i) {
    if (m.fibers[first + i].done) emulator::fail("a lane ended before a warp-wide instruction of its warp");
  }
  emulator::meet(warp.barrier, lanes);
  return warp.slot[parity];
}

template <typename T>
inline T shuffle(T x, int lane) {
  uint64_t mine = 0;
  std::memcpy(&mine, &x, sizeof(T));
  const auto* shown = exchange(&mine, 1);
  T y;
  std::memcpy(&y, shown[lane % 32], sizeof(T));
  return y;
}
template <typename T>
inline T shuffle_xor(T x, int lanes) {
  return shuffle(x, emulator::machine.current % 32 ^ lanes);
}

inline void sync_block() { emulator::meet(emulator::machine.barrier, emulator::machine.live); }
inline void sync_warp() {
  const uint64_t nothing = 0;
  exchange(&nothing, 1);
}
inline void publish() {}

inline int32_t add_atomically(int32_t* to, int32_t x) {
  const int32_t before = *to;
  *to += x;
  return before;
}
inline void add_shared(uint32_t* to, uint32_t x) { *to += x; }
inline void add_shared(uint64_t* to, uint64_t x) { *to += x; }
inline float load_shared_by_blocks(const float* from) { return *from; }

template <typename T>
inline T* dynamic_shared() {
  const auto address = reinterpret_cast<uintptr_t>(emulator::machine.shared.data());
  return reinterpret_cast<T*>((address + 15) & ~uintptr_t{15});
}

inline void multiply_accumulate(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const uint64_t mine[3] = {a[0] | uint64_t{a[1]} << 32, a[2] | uint64_t{a[3]} << 32, b[0] | uint64_t{b[1]} << 32};
  const auto* shown = exchange(mine, 3);
  const auto half = [&](int lane, int word, int part) {  // 16-bit part of what a lane shows
    return from_bits(static_cast<uint32_t>(shown[lane][word] >> 16 * part & 0xFFFF) << 16);
  };
  const int lane = emulator::machine.current % 32;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const int member = k % 8 / 2, upper = k / 8;
      const float x = half(row % 8 * 4 + member, upper, row / 8 * 2 + k % 2);
      d[i] += x * half(column * 4 + member, 2, upper * 2 + k % 2);
    }
  }
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

template <typename Parameters>
const char* launch(void (*kernel)(Parameters), dim3 grid, int threads, int shared_bytes, Stream,
                   const Parameters& parameters) {
  if (threads < 1 || threads > 1024 || shared_bytes > emulator::kMaxShared || grid.y > 65535 || grid.z > 65535) {
    return "invalid launch: too many threads, too much shared memory or too large a grid";
  }
  struct Call {
    void (*kernel)(Parameters);
    const Parameters& parameters;
  } call{kernel, parameters};
  emulator::machine.run = [](const void* argument) {
    const Call& made = *static_cast<const Call*>(argument);
    made.kernel(made.parameters);
  };
  emulator::machine.argument = &call;
  gridDim = grid;
  blockDim = dim3(static_cast<unsigned>(threads));
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulator::run_block(threads, shared_bytes);
      }
    }
  }
  return nullptr;
}

}  // namespace nanochat
