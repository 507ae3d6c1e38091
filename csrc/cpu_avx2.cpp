// AVX2 with FMA and F16C: 8 lanes, 16 registers. A tile of 3 rows × 4 vectors leaves room for a weight and 3 inputs.
#include <utility>

#include "cpu_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

namespace nanochat {
namespace {

struct V {
  using F = __m256;
  using I = __m256i;
  static constexpr int lanes = 8, rows = 3, integer_rows = 2;
  static F zero() { return _mm256_setzero_ps(); }
  static F set(float x) { return _mm256_set1_ps(x); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F x) { _mm256_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F round(F a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F where_less(F a, F b, F yes, F no) { return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ)); }
  // a·2^n for whole n
  static F scale2(F a, F n) {
    return bits(_mm256_add_epi32(_mm256_castps_si256(a), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
  }
  static float sum(F a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_shuffle_ps(half, half, 1)));
  }
  static I words(const uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const I*>(p)); }
  static F bits(I w) { return _mm256_castsi256_ps(w); }
  static F to_float(I w) { return _mm256_cvtepi32_ps(w); }
  static I mask(I w, uint32_t m) { return _mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(m))); }
  template <int n>
  static I shl(I w) {
    return _mm256_slli_epi32(w, n);
  }
  static void store_int(int32_t* p, F x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), _mm256_cvtps_epi32(x)); }
  static void store_any(float* p, F x) { store(p, x); }
  static void store_any(float* p, I x) { _mm256_storeu_si256(reinterpret_cast<I*>(p), x); }
  static I set_words(uint32_t w) { return _mm256_set1_epi32(static_cast<int>(w)); }
  static I add_words(I a, I b) { return _mm256_add_epi32(a, b); }
  static I dot4(I acc, I w, I x) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w, x)); }
  static I total4(I acc) { return _mm256_madd_epi16(acc, _mm256_set1_epi16(1)); }
  // The instruction wants its first bytes unsigned: the signs of x go to w.
  static I dot8(I acc, I w, I x) {
    const I pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(x), _mm256_sign_epi8(w, x));  // at most 2·127², no overflow
    return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  template <int n>
  static I shr16(I w) {
    return _mm256_srli_epi16(w, n);
  }
  static F halves(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
};

#include "cpu_kernels_impl.h"

}  // namespace

extern const Kernels kAvx2;
const Kernels kAvx2 = {"avx2", prepare, linear, norm, rope_norm, attend, loss};

}  // namespace nanochat

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
