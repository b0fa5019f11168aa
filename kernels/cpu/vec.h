// Vectors of 16 floats and the few operations that the kernels need, for any CPU that GCC or clang knows.
//
// Written with the compilers' vector extension; intrinsics stand only where the extension cannot say what is meant. AVX2
// and NEON have types of their own (vec_avx2.h, vec_neon.h). What instructions there are say the compiler's macros, whether
// those for bf16 and tiles are used SPECSERVE_LEVEL, a number of kernels/native_levels.py. Invariant: every reduction has a
// fixed order that does not depend on how many rows a step has, so that a row's result is the same bits in every batch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__FMA__)
#include <immintrin.h>
#endif
#define NATIVE_BF16 (SPECSERVE_LEVEL >= 3)
#define NATIVE_AMX (SPECSERVE_LEVEL >= 4)

#define INLINE static inline __attribute__((always_inline))
#define INLINE_METHOD inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

typedef uint16_t bf16;

// Round to nearest even, as torch does; NaN stays NaN.
INLINE bf16 to_bf16(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  if (v != v) return 0x7fc0;
  return (bf16)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

#if defined(__AVX2__) && defined(__FMA__) && !defined(__AVX512F__)
#include "vec_avx2.h"
#elif defined(__aarch64__)
#include "vec_neon.h"
#else
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef float f32x16_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t u32x16_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t u16x16_any __attribute__((vector_size(32), aligned(2), may_alias));

INLINE u32x16 load_pairs(const bf16* p) { return *(const u32x16_any*)p; }
INLINE f32x16 load(const float* p) { return *(const f32x16_any*)p; }
INLINE f32x16 load(const bf16* p) {
  return (f32x16)(__builtin_convertvector(*(const u16x16_any*)p, u32x16) << 16);
}
INLINE void store(float* p, f32x16 v) { *(f32x16_any*)p = v; }

INLINE void store(bf16* p, f32x16 v) {
#if NATIVE_BF16
  __m256bh packed = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &packed, 32);
#else
  u32x16 u = (u32x16)v;
  u32x16 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  u32x16 nan = (u32x16)(v != v);
  rounded = (nan & 0x7fc0) | (~nan & rounded);
  *(u16x16_any*)p = __builtin_convertvector(rounded, u16x16);
#endif
}
INLINE f32x16 splat(float v) { return f32x16{} + v; }
// a * b + c. Said with intrinsics, and -ffp-contract=off elsewhere: whether the compiler fuses would depend on the code
// around, which differs between numbers of rows.
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;
#endif
}
INLINE i32x16 splat_int(int32_t v) { return i32x16{} + v; }
INLINE f32x16 to_floats(i32x16 v) { return __builtin_convertvector(v, f32x16); }
INLINE i32x16 lanes() { return i32x16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
// Lane i becomes v[i ^ H].
template <int H>
INLINE f32x16 swap_lanes(f32x16 v) {
#if defined(__AVX512F__)
  if constexpr (H < 4) return (f32x16)_mm512_permute_ps((__m512)v, H == 1 ? 0xb1 : 0x4e);
  else return (f32x16)_mm512_shuffle_f32x4((__m512)v, (__m512)v, H == 4 ? 0xb1 : 0x4e);
#else
  f32x16 swapped;
  for (int i = 0; i < 16; i++) swapped[i] = v[i ^ H];
  return swapped;
#endif
}
INLINE void store_codes(int8_t* p, i32x16 v) {  // values fit 8 bits
#if defined(__AVX512F__)
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)v));
#else
  for (int i = 0; i < 16; i++) p[i] = (int8_t)v[i];
#endif
}
INLINE f32x16 select(i32x16 mask, f32x16 a, f32x16 b) { return mask ? a : b; }  // mask lanes are 0 or -1
#endif

// With bf16 instructions: 32 values of which lane i of a sum takes the pair 2i, 2i + 1.
#if NATIVE_BF16 && defined(__AVX512F__)
typedef __m512bh bf16x32;
INLINE bf16x32 load_bf16(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
INLINE bf16x32 load_bf16_n(const bf16* p, int pairs) {  // zeros behind the first so many pairs
  const __mmask16 taken = pairs >= 16 ? 0xffff : pairs > 0 ? (1 << pairs) - 1 : 0;
  return (__m512bh)_mm512_maskz_loadu_epi32(taken, p);
}
INLINE bf16x32 splat_pair(const bf16* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return (__m512bh)_mm512_set1_epi32(pair);
}
INLINE f32x16 add_dots(f32x16 sum, bf16x32 a, bf16x32 b) { return (f32x16)_mm512_dpbf16_ps((__m512)sum, a, b); }
#endif

INLINE float to_float(float v) { return v; }
INLINE float to_float(bf16 v) {
  uint32_t u = (uint32_t)v << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}
INLINE void from_float(float* p, float v) { *p = v; }
INLINE void from_float(bf16* p, float v) { *p = to_bf16(v); }

// The first n (at most 16) values, zeros behind them.
template <class T>
INLINE f32x16 load_n(const T* p, int n) {
  if (n >= 16) return load(p);
  float values[16] = {};
  for (int i = 0; i < n; i++) values[i] = to_float(p[i]);
  return load(values);
}
template <class T>
INLINE void store_n(T* p, f32x16 v, int n) {
  if (n >= 16) return store(p, v);
  float values[16];
  store(values, v);
  for (int i = 0; i < n; i++) from_float(p + i, values[i]);
}

INLINE f32x16 fma(float a, f32x16 b, f32x16 c) { return fma(splat(a), b, c); }
#if defined(__AVX512F__)  // the same in one instruction: b where one of both is NaN
INLINE f32x16 vmax(f32x16 a, f32x16 b) { return (f32x16)_mm512_max_ps((__m512)a, (__m512)b); }
INLINE f32x16 vmin(f32x16 a, f32x16 b) { return (f32x16)_mm512_min_ps((__m512)a, (__m512)b); }
#else
INLINE f32x16 vmax(f32x16 a, f32x16 b) { return select(a > b, a, b); }
INLINE f32x16 vmin(f32x16 a, f32x16 b) { return select(a < b, a, b); }
#endif

INLINE float sum(f32x16 v) {
#if defined(__AVX512F__)  // the same sums
  const __m256 s = _mm256_add_ps(_mm512_castps512_ps256((__m512)v),
                                 _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd((__m512)v), 1)));
  const __m128 t = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
  const __m128 u = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(u, _mm_movehdup_ps(u)));
#else
  float a[16];
  store(a, v);
  float s[8];
  for (int i = 0; i < 8; i++) s[i] = a[i] + a[i + 8];
  return ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]));
#endif
}
INLINE float max_lane(f32x16 v) {
#if defined(__AVX512F__)
  v = vmax(v, swap_lanes<8>(v));
  v = vmax(v, swap_lanes<4>(v));
  v = vmax(v, swap_lanes<2>(v));
  return vmax(v, swap_lanes<1>(v))[0];
#else
  float a[16], m;
  store(a, v);
  m = a[0];
  for (int i = 1; i < 16; i++) m = a[i] > m ? a[i] : m;
  return m;
#endif
}

// e^x to about 2 ulp for x in [-87, 88], clamped outside, NaN for NaN; the polynomial is Cephes' expf.
INLINE f32x16 vexp(f32x16 given) {
  f32x16 x = vmin(vmax(given, splat(-87.0f)), splat(88.0f));
  f32x16 n = fma(1.44269504f, x, splat(12582912.0f));  // rounds to an integer in the low mantissa bits
  i32x16 exponent = (i32x16)n - 0x4b400000;
  n = n - 12582912.0f;
  f32x16 r = fma(2.12194440e-4f, n, fma(-0.693359375f, n, x));
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.0f;
  return select(given == given, (f32x16)((i32x16)p + (exponent << 23)), given);
}
INLINE f32x16 sigmoid(f32x16 x) { return 1.0f / (1.0f + vexp(-x)); }
INLINE f32x16 silu(f32x16 x) { return x * sigmoid(x); }
INLINE f32x16 vtanh(f32x16 x) { return 2.0f * sigmoid(2.0f * x) - 1.0f; }
INLINE f32x16 gelu_tanh(f32x16 x) {
  return 0.5f * x * (1.0f + vtanh(0.7978845608f * (x + 0.044715f * x * x * x)));
}
