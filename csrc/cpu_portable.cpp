// No intrinsics: vectors of 4 lanes by the compiler's vector extension. Runs everywhere; the tests' second opinion.
#include <cmath>
#include <cstring>
#include <utility>

#include "cpu_kernels.h"

namespace nanochat {
namespace {

float from_half(uint16_t half) {
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  const int exponent = (half >> 10) & 31, fraction = half & 1023;
  if (exponent == 31) return fraction ? NAN : sign * INFINITY;
  return sign * std::ldexp(static_cast<float>(exponent ? fraction | 1024 : fraction), (exponent ? exponent : 1) - 25);
}

struct V {
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t I __attribute__((vector_size(16)));
  typedef int32_t S __attribute__((vector_size(16)));
  typedef uint16_t H __attribute__((vector_size(16)));
  static constexpr int lanes = 4, rows = 2, integer_rows = 2;
  static F zero() { return set(0.0f); }
  static F set(float x) { return F{x, x, x, x}; }
  static F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof x);
    return x;
  }
  static void store(float* p, F x) { std::memcpy(p, &x, sizeof x); }
  static F add(F a, F b) { return a + b; }
  static F sub(F a, F b) { return a - b; }
  static F mul(F a, F b) { return a * b; }
  static F div(F a, F b) { return a / b; }
  static F max(F a, F b) { return a > b ? a : b; }
  static F min(F a, F b) { return a < b ? a : b; }
  static F fma(F a, F b, F c) { return a * b + c; }
  static F round(F a) {
    for (int i = 0; i < lanes; ++i) a[i] = std::nearbyint(a[i]);
    return a;
  }
  static F where_less(F a, F b, F yes, F no) { return a < b ? yes : no; }
  static F scale2(F a, F n) { return bits((I)a + ((I) __builtin_convertvector(n, S) << 23)); }
  static float sum(F a) { return (a[0] + a[2]) + (a[1] + a[3]); }
  static I words(const uint32_t* p) {
    I w;
    std::memcpy(&w, p, sizeof w);
    return w;
  }
  static F bits(I w) { return (F)w; }
  static F to_float(I w) { return __builtin_convertvector((S)w, F); }
  static I mask(I w, uint32_t m) { return w & m; }
  template <int n>
  static I shl(I w) {
    return w << n;
  }
  static void store_int(int32_t* p, F x) {
    for (int i = 0; i < lanes; ++i) p[i] = static_cast<int32_t>(std::nearbyint(x[i]));
  }
  static void store_any(float* p, F x) { store(p, x); }
  static void store_any(float* p, I x) { std::memcpy(p, &x, sizeof x); }
  static I set_words(uint32_t w) { return I{w, w, w, w}; }
  static I add_words(I a, I b) { return a + b; }
  static I dot8(I acc, I w, I x) {
    for (int bits = 24; bits >= 0; bits -= 8) acc += (I)(((S)(w << bits) >> 24) * ((S)(x << bits) >> 24));
    return acc;
  }
  static I dot4(I acc, I w, I x) { return dot8(acc, w, x); }
  static I total4(I acc) { return acc; }
  template <int n>
  static I shr16(I w) {
    return (I)((H)w >> n);
  }
  static F halves(const uint16_t* p) { return F{from_half(p[0]), from_half(p[1]), from_half(p[2]), from_half(p[3])}; }
};

#include "cpu_kernels_impl.h"

}  // namespace

extern const Kernels kPortable;
const Kernels kPortable = {"portable", prepare, linear, norm, rope_norm, attend, loss};

}  // namespace nanochat
