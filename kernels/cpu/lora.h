// SGMV and BGMV on the CPU: each row's own adapter, read where it lies; nothing is stacked, padded or copied.
//
// Semantics for row t with adapter slot a(t) and module m: y[t] += scale * (x[t] A^T) B^T, A in blocks of 8, 4
// or 1 rows, [K/32][rows][32] each, and B in the panels of 64 columns that the base matrix has, [panel][R][64], so that each
// task reads one stream of memory. Shrink and expand have the row's own rank and skip modules that its adapter does not target.
// Sums are fp32 in an order that depends on K and R only, so a row gets the same bits in every batch.
#pragma once

#include "amx.h"
#include "vec.h"

struct Lora {
  const void* a;  // [blocks of rows][k / 32][rows][32] in the weights' dtype; null where the module is not targeted
  const void* b;  // [panel][rank][64]
  int32_t rank;
  float scale;
};

// NR dot products of x [k] with rows of a [NR][k].
template <int NR, class X, class W>
INLINE void dots(const W* a, int k, const X* x, float scale, float* h) {
  f32x16 acc[NR] = {};
  int i = 0;
#if NATIVE_BF16
  if constexpr (sizeof(X) == 2 && sizeof(W) == 2) {
    for (; i + 32 <= k; i += 32)
      for (int r = 0; r < NR; r++) acc[r] = add_dots(acc[r], load_bf16(a + (size_t)r * k + i), load_bf16(x + i));
  }
#endif
  for (; i + 16 <= k; i += 16)
    for (int r = 0; r < NR; r++) acc[r] = fma(load(a + (size_t)r * k + i), load(x + i), acc[r]);
  if (i < k)
    for (int r = 0; r < NR; r++) acc[r] = fma(load_n(a + (size_t)r * k + i, k - i), load_n(x + i, k - i), acc[r]);
  for (int r = 0; r < NR; r++) h[r] = scale * sum(acc[r]);
}

// NX rows that share an adapter go over its weights together; no sum changes by that. Fewer registers hold one at a time.
#if defined(__AVX512F__)
constexpr int SHRINK_ROWS = 2, EXPAND_ROWS = 4;
#else
constexpr int SHRINK_ROWS = 1, EXPAND_ROWS = 1;
#endif

// h [NX][h_stride] = the same for NX rows x and a block of rows a [k / 32][NR][32]; x lie as activations do (amx.h), x_step from 32
// columns to the next, padded with zeros to k, a multiple of 32.
template <int NR, int NX, class T>
INLINE void block_dots(const T* a, int k, const T* const* x, size_t x_step, float scale, float* h, size_t h_stride) {
  f32x16 acc[NX][NR] = {};
  size_t place = 0;
  for (int i = 0; i < k; i += 32, a += 32 * NR, place += x_step) {
#if NATIVE_BF16
    if constexpr (sizeof(T) == 2) {
      for (int r = 0; r < NR; r++) {
        const auto weight = load_bf16(a + 32 * r);
        for (int n = 0; n < NX; n++) acc[n][r] = add_dots(acc[n][r], weight, load_bf16(x[n] + place));
      }
      continue;
    }
#endif
    for (int half = 0; half < 32; half += 16)
      for (int r = 0; r < NR; r++)
        for (int n = 0; n < NX; n++) acc[n][r] = fma(load(a + 32 * r + half), load(x[n] + place + half), acc[n][r]);
  }
  for (int n = 0; n < NX; n++)
    for (int r = 0; r < NR; r++) h[n * h_stride + r] = scale * sum(acc[n][r]);
}

// h [NX][rank] = scale * A x
template <int NX, class T>
static void shrink(const Lora& lora, const T* const* x, size_t x_step, int k, float* h, size_t h_stride) {
  const T* a = (const T*)lora.a;
  const int padded = (k + 31) / 32 * 32;
  int r = 0;
  for (; r + 8 <= lora.rank; r += 8)
    block_dots<8, NX>(a + (size_t)r * padded, padded, x, x_step, lora.scale, h + r, h_stride);
  for (; r + 4 <= lora.rank; r += 4)
    block_dots<4, NX>(a + (size_t)r * padded, padded, x, x_step, lora.scale, h + r, h_stride);
  for (; r < lora.rank; r++) block_dots<1, NX>(a + (size_t)r * padded, padded, x, x_step, lora.scale, h + r, h_stride);
}

// y [NX][64] += h [NX][rank] * B, a panel [rank][64]
template <int NX, class W>
static void expand_panel(const W* b, int rank, const float* h, size_t h_stride, float* y) {
  f32x16 acc[NX][4];
  for (int n = 0; n < NX; n++)
    for (int c = 0; c < 4; c++) acc[n][c] = load(y + n * 64 + 16 * c);
  for (int r = 0; r < rank; r++, b += 64)
    for (int c = 0; c < 4; c++) {
      const f32x16 weight = load(b + 16 * c);
      for (int n = 0; n < NX; n++) acc[n][c] = fma(h[n * h_stride + r], weight, acc[n][c]);
    }
  for (int n = 0; n < NX; n++)
    for (int c = 0; c < 4; c++) store(y + n * 64 + 16 * c, acc[n][c]);
}

// y [64] += h [rank] * B, B [rank][num] with `stride` from row to row; num <= 64
template <class W>
static void expand(const W* b, size_t stride, int rank, const float* h, int num, float* y) {
  if (num == 64) {
    f32x16 acc[4];
    for (int c = 0; c < 4; c++) acc[c] = load(y + 16 * c);
    for (int r = 0; r < rank; r++)
      for (int c = 0; c < 4; c++) acc[c] = fma(h[r], load(b + r * stride + 16 * c), acc[c]);
    for (int c = 0; c < 4; c++) store(y + 16 * c, acc[c]);
    return;
  }
  for (int c = 0; c < num; c += 16) {
    f32x16 acc = load(y + c);
    for (int r = 0; r < rank; r++) acc = fma(h[r], load_n(b + r * stride + c, num - c), acc);
    store(y + c, acc);
  }
}
