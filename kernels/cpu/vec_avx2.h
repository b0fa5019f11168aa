// Vectors of 16 floats or integers as two halves of 256 bits, for CPUs with AVX2 and FMA and no AVX-512.
//
// GCC keeps vectors of the extension that are wider than the CPU's in memory, and fills them element by element: a product
// was forty times as slow as these. The operations are those of vec.h's types, bit for bit
// but for the sign of a zero that is splatted.
#pragma once

struct i32x16;
struct u32x16 {
  __m256i lo, hi;
  INLINE_METHOD u32x16(__m256i a, __m256i b) : lo(a), hi(b) {}
};
struct f32x16 {
  __m256 lo, hi;
  INLINE_METHOD f32x16() : lo(_mm256_setzero_ps()), hi(_mm256_setzero_ps()) {}
  INLINE_METHOD f32x16(__m256 a, __m256 b) : lo(a), hi(b) {}
  INLINE_METHOD explicit f32x16(u32x16 v) : lo(_mm256_castsi256_ps(v.lo)), hi(_mm256_castsi256_ps(v.hi)) {}
  INLINE_METHOD explicit f32x16(i32x16 v);
};
struct i32x16 {
  __m256i lo, hi;
  i32x16() = default;
  INLINE_METHOD i32x16(__m256i a, __m256i b) : lo(a), hi(b) {}
  INLINE_METHOD explicit i32x16(f32x16 v) : lo(_mm256_castps_si256(v.lo)), hi(_mm256_castps_si256(v.hi)) {}
};
f32x16::f32x16(i32x16 v) : lo(_mm256_castsi256_ps(v.lo)), hi(_mm256_castsi256_ps(v.hi)) {}

INLINE f32x16 splat(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
INLINE i32x16 splat_int(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }

#define FLOAT_OPERATION(op, instruction)                                                                             \
  INLINE f32x16 operator op(f32x16 a, f32x16 b) { return {instruction(a.lo, b.lo), instruction(a.hi, b.hi)}; }       \
  INLINE f32x16 operator op(f32x16 a, float b) { return a op splat(b); }                                             \
  INLINE f32x16 operator op(float a, f32x16 b) { return splat(a) op b; }
FLOAT_OPERATION(+, _mm256_add_ps)
FLOAT_OPERATION(-, _mm256_sub_ps)
FLOAT_OPERATION(*, _mm256_mul_ps)
FLOAT_OPERATION(/, _mm256_div_ps)
#undef FLOAT_OPERATION
INLINE f32x16& operator+=(f32x16& a, f32x16 b) { return a = a + b; }
INLINE f32x16& operator*=(f32x16& a, f32x16 b) { return a = a * b; }
INLINE f32x16 operator-(f32x16 a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_xor_ps(a.lo, sign), _mm256_xor_ps(a.hi, sign)};
}

#define COMPARISON(op, predicate)                                                                                    \
  INLINE i32x16 operator op(f32x16 a, f32x16 b) {                                                                    \
    return {_mm256_castps_si256(_mm256_cmp_ps(a.lo, b.lo, predicate)),                                               \
            _mm256_castps_si256(_mm256_cmp_ps(a.hi, b.hi, predicate))};                                              \
  }
COMPARISON(==, _CMP_EQ_OQ)
COMPARISON(>, _CMP_GT_OQ)
COMPARISON(<, _CMP_LT_OQ)
#undef COMPARISON

INLINE i32x16 operator+(i32x16 a, i32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
INLINE i32x16 operator+(i32x16 a, int32_t b) { return a + splat_int(b); }
INLINE i32x16 operator-(i32x16 a, int32_t b) { return a + splat_int(-b); }
INLINE i32x16 operator<<(i32x16 a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
INLINE i32x16 operator&(i32x16 a, i32x16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
INLINE i32x16& operator&=(i32x16& a, i32x16 b) { return a = a & b; }
INLINE i32x16 operator>(i32x16 a, int32_t b) {
  const __m256i limit = _mm256_set1_epi32(b);
  return {_mm256_cmpgt_epi32(a.lo, limit), _mm256_cmpgt_epi32(a.hi, limit)};
}
INLINE i32x16 operator<(i32x16 a, int32_t b) {
  const __m256i limit = _mm256_set1_epi32(b);
  return {_mm256_cmpgt_epi32(limit, a.lo), _mm256_cmpgt_epi32(limit, a.hi)};
}
INLINE i32x16 operator<=(i32x16 a, int32_t b) { return a < b + 1; }  // b is a position: there is a next integer
INLINE u32x16 operator<<(u32x16 a, int n) { return {_mm256_slli_epi32(a.lo, n), _mm256_slli_epi32(a.hi, n)}; }
INLINE u32x16 operator&(u32x16 a, uint32_t b) {
  const __m256i bits = _mm256_set1_epi32((int32_t)b);
  return {_mm256_and_si256(a.lo, bits), _mm256_and_si256(a.hi, bits)};
}

INLINE u32x16 load_pairs(const bf16* p) {
  return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
}
INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
INLINE f32x16 load(const bf16* p) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1));
  return (f32x16)(u32x16{lo, hi} << 16);
}
INLINE void store(float* p, f32x16 v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
// Round to nearest even, as torch does; NaN stays NaN.
INLINE __m256i rounded(__m256 v) {
  const __m256i u = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
  const __m256i up = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(_mm256_srli_epi32(up, 16), _mm256_set1_epi32(0x7fc0), nan);
}
INLINE void store(bf16* p, f32x16 v) {
  const __m256i packed = _mm256_packus_epi32(rounded(v.lo), rounded(v.hi));  // 0 2 1 3, in quarters
  _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}

INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
INLINE i32x16 lanes() {
  return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_epi32(8, 9, 10, 11, 12, 13, 14, 15)};
}
INLINE f32x16 select(i32x16 mask, f32x16 a, f32x16 b) {  // mask lanes are 0 or -1
  return {_mm256_blendv_ps(b.lo, a.lo, _mm256_castsi256_ps(mask.lo)),
          _mm256_blendv_ps(b.hi, a.hi, _mm256_castsi256_ps(mask.hi))};
}
INLINE f32x16 to_floats(i32x16 v) { return {_mm256_cvtepi32_ps(v.lo), _mm256_cvtepi32_ps(v.hi)}; }
template <int H>
INLINE f32x16 swap_lanes(f32x16 v) {  // lane i becomes v[i ^ H]
  if constexpr (H == 8) return {v.hi, v.lo};
  else if constexpr (H == 4) return {_mm256_permute2f128_ps(v.lo, v.lo, 1), _mm256_permute2f128_ps(v.hi, v.hi, 1)};
  else return {_mm256_permute_ps(v.lo, H == 1 ? 0xb1 : 0x4e), _mm256_permute_ps(v.hi, H == 1 ? 0xb1 : 0x4e)};
}
INLINE void store_codes(int8_t* p, i32x16 v) {  // values fit 8 bits
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.lo, v.hi), 0xd8);
  _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
