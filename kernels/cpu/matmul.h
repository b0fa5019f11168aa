// Rows of activations times one panel (64 columns) of a packed weight matrix.
//
// A matrix is stored panel by panel, within a panel by pairs of input elements, so that a panel is one stream of memory:
//   F32   [panel][K][64] float
//   BF16  [panel][K/2][64][2] bfloat16
//   INT8  [panel][K/2][64][2] int8,   with scales [panel][K/group][64] float
//   INT4  [panel][K/2][32] uint16, nibble c of word 2j+i is column 16c+j, element i; codes index 16 bf16 levels; scales
// K is padded with zeros to a multiple of 64, N to whole panels. Quantized groups are decoded to bf16 pairs in the first
// cache level, once for all rows. With AVX-512 BF16 activations are bf16 and a pair is one instruction; elsewhere they are
// fp32 and weights are widened. Sums are fp32 over K in ascending order (for quantized ones, group by group), whatever the
// number of rows.
#pragma once

#include "vec.h"

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int PANEL = 64;
constexpr int TILE_ROWS = 64;  // rows of a task: 16 KiB of results stay in the first cache level
constexpr int MAX_GROUP = 128;

struct Matrix {
  const void* data;
  const float* scales;
  const float* bias;  // [n] or null
  const bf16* levels;  // INT4: 32 entries, the 16 levels twice
  int32_t n, k, kp, format, group;
  int32_t unused;

  int panels() const { return (n + PANEL - 1) / PANEL; }
};

constexpr int ROWS_AT_ONCE = 6;
#if defined(__AVX512F__)
constexpr int BLOCKS_AT_ONCE = 4;
#else
constexpr int BLOCKS_AT_ONCE = 1;
#endif

// tile [MR][64] (stride 64) = x [MR][2 * pairs] * w, or += scale * that if scale is given and this is not the first group.
template <int MR, int NB>
INLINE void finish(float* tile, f32x16 (&acc)[MR][NB], const float* scale, bool first) {
  for (int r = 0; r < MR; r++)
    for (int c = 0; c < NB; c++) {
      float* out = tile + r * PANEL + 16 * c;
      if (!scale) store(out, acc[r][c]);
      else if (first) store(out, acc[r][c] * load(scale + 16 * c));
      else store(out, fma(acc[r][c], load(scale + 16 * c), load(out)));
    }
}

#if NATIVE_BF16
template <int MR>
INLINE void multiply(const bf16* x, int stride, const bf16* w, int pairs, float* tile, const float* scale, bool first) {
  f32x16 acc[MR][4] = {};
  for (int p = 0; p < pairs; p++, w += 2 * PANEL) {
    __m512bh weight[4];
    for (int c = 0; c < 4; c++) weight[c] = (__m512bh)_mm512_loadu_si512(w + 32 * c);
    for (int r = 0; r < MR; r++) {
      int32_t pair;
      memcpy(&pair, x + r * stride + 2 * p, 4);
      __m512bh both = (__m512bh)_mm512_set1_epi32(pair);
      for (int c = 0; c < 4; c++) acc[r][c] = (f32x16)_mm512_dpbf16_ps((__m512)acc[r][c], both, weight[c]);
    }
  }
  finish<MR, 4>(tile, acc, scale, first);
}
#else
template <int MR>
INLINE void multiply(const bf16*, int, const bf16*, int, float*, const float*, bool) {
  __builtin_trap();  // bf16 activations need the instructions
}
#endif

template <int MR>
INLINE void multiply(const float* x, int stride, const bf16* w, int pairs, float* tile, const float* scale, bool first) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB] = {};
    for (int p = 0; p < pairs; p++)
      for (int c = 0; c < NB; c++) {
        u32x16 words = load_pairs(w + p * 2 * PANEL + 32 * (b + c));
        f32x16 even = (f32x16)(words << 16), odd = (f32x16)(words & 0xffff0000u);
        for (int r = 0; r < MR; r++) {
          acc[r][c] = fma(x[r * stride + 2 * p], even, acc[r][c]);
          acc[r][c] = fma(x[r * stride + 2 * p + 1], odd, acc[r][c]);
        }
      }
    finish<MR, NB>(tile + 16 * b, acc, scale ? scale + 16 * b : nullptr, first);
  }
}

template <int MR>
INLINE void multiply(const float* x, int stride, const float* w, int pairs, float* tile, const float*, bool) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB] = {};
    for (int k = 0; k < 2 * pairs; k++)
      for (int c = 0; c < NB; c++) {
        f32x16 weight = load(w + k * PANEL + 16 * (b + c));
        for (int r = 0; r < MR; r++) acc[r][c] = fma(x[r * stride + k], weight, acc[r][c]);
      }
    finish<MR, NB>(tile + 16 * b, acc, nullptr, true);
  }
}

template <class A, class W>
static void multiply_rows(const A* x, int stride, int rows, const W* w, int pairs, float* tile, const float* scale,
                          bool first) {
  int r = 0;
  for (; r + ROWS_AT_ONCE <= rows; r += ROWS_AT_ONCE)
    multiply<ROWS_AT_ONCE>(x + r * stride, stride, w, pairs, tile + r * PANEL, scale, first);
  x += r * stride;
  tile += r * PANEL;
  switch (rows - r) {
    case 1: return multiply<1>(x, stride, w, pairs, tile, scale, first);
    case 2: return multiply<2>(x, stride, w, pairs, tile, scale, first);
    case 3: return multiply<3>(x, stride, w, pairs, tile, scale, first);
    case 4: return multiply<4>(x, stride, w, pairs, tile, scale, first);
    case 5: return multiply<5>(x, stride, w, pairs, tile, scale, first);
  }
}

// 32 int8 -> 32 bf16; every int8 is exact in bf16.
INLINE void decode_int8(const int8_t* in, bf16* out) {
#if NATIVE_BF16
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)in)));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)(in + 16))));
  __m512bh packed = _mm512_cvtne2ps_pbh(high, low);
  memcpy(out, &packed, 64);
#else
  for (int i = 0; i < 32; i++) out[i] = to_bf16((float)in[i]);
#endif
}

// 32 words of 4 nibbles -> 4 blocks of 32 bf16.
INLINE void decode_int4(const uint16_t* in, const bf16* levels, bf16* out) {
#if NATIVE_BF16
  __m512i table = _mm512_loadu_si512(levels), words = _mm512_loadu_si512(in);  // indices use 5 bits: levels stand twice
  _mm512_storeu_si512(out, _mm512_permutexvar_epi16(words, table));
  _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4), table));
  _mm512_storeu_si512(out + 64, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 8), table));
  _mm512_storeu_si512(out + 96, _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 12), table));
#else
  for (int c = 0; c < 4; c++)
    for (int i = 0; i < 32; i++) out[32 * c + i] = levels[(in[i] >> (4 * c)) & 15];
#endif
}

// tile [rows][64] = x [rows][kp] * panel `panel` of m, without bias; rows <= TILE_ROWS.
template <class A>
static void multiply_panel(const Matrix& m, int panel, const A* x, int rows, float* tile) {
  const size_t pairs = m.kp / 2;
  if (m.format == F32) {
    if constexpr (sizeof(A) == 4)
      multiply_rows(x, m.kp, rows, (const float*)m.data + panel * pairs * 2 * PANEL, pairs, tile, nullptr, true);
    else
      __builtin_trap();
    return;
  }
  if (m.format == BF16) {
    multiply_rows(x, m.kp, rows, (const bf16*)m.data + panel * pairs * 2 * PANEL, pairs, tile, nullptr, true);
    return;
  }
  alignas(64) bf16 decoded[MAX_GROUP * PANEL];
  const int num_groups = m.kp / m.group, half = m.group / 2;
  for (int g = 0; g < num_groups; g++) {
    const size_t first_pair = panel * pairs + g * half;
    if (m.format == INT8) {
      const int8_t* in = (const int8_t*)m.data + first_pair * 2 * PANEL;
      for (int i = 0; i < half * 4; i++) decode_int8(in + 32 * i, decoded + 32 * i);
    } else {
      const uint16_t* in = (const uint16_t*)m.data + first_pair * 32;
      for (int p = 0; p < half; p++) decode_int4(in + 32 * p, m.levels, decoded + 2 * PANEL * p);
    }
    const float* scale = m.scales + ((size_t)panel * num_groups + g) * PANEL;
    multiply_rows(x + g * m.group, m.kp, rows, decoded, half, tile, scale, g == 0);
  }
}
