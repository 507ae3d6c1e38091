// NEON on 64-bit ARM: 4 lanes, 32 registers: 2 rows × 8 vectors.
#include <utility>

#include "cpu_kernels.h"

#if defined(__aarch64__)
#include <arm_neon.h>

namespace nanochat {
namespace {

struct V {
  using F = float32x4_t;
  using I = uint32x4_t;
  static constexpr int lanes = 4, rows = 2, integer_rows = 2;
  static F zero() { return vdupq_n_f32(0.0f); }
  static F set(float x) { return vdupq_n_f32(x); }
  static F load(const float* p) { return vld1q_f32(p); }
  static void store(float* p, F x) { vst1q_f32(p, x); }
  static F add(F a, F b) { return vaddq_f32(a, b); }
  static F sub(F a, F b) { return vsubq_f32(a, b); }
  static F mul(F a, F b) { return vmulq_f32(a, b); }
  static F div(F a, F b) { return vdivq_f32(a, b); }
  static F max(F a, F b) { return vmaxq_f32(a, b); }
  static F min(F a, F b) { return vminq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  static F round(F a) { return vrndnq_f32(a); }
  static F where_less(F a, F b, F yes, F no) { return vbslq_f32(vcltq_f32(a, b), yes, no); }
  static F scale2(F a, F n) {
    const int32x4_t exponent = vshlq_n_s32(vcvtq_s32_f32(n), 23);
    return vreinterpretq_f32_s32(vaddq_s32(vreinterpretq_s32_f32(a), exponent));
  }
  static float sum(F a) { return vaddvq_f32(a); }
  static I words(const uint32_t* p) { return vld1q_u32(p); }
  static F bits(I w) { return vreinterpretq_f32_u32(w); }
  static F to_float(I w) { return vcvtq_f32_s32(vreinterpretq_s32_u32(w)); }
  static I mask(I w, uint32_t m) { return vandq_u32(w, vdupq_n_u32(m)); }
  template <int n>
  static I shl(I w) {
    return vshlq_n_u32(w, n);
  }
  static void store_int(int32_t* p, F x) { vst1q_s32(p, vcvtnq_s32_f32(x)); }
  static void store_any(float* p, F x) { store(p, x); }
  static void store_any(float* p, I x) { vst1q_u32(reinterpret_cast<uint32_t*>(p), x); }
  static I set_words(uint32_t w) { return vdupq_n_u32(w); }
  static I add_words(I a, I b) { return vaddq_u32(a, b); }
  static int16x8_t pairs(I a, I b) {  // sums of two products of signed bytes: at most 2·127², no overflow
    const int8x16_t x = vreinterpretq_s8_u32(a), y = vreinterpretq_s8_u32(b);
    return vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(y)), vmull_high_s8(x, y));
  }
  static I dot4(I acc, I w, I x) { return vreinterpretq_u32_s16(vaddq_s16(vreinterpretq_s16_u32(acc), pairs(w, x))); }
  static I total4(I acc) { return vreinterpretq_u32_s32(vpaddlq_s16(vreinterpretq_s16_u32(acc))); }
  static I dot8(I acc, I w, I x) { return vreinterpretq_u32_s32(vpadalq_s16(vreinterpretq_s32_u32(acc), pairs(w, x))); }
  template <int n>
  static I shr16(I w) {
    if constexpr (n == 0)
      return w;  // the instruction has no shift by nothing
    else
      return vreinterpretq_u32_u16(vshrq_n_u16(vreinterpretq_u16_u32(w), n));
  }
  static F halves(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
};

#include "cpu_kernels_impl.h"

}  // namespace

extern const Kernels kNeon;
const Kernels kNeon = {"neon", prepare, linear, norm, rope_norm, attend, loss};

}  // namespace nanochat
#endif
