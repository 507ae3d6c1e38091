// The next token of every row in one launch: one block of 1,024 threads a row.
//
//     token = argmax_v (z_v/τ + G_v) over the tokens that survive top-k, then top-p, then min-p        (Gumbel-max)
//
// G comes from Philox-4x32-10 on (seed of the row; token, position), word for word the counters of the reference
// (kernels/nanochat_kernels/sample.py): the draw is the same on every device and depends on nothing else in the batch.
// Seeds and positions are tensors, so a captured graph draws anew at every replay.
//
// Top-k and top-p without a sort. Both ask for the same thing: with a weight for each token (1, or its probability) and
// tokens ordered by falling logit, ties by rising id, where does the sum reach a target? That point is found digit by
// digit, each time with a histogram of the weights in shared memory, of the tokens that agree in the digits before:
// first by (max − z) in steps of 1/64, which spreads a model's logits over hundreds of bins and so keeps the atomic
// additions apart; then by the bits of z (11 + 11 + 10); and where equal logits straddle the target, as they do in
// bf16, by the bits of the id (11 + 11). Probabilities are integers, multiples of 2⁻⁴⁰ of the largest: sums are exact,
// whatever their order, so that the result does not vary from run to run.
//
// The row is read again in each pass, 128 KB from the second-level cache: 1 to 2 µs a pass, one pass without filters.
#include "cuda_kernels.h"
#include "device.cuh"

namespace nanochat {
namespace {

constexpr int kThreads = 1024;
constexpr int kBins = 2048;
constexpr int kDigit = 11;  // bits
constexpr float kFine = 64.0f;
constexpr float kOne = 1099511627776.0f;  // 2⁴⁰: the weight of the most probable token

DEVICE uint32_t high_product(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

// Four random words from a counter and a key (Salmon et al., SC 2011).
DEVICE void philox(uint32_t (&c)[4], uint32_t k0, uint32_t k1) {
  constexpr uint32_t kM0 = 0xD2511F53, kM1 = 0xCD9E8D57;
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t c0 = high_product(kM1, c[2]) ^ c[1] ^ k0, c2 = high_product(kM0, c[0]) ^ c[3] ^ k1;
    c[1] = kM1 * c[2], c[3] = kM0 * c[0], c[0] = c0, c[2] = c2;
    k0 += 0x9E3779B9, k1 += 0xBB67AE85;
  }
}

DEVICE float gumbel(uint32_t bits) {
  const float w = fminf((static_cast<float>(bits) + 0.5f) * 2.3283064365386963e-10f, 0.99999994f);
  return -logf(-log1pf(-w));
}

// A float as an integer of the same order; both zeros are one.
DEVICE uint32_t key_of(float z) {
  const uint32_t bits = to_bits(z + 0.0f);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// Who survives: larger keys, and of the tokens with this very key those with ids up to `id`.
struct Limit {
  uint32_t key = 0;
  int id = 0x7FFFFFFF;
  DEVICE bool admits(uint32_t k, int i) const { return k > key || (k == key && i <= id); }
};

struct Best {
  float value;
  int id;
};

struct Shared {
  uint64_t bins[kBins];
  uint64_t warp_totals[kThreads / kWarp];
  Best best[kThreads / kWarp];
  uint64_t found_above, found_own;
  int found_bin;
};

// One row: its logits over the temperature, four at a time, and what all threads agree on.
struct Row {
  const Sample& p;
  const float* logits;
  float temperature, maximum;
  Shared& shared;

  // Calls f(id, scaled logit) for the tokens of this thread.
  template <typename F>
  DEVICE void each(F f) const {
    const bool wide = p.vocabulary % 4 == 0 && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
    for (int first = 4 * static_cast<int>(threadIdx.x); first < p.vocabulary; first += 4 * kThreads) {
      float z[4];
      if (wide) {
        load<float, 4>(logits + first, z);
      } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) z[i] = first + i < p.vocabulary ? logits[first + i] : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (first + i < p.vocabulary) f(first + i, z[i] / temperature);
      }
    }
  }

  DEVICE int fine_bin(float z) const {  // 0 holds the largest logits
    const float steps = (maximum - z) * kFine;
    return steps < kBins - 1 ? static_cast<int>(steps) : kBins - 1;
  }

  DEVICE uint64_t probability(float z) const { return static_cast<uint64_t>(expf(z - maximum) * kOne); }

  // The largest value and its lowest id, in every thread.
  DEVICE Best best_of_block(Best mine) const {
    const auto better = [](Best a, Best b) { return a.value > b.value || (a.value == b.value && a.id < b.id) ? a : b; };
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      mine = better(mine, Best{shuffle_xor(mine.value, step), shuffle_xor(mine.id, step)});
    }
    sync_block();  // what the last call left has been read
    if (threadIdx.x % kWarp == 0) shared.best[threadIdx.x / kWarp] = mine;
    sync_block();
    Best best = shared.best[0];
    for (int warp = 1; warp < kThreads / kWarp; ++warp) best = better(best, shared.best[warp]);
    return best;
  }

  // Fills the bins: weight(z) of each token goes where bin(id, z) says, −1 being nowhere.
  template <typename Bin, typename Weight>
  DEVICE void histogram(Bin bin, Weight weight) const {
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += kThreads) shared.bins[i] = 0;
    sync_block();
    each([&](int id, float z) {
      const int to = bin(id, z);
      if (to >= 0) add_shared(&shared.bins[to], weight(z));
    });
    sync_block();
  }

  // The sum of all bins, and in `prefix` the sum of those before this thread's two.
  DEVICE uint64_t scan(uint64_t& prefix) const {
    const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp;
    const uint64_t own = shared.bins[2 * thread] + shared.bins[2 * thread + 1];
    uint64_t upto = own;
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const uint64_t before = shuffle(upto, lane >= step ? lane - step : lane);
      if (lane >= step) upto += before;
    }
    if (lane == kWarp - 1) shared.warp_totals[thread / kWarp] = upto;
    sync_block();
    prefix = upto - own;
    uint64_t total = 0;
    for (int warp = 0; warp < kThreads / kWarp; ++warp) {
      if (warp < thread / kWarp) prefix += shared.warp_totals[warp];
      total += shared.warp_totals[warp];
    }
    return total;
  }

  // The bin in which the sum, beginning with bin 0, reaches `target`; `above` is what lies before that bin. Returns the
  // bin's own weight.
  DEVICE uint64_t reach(uint64_t target, uint64_t prefix, int& bin, uint64_t& above) const {
    for (int i = 0; i < 2; ++i) {
      const int mine = 2 * static_cast<int>(threadIdx.x) + i;
      const uint64_t own = shared.bins[mine];
      if (prefix < target && target <= prefix + own) {
        shared.found_bin = mine, shared.found_above = prefix, shared.found_own = own;
      }
      prefix += own;
    }
    sync_block();
    bin = shared.found_bin, above = shared.found_above;
    const uint64_t own = shared.found_own;
    sync_block();
    return own;
  }

  // The smallest limit under which the weights of the tokens that `old` admits reach the target, which
  // target_of(total weight) tells. Tokens of weight 0 beyond it are left out.
  template <typename Weight, typename Target>
  DEVICE Limit select(const Limit old, Weight weight, Target target_of) const {
    uint64_t prefix, above, own;
    int fine, bin;
    histogram([&](int id, float z) { return old.admits(key_of(z), id) ? fine_bin(z) : -1; }, weight);
    const uint64_t total = scan(prefix);
    uint64_t target = target_of(total);
    if (target >= total) return old;
    reach(target, prefix, fine, above);
    target -= above;

    uint32_t known = 0;  // the key's digits so far, and how many bits are still to come
    int left = 32;
    for (int digit = 0; digit < 3; ++digit) {
      const int bits = left < kDigit ? left : kDigit, next = left - bits;
      const uint32_t mask = (1u << bits) - 1;
      histogram(
          [&](int id, float z) {
            const uint32_t key = key_of(z);
            const bool agrees = fine_bin(z) == fine && (left == 32 || key >> left == known) && old.admits(key, id);
            return agrees ? static_cast<int>(mask - (key >> next & mask)) : -1;  // larger digits first
          },
          weight);
      scan(prefix);
      own = reach(target, prefix, bin, above);
      target -= above;
      known = known << bits | (mask - static_cast<uint32_t>(bin));
      left = next;
    }
    Limit limit;
    limit.key = known;
    limit.id = old.key == known ? old.id : limit.id;
    if (own == target) return limit;

    int upper = 0;  // equal logits straddle the target: the lowest ids get in
    for (int digit = 1; digit >= 0; --digit) {
      histogram(
          [&](int id, float z) {
            const bool agrees = key_of(z) == known && old.admits(known, id) && (digit == 1 || id >> kDigit == upper);
            return agrees ? (digit == 1 ? id >> kDigit : id & (kBins - 1)) : -1;
          },
          weight);
      scan(prefix);
      reach(target, prefix, bin, above);
      target -= above;
      upper = digit == 1 ? bin : upper << kDigit | bin;
    }
    limit.id = upper;
    return limit;
  }
};

KERNEL(kThreads) sample_kernel(Sample p) {
  SHARED Shared shared;
  const int index = static_cast<int>(blockIdx.x);
  wait_for_previous_kernel();
  let_next_kernel_start();
  const float temperature = p.temperature[index], top_p = p.top_p[index], min_p = p.min_p[index];
  const bool greedy = temperature <= 0;
  Row row{p, p.logits + static_cast<int64_t>(index) * p.vocabulary, greedy ? 1.0f : temperature, 0, shared};

  Best top{-INFINITY, 0x7FFFFFFF};
  const int64_t top_k = p.top_k[index];
  const bool filtered = !greedy && ((top_k > 0 && top_k < p.vocabulary) || top_p < 1 || min_p > 0);
  Limit limit;
  if (greedy || filtered) {
    row.each([&](int id, float z) {
      if (z > top.value || top.id == 0x7FFFFFFF) top = Best{z, id};
    });
    top = row.best_of_block(top);
    row.maximum = top.value;
  }
  if (filtered && top_k > 0 && top_k < p.vocabulary) {
    limit =
        row.select(limit, [](float) { return uint64_t{1}; }, [&](uint64_t) { return static_cast<uint64_t>(top_k); });
  }
  if (filtered && top_p < 1) {
    // A token stays while the weight before it is less than top_p of the whole: the sum reaches that, rounded up.
    limit = row.select(
        limit, [&](float z) { return row.probability(z); },
        [&](uint64_t total) {
          const double share = ceil(static_cast<double>(top_p) * static_cast<double>(total));
          return share < 1 ? uint64_t{1} : static_cast<uint64_t>(share);
        });
  }
  if (!greedy) {
    const uint64_t seed = static_cast<uint64_t>(p.seeds[index]), position = static_cast<uint64_t>(p.positions[index]);
    const uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    Best best{-INFINITY, 0x7FFFFFFF};
    int counted = -1;
    uint32_t words[4] = {};
    row.each([&](int id, float z) {
      if (filtered && !limit.admits(key_of(z), id)) return;
      if (filtered && id != top.id && expf(z - row.maximum) < min_p) return;
      if (counted != id >> 2) {  // four tokens share a counter, and a thread sees them together
        counted = id >> 2;
        words[0] = static_cast<uint32_t>(counted), words[1] = 0;
        words[2] = static_cast<uint32_t>(position), words[3] = static_cast<uint32_t>(position >> 32);
        philox(words, k0, k1);
      }
      const int word = id & 3;
      const float value = z + gumbel(word < 2 ? (word ? words[1] : words[0]) : (word == 2 ? words[2] : words[3]));
      if (value > best.value || best.id == 0x7FFFFFFF) best = Best{value, id};
    });
    top = row.best_of_block(best);
  }
  if (threadIdx.x == 0) p.drawn[index] = top.id;
}

}  // namespace

const char* sample(const Sample& p, CUstream_st* stream) {
  if (p.vocabulary < 1 || p.vocabulary > kBins * kBins) return "sample takes 1 to 4,194,304 words";
  return launch(sample_kernel, dim3(static_cast<unsigned>(p.rows)), kThreads, 0, stream, p);
}

}  // namespace nanochat
