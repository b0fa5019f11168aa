// Vectors of 16 floats or integers as four quarters of 128 bits, for 64-bit ARM.
//
// GCC keeps vectors of the extension that are wider than the CPU's in memory (vec_avx2.h). The operations are those of
// vec.h's types, and a product that is added is rounded once, as on CPUs with AVX2 and AVX-512.
#pragma once

#include <arm_neon.h>

struct u32x16 {
  uint32x4_t a, b, c, d;
};
struct i32x16;
struct f32x16 {
  float32x4_t a, b, c, d;
  INLINE_METHOD f32x16() : a(vdupq_n_f32(0)), b(a), c(a), d(a) {}
  INLINE_METHOD f32x16(float32x4_t a, float32x4_t b, float32x4_t c, float32x4_t d) : a(a), b(b), c(c), d(d) {}
  INLINE_METHOD explicit f32x16(u32x16 v)
      : a(vreinterpretq_f32_u32(v.a)), b(vreinterpretq_f32_u32(v.b)), c(vreinterpretq_f32_u32(v.c)),
        d(vreinterpretq_f32_u32(v.d)) {}
  INLINE_METHOD explicit f32x16(i32x16 v);
};
struct i32x16 {
  int32x4_t a, b, c, d;
  i32x16() = default;
  INLINE_METHOD i32x16(int32x4_t a, int32x4_t b, int32x4_t c, int32x4_t d) : a(a), b(b), c(c), d(d) {}
  INLINE_METHOD explicit i32x16(f32x16 v)
      : a(vreinterpretq_s32_f32(v.a)), b(vreinterpretq_s32_f32(v.b)), c(vreinterpretq_s32_f32(v.c)),
        d(vreinterpretq_s32_f32(v.d)) {}
};
f32x16::f32x16(i32x16 v)
    : a(vreinterpretq_f32_s32(v.a)), b(vreinterpretq_f32_s32(v.b)), c(vreinterpretq_f32_s32(v.c)),
      d(vreinterpretq_f32_s32(v.d)) {}

INLINE f32x16 splat(float v) {
  const float32x4_t all = vdupq_n_f32(v);
  return {all, all, all, all};
}
INLINE i32x16 splat_int(int32_t v) {
  const int32x4_t all = vdupq_n_s32(v);
  return {all, all, all, all};
}

#define QUARTERS(of, x, y) {of(x.a, y.a), of(x.b, y.b), of(x.c, y.c), of(x.d, y.d)}
#define FLOAT_OPERATION(op, of)                                          \
  INLINE f32x16 operator op(f32x16 x, f32x16 y) { return QUARTERS(of, x, y); } \
  INLINE f32x16 operator op(f32x16 x, float y) { return x op splat(y); } \
  INLINE f32x16 operator op(float x, f32x16 y) { return splat(x) op y; }
FLOAT_OPERATION(+, vaddq_f32)
FLOAT_OPERATION(-, vsubq_f32)
FLOAT_OPERATION(*, vmulq_f32)
FLOAT_OPERATION(/, vdivq_f32)
#undef FLOAT_OPERATION
INLINE f32x16& operator+=(f32x16& x, f32x16 y) { return x = x + y; }
INLINE f32x16& operator*=(f32x16& x, f32x16 y) { return x = x * y; }
INLINE f32x16 operator-(f32x16 x) { return {vnegq_f32(x.a), vnegq_f32(x.b), vnegq_f32(x.c), vnegq_f32(x.d)}; }

#define SIGNED(of) vreinterpretq_s32_u32(of)
#define COMPARISON(op, of)                                                                                               \
  INLINE i32x16 operator op(f32x16 x, f32x16 y) {                                                                        \
    return {SIGNED(of##_f32(x.a, y.a)), SIGNED(of##_f32(x.b, y.b)), SIGNED(of##_f32(x.c, y.c)), SIGNED(of##_f32(x.d, y.d))}; \
  }
COMPARISON(==, vceqq)
COMPARISON(>, vcgtq)
COMPARISON(<, vcltq)
#undef COMPARISON
#define COMPARISON(op, of)                                                                                          \
  INLINE i32x16 operator op(i32x16 x, int32_t limit) {                                                              \
    const int32x4_t y = vdupq_n_s32(limit);                                                                         \
    return {SIGNED(of##_s32(x.a, y)), SIGNED(of##_s32(x.b, y)), SIGNED(of##_s32(x.c, y)), SIGNED(of##_s32(x.d, y))}; \
  }
COMPARISON(>, vcgtq)
COMPARISON(<, vcltq)
COMPARISON(<=, vcleq)
#undef COMPARISON
#undef SIGNED

INLINE i32x16 operator+(i32x16 x, i32x16 y) { return QUARTERS(vaddq_s32, x, y); }
INLINE i32x16 operator+(i32x16 x, int32_t y) { return x + splat_int(y); }
INLINE i32x16 operator-(i32x16 x, int32_t y) { return x + splat_int(-y); }
INLINE i32x16 operator&(i32x16 x, i32x16 y) { return QUARTERS(vandq_s32, x, y); }
INLINE i32x16& operator&=(i32x16& x, i32x16 y) { return x = x & y; }
INLINE i32x16 operator<<(i32x16 x, int n) {
  const i32x16 by = splat_int(n);
  return QUARTERS(vshlq_s32, x, by);
}
INLINE u32x16 operator<<(u32x16 x, int n) {
  const i32x16 by = splat_int(n);
  return QUARTERS(vshlq_u32, x, by);
}
INLINE u32x16 operator&(u32x16 x, uint32_t bits) {
  const uint32x4_t y = vdupq_n_u32(bits);
  return {vandq_u32(x.a, y), vandq_u32(x.b, y), vandq_u32(x.c, y), vandq_u32(x.d, y)};
}

INLINE u32x16 load_pairs(const bf16* p) {
  return {vreinterpretq_u32_u16(vld1q_u16(p)), vreinterpretq_u32_u16(vld1q_u16(p + 8)),
          vreinterpretq_u32_u16(vld1q_u16(p + 16)), vreinterpretq_u32_u16(vld1q_u16(p + 24))};
}
INLINE f32x16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
INLINE f32x16 load(const bf16* p) {
  const uint16x8_t lo = vld1q_u16(p), hi = vld1q_u16(p + 8);
  return (f32x16)u32x16{vshll_n_u16(vget_low_u16(lo), 16), vshll_high_n_u16(lo, 16), vshll_n_u16(vget_low_u16(hi), 16),
                        vshll_high_n_u16(hi, 16)};
}
INLINE void store(float* p, f32x16 v) {
  vst1q_f32(p, v.a);
  vst1q_f32(p + 4, v.b);
  vst1q_f32(p + 8, v.c);
  vst1q_f32(p + 12, v.d);
}
// Round to nearest even, as torch does; NaN stays NaN.
INLINE uint16x4_t rounded(float32x4_t v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v), odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  const uint32x4_t up = vaddq_u32(vaddq_u32(u, vdupq_n_u32(0x7fff)), odd);
  return vbsl_u16(vmovn_u32(vceqq_f32(v, v)), vshrn_n_u32(up, 16), vdup_n_u16(0x7fc0));
}
INLINE void store(bf16* p, f32x16 v) {
  vst1q_u16(p, vcombine_u16(rounded(v.a), rounded(v.b)));
  vst1q_u16(p + 8, vcombine_u16(rounded(v.c), rounded(v.d)));
}

INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 sum) {
  return {vfmaq_f32(sum.a, x.a, y.a), vfmaq_f32(sum.b, x.b, y.b), vfmaq_f32(sum.c, x.c, y.c), vfmaq_f32(sum.d, x.d, y.d)};
}
INLINE f32x16 to_floats(i32x16 v) {
  return {vcvtq_f32_s32(v.a), vcvtq_f32_s32(v.b), vcvtq_f32_s32(v.c), vcvtq_f32_s32(v.d)};
}
template <int H>
INLINE f32x16 swap_lanes(f32x16 v) {  // lane i becomes v[i ^ H]
  if constexpr (H == 8) return {v.c, v.d, v.a, v.b};
  else if constexpr (H == 4) return {v.b, v.a, v.d, v.c};
  else if constexpr (H == 2) return {vextq_f32(v.a, v.a, 2), vextq_f32(v.b, v.b, 2), vextq_f32(v.c, v.c, 2), vextq_f32(v.d, v.d, 2)};
  else return {vrev64q_f32(v.a), vrev64q_f32(v.b), vrev64q_f32(v.c), vrev64q_f32(v.d)};
}
INLINE void store_codes(int8_t* p, i32x16 v) {  // values fit 8 bits
  const int16x8_t lo = vcombine_s16(vmovn_s32(v.a), vmovn_s32(v.b)), hi = vcombine_s16(vmovn_s32(v.c), vmovn_s32(v.d));
  vst1q_s8(p, vcombine_s8(vmovn_s16(lo), vmovn_s16(hi)));
}
INLINE i32x16 lanes() {
  const int32x4_t first = {0, 1, 2, 3};
  return {first, vaddq_s32(first, vdupq_n_s32(4)), vaddq_s32(first, vdupq_n_s32(8)), vaddq_s32(first, vdupq_n_s32(12))};
}
INLINE f32x16 select(i32x16 mask, f32x16 x, f32x16 y) {  // mask lanes are 0 or -1
#define CHOSEN(q) vbslq_f32(vreinterpretq_u32_s32(mask.q), x.q, y.q)
  return {CHOSEN(a), CHOSEN(b), CHOSEN(c), CHOSEN(d)};
#undef CHOSEN
}
#undef QUARTERS

#if NATIVE_BF16
struct bf16x32 {
  bfloat16x8_t a, b, c, d;
};
INLINE bfloat16x8_t load_8(const bf16* p) { return vreinterpretq_bf16_u16(vld1q_u16(p)); }
INLINE bf16x32 load_bf16(const bf16* p) { return {load_8(p), load_8(p + 8), load_8(p + 16), load_8(p + 24)}; }
INLINE bf16x32 load_bf16_n(const bf16* p, int pairs) {  // zeros behind the first so many pairs
  if (pairs >= 16) return load_bf16(p);
  bf16 values[32] = {};
  if (pairs > 0) memcpy(values, p, 4 * pairs);
  return load_bf16(values);
}
INLINE bf16x32 splat_pair(const bf16* p) {
  uint32_t pair;
  memcpy(&pair, p, 4);
  const bfloat16x8_t all = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
  return {all, all, all, all};
}
INLINE f32x16 add_dots(f32x16 sum, bf16x32 x, bf16x32 y) {
  return {vbfdotq_f32(sum.a, x.a, y.a), vbfdotq_f32(sum.b, x.b, y.b), vbfdotq_f32(sum.c, x.c, y.c),
          vbfdotq_f32(sum.d, x.d, y.d)};
}
#endif
