// AVX-512 F and BW, with VNNI where cpu_avx512vnni.cpp includes this file: 16 lanes, 32 registers, 6 rows × 2 vectors.
#include <utility>

#include "cpu_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if NANOCHAT_VNNI
#define NANOCHAT_TARGET "avx512f,avx512bw,avx512vnni,fma,f16c"
#define NANOCHAT_PRAGMA _Pragma("GCC target(\"avx512f,avx512bw,avx512vnni,fma,f16c,prefer-vector-width=512\")")
#define NANOCHAT_TABLE kAvx512Vnni
#define NANOCHAT_NAME "avx512vnni"
#else
#define NANOCHAT_TARGET "avx512f,avx512bw,fma,f16c"
#define NANOCHAT_PRAGMA _Pragma("GCC target(\"avx512f,avx512bw,fma,f16c,prefer-vector-width=512\")")
#define NANOCHAT_TABLE kAvx512
#define NANOCHAT_NAME "avx512"
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target(NANOCHAT_TARGET))), apply_to = function)
#else
NANOCHAT_PRAGMA
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // false alarms inside GCC 12's own avx512fintrin.h
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

namespace nanochat {
namespace {

struct V {
  using F = __m512;
  using I = __m512i;
  static constexpr int lanes = 16, rows = 6, integer_rows = 6;
  static F zero() { return _mm512_setzero_ps(); }
  static F set(float x) { return _mm512_set1_ps(x); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F x) { _mm512_storeu_ps(p, x); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F round(F a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static F where_less(F a, F b, F yes, F no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  static F scale2(F a, F n) { return _mm512_scalef_ps(a, n); }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static I words(const uint32_t* p) { return _mm512_loadu_si512(p); }
  static F bits(I w) { return _mm512_castsi512_ps(w); }
  static F to_float(I w) { return _mm512_cvtepi32_ps(w); }
  static I mask(I w, uint32_t m) { return _mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(m))); }
  template <int n>
  static I shl(I w) {
    return _mm512_slli_epi32(w, n);
  }
  static void store_int(int32_t* p, F x) { _mm512_storeu_si512(p, _mm512_cvtps_epi32(x)); }
  static void store_any(float* p, F x) { store(p, x); }
  static void store_any(float* p, I x) { _mm512_storeu_si512(p, x); }
  static I set_words(uint32_t w) { return _mm512_set1_epi32(static_cast<int>(w)); }
  static I add_words(I a, I b) { return _mm512_add_epi32(a, b); }
  // w with the signs of x: the instructions want their first bytes unsigned.
  static I with_signs(I w, I x) { return _mm512_mask_sub_epi8(w, _mm512_movepi8_mask(x), _mm512_setzero_si512(), w); }
#if NANOCHAT_VNNI
  static I dot4(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, w, x); }
  static I total4(I acc) { return acc; }
  static I dot8(I acc, I w, I x) { return _mm512_dpbusd_epi32(acc, _mm512_abs_epi8(x), with_signs(w, x)); }
#else
  static I dot4(I acc, I w, I x) { return _mm512_add_epi16(acc, _mm512_maddubs_epi16(w, x)); }
  static I total4(I acc) { return _mm512_madd_epi16(acc, _mm512_set1_epi16(1)); }
  static I dot8(I acc, I w, I x) {
    const I pairs = _mm512_maddubs_epi16(_mm512_abs_epi8(x), with_signs(w, x));  // at most 2·127², no overflow
    return _mm512_add_epi32(acc, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
  }
#endif
  template <int n>
  static I shr16(I w) {
    return _mm512_srli_epi16(w, n);
  }
  static F halves(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

#include "cpu_kernels_impl.h"

}  // namespace

extern const Kernels NANOCHAT_TABLE;
const Kernels NANOCHAT_TABLE = {NANOCHAT_NAME, prepare, linear, norm, rope_norm, attend, loss};

}  // namespace nanochat

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
