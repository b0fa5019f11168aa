// Products of 8-bit integers: 4 inputs of a row times 4 inputs of 16 columns, added to 16 sums of 32 bits.
//
// Activations are signed, -127 to 127; weights are stored as unsigned, 128 above their value (-127 to 127), because that is what
// the instructions multiply: VPDPBUSD and TDPBSUD take an unsigned and a signed operand. So a sum is 128 times the row's own
// sum too large where WEIGHT_ZERO is 128; elsewhere the weights' signs are restored. Nothing saturates, and integers that wrap
// around come back: sums are exact up to 131,072 inputs, whatever their order.
#pragma once

#include "vec.h"

#if defined(__AVX512F__) && defined(__AVX512VNNI__)
#define INT8_PRODUCTS "AVX-512 VNNI"
constexpr int WEIGHT_ZERO = 128;
typedef __m512i Weights8;
typedef __m512i Acts8;
INLINE Weights8 load_weights(const uint8_t* w) { return _mm512_loadu_si512(w); }
INLINE Acts8 splat_quad(const int8_t* x) {
  int32_t quad;
  memcpy(&quad, x, 4);
  return _mm512_set1_epi32(quad);
}
INLINE i32x16 add_products(i32x16 sum, Acts8 x, Weights8 w) { return (i32x16)_mm512_dpbusd_epi32((__m512i)sum, w, x); }

#elif defined(__AVX512F__)
#define INT8_PRODUCTS "pairs of 16-bit integers (AVX-512)"
constexpr int WEIGHT_ZERO = 0;
struct Weights8 {
  __m512i even, odd;  // inputs of each pair, as 16 bits
};
typedef Weights8 Acts8;
INLINE Weights8 widen(__m512i v) { return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)}; }
INLINE Weights8 load_weights(const uint8_t* w) {
  return widen(_mm512_xor_si512(_mm512_loadu_si512(w), _mm512_set1_epi8((char)128)));
}
INLINE Acts8 splat_quad(const int8_t* x) {
  int32_t quad;
  memcpy(&quad, x, 4);
  return widen(_mm512_set1_epi32(quad));
}
INLINE i32x16 add_products(i32x16 sum, Acts8 x, const Weights8& w) {
  const __m512i products = _mm512_add_epi32(_mm512_madd_epi16(x.even, w.even), _mm512_madd_epi16(x.odd, w.odd));
  return (i32x16)_mm512_add_epi32((__m512i)sum, products);
}

#elif defined(__AVX2__) && defined(__FMA__) && defined(__AVXVNNI__)
#define INT8_PRODUCTS "AVX-VNNI"
constexpr int WEIGHT_ZERO = 128;
struct Weights8 {
  __m256i lo, hi;
};
typedef __m256i Acts8;
INLINE Weights8 load_weights(const uint8_t* w) {
  return {_mm256_loadu_si256((const __m256i*)w), _mm256_loadu_si256((const __m256i*)w + 1)};
}
INLINE Acts8 splat_quad(const int8_t* x) {
  int32_t quad;
  memcpy(&quad, x, 4);
  return _mm256_set1_epi32(quad);
}
INLINE i32x16 add_products(i32x16 sum, Acts8 x, const Weights8& w) {
  return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, x), _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x)};
}

#elif defined(__AVX2__) && defined(__FMA__)
#define INT8_PRODUCTS "pairs of 16-bit integers (AVX2)"
constexpr int WEIGHT_ZERO = 0;
struct Acts8 {
  __m256i even, odd;  // inputs of each pair, as 16 bits
};
struct Weights8 {
  Acts8 lo, hi;
};
INLINE Acts8 widen(__m256i v) { return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)}; }
INLINE Weights8 load_weights(const uint8_t* w) {
  const __m256i zero = _mm256_set1_epi8((char)128), *from = (const __m256i*)w;
  return {widen(_mm256_xor_si256(_mm256_loadu_si256(from), zero)), widen(_mm256_xor_si256(_mm256_loadu_si256(from + 1), zero))};
}
INLINE Acts8 splat_quad(const int8_t* x) {
  int32_t quad;
  memcpy(&quad, x, 4);
  return widen(_mm256_set1_epi32(quad));
}
INLINE __m256i add_half(__m256i sum, const Acts8& x, const Acts8& w) {
  return _mm256_add_epi32(_mm256_add_epi32(sum, _mm256_madd_epi16(x.even, w.even)), _mm256_madd_epi16(x.odd, w.odd));
}
INLINE i32x16 add_products(i32x16 sum, const Acts8& x, const Weights8& w) {
  return {add_half(sum.lo, x, w.lo), add_half(sum.hi, x, w.hi)};
}

#elif defined(__aarch64__)
constexpr int WEIGHT_ZERO = 0;
struct Weights8 {
  int8x16_t a, b, c, d;
};
typedef int8x16_t Acts8;
INLINE Weights8 load_weights(const uint8_t* w) {
  const uint8x16_t zero = vdupq_n_u8(128);
#define SIGNED(i) vreinterpretq_s8_u8(veorq_u8(vld1q_u8(w + 16 * i), zero))
  return {SIGNED(0), SIGNED(1), SIGNED(2), SIGNED(3)};
#undef SIGNED
}
INLINE Acts8 splat_quad(const int8_t* x) {
  int32_t quad;
  memcpy(&quad, x, 4);
  return vreinterpretq_s8_s32(vdupq_n_s32(quad));
}
#if defined(__ARM_FEATURE_DOTPROD)
#define INT8_PRODUCTS "SDOT"
INLINE int32x4_t add_quarter(int32x4_t sum, int8x16_t x, int8x16_t w) { return vdotq_s32(sum, x, w); }
#else
#define INT8_PRODUCTS "pairs of 16-bit integers (NEON)"
INLINE int32x4_t add_quarter(int32x4_t sum, int8x16_t x, int8x16_t w) {
  const int32x4_t first = vpaddlq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(w)));
  return vaddq_s32(sum, vpaddq_s32(first, vpaddlq_s16(vmull_high_s8(x, w))));
}
#endif
INLINE i32x16 add_products(i32x16 sum, Acts8 x, const Weights8& w) {
  return {add_quarter(sum.a, x, w.a), add_quarter(sum.b, x, w.b), add_quarter(sum.c, x, w.c), add_quarter(sum.d, x, w.d)};
}

#else
#define INT8_PRODUCTS "the compiler's own"
constexpr int WEIGHT_ZERO = 0;
typedef const uint8_t* Weights8;
typedef const int8_t* Acts8;
INLINE Weights8 load_weights(const uint8_t* w) { return w; }
INLINE Acts8 splat_quad(const int8_t* x) { return x; }
INLINE i32x16 add_products(i32x16 sum, Acts8 x, Weights8 w) {
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 4; k++) sum[i] += x[k] * (w[4 * i + k] - 128);
  return sum;
}
#endif

// 4-bit weights: of each 16 inputs of a column, weight = step * code + offset in whole numbers within -127 to 127, codes 0 to 15,
// step 1 to 16. Codes of 4 inputs lie as [2][64] bytes: lower halves of byte 4 i + k are column i (upper: 16 + i) of the
// first or second 32, input k. `groups` [64][2] are steps (uint8) and offsets (int8).
constexpr int GROUP_QUADS = 4, CODE_BYTES = 128, GROUP_BYTES = 128;  // 16 inputs; bytes of 4 inputs, and of a group's numbers

// 64 columns x `quads` (whole groups) times 4 inputs, as the 8-bit weights that are multiplied: [quads][64][4]. As many of the
// `next` groups are asked for meanwhile.
static void decode_int4(const uint8_t* codes, const uint8_t* groups, int quads, uint8_t* out, const uint8_t* next) {
  for (int first = 0; first < quads; first += GROUP_QUADS, groups += GROUP_BYTES, next += GROUP_BYTES) {
    for (int i = 0; i < GROUP_BYTES; i += 64) __builtin_prefetch(next + i, 0, 3);
#if defined(__AVX512F__)
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i to_both = _mm512_set1_epi32((int)0x80008000), to_all = _mm512_set1_epi32(0x01010101);
    const __m512i lanes = _mm512_broadcast_i32x4(_mm_setr_epi32(0, 0x04040404, 0x08080808, 0x0c0c0c0c));
    __m512i steps[4], offsets[4];
    for (int c = 0; c < 4; c++) {
      const __m512i both = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(groups + 32 * c)));
      steps[c] = _mm512_shuffle_epi8(both, _mm512_or_si512(to_both, _mm512_and_si512(lanes, _mm512_set1_epi16(0xff))));
      offsets[c] = _mm512_xor_si512(_mm512_shuffle_epi8(both, _mm512_add_epi8(to_all, lanes)), _mm512_set1_epi8((char)128));
    }
    for (int q = 0; q < GROUP_QUADS; q++, codes += CODE_BYTES, out += 256)
      for (int half = 0; half < 2; half++) {
        const __m512i given = _mm512_loadu_si512(codes + 64 * half);
        const __m512i parts[2] = {_mm512_and_si512(given, low), _mm512_and_si512(_mm512_srli_epi16(given, 4), low)};
        for (int part = 0; part < 2; part++) {  // step * code is below 256: a multiplication for two of them
          const int c = 2 * half + part;
          _mm512_storeu_si512(out + 64 * c, _mm512_add_epi8(_mm512_mullo_epi16(parts[part], steps[c]), offsets[c]));
        }
      }
#else
    uint8_t steps[256], offsets[256];
    for (int i = 0; i < 256; i++) steps[i] = groups[i / 4 * 2], offsets[i] = groups[i / 4 * 2 + 1] + 128;
    for (int q = 0; q < GROUP_QUADS; q++, codes += CODE_BYTES, out += 256)
      for (int half = 0; half < 256; half += 128)
        for (int i = 0; i < 64; i++) {
          const uint8_t both = codes[half / 2 + i];
          out[half + i] = (both & 15) * steps[half + i] + offsets[half + i];
          out[half + 64 + i] = (both >> 4) * steps[half + 64 + i] + offsets[half + 64 + i];
        }
#endif
  }
}

#if defined(__AVX512VNNI__) && defined(__AVX512F__)
// sums [64] = x [4 * quads] times 64 columns of 4-bit weights that are not decoded: of a group, step * (codes . x) + offset * sum
// of x. Both factors fit 16 bits, so that VPDPWSSD does that for 16 columns. `zero` is added to all.
template <class Next>
static void multiply_1_int4(const int8_t* x, const uint8_t* codes, const uint8_t* groups, int quads, int32_t zero, int32_t* sums,
                            Next&& ahead) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0), ones = _mm512_set1_epi8(1);
  __m512i sum[4];
  for (int c = 0; c < 4; c++) sum[c] = _mm512_set1_epi32(zero);
  for (int first = 0; first < quads; first += GROUP_QUADS, groups += GROUP_BYTES) {
    __m512i dots[4] = {}, total = {};
    for (int q = 0; q < GROUP_QUADS; q++, codes += CODE_BYTES, x += 4) {
      ahead.step();
      const __m512i acts = splat_quad(x);
      total = _mm512_dpbusd_epi32(total, ones, acts);
      for (int half = 0; half < 2; half++) {
        const __m512i given = _mm512_loadu_si512(codes + 64 * half);
        dots[2 * half] = _mm512_dpbusd_epi32(dots[2 * half], _mm512_and_si512(given, low), acts);
        dots[2 * half + 1] = _mm512_dpbusd_epi32(dots[2 * half + 1], _mm512_and_si512(given, high), acts);
      }
    }
    total = _mm512_slli_epi32(total, 16);
    for (int c = 0; c < 4; c++) {
      if (c % 2) dots[c] = _mm512_srai_epi32(dots[c], 4);  // upper halves count 16 times
      const __m512i numbers = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)(groups + 32 * c)));
      sum[c] = _mm512_dpwssd_epi32(sum[c], _mm512_mask_blend_epi16(0xaaaaaaaa, dots[c], total), numbers);
    }
  }
  for (int c = 0; c < 4; c++) _mm512_storeu_si512(sums + 16 * c, sum[c]);
}
#endif
