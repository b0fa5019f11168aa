// Attention of ragged queries over the paged KV cache: prefill chunks, decodes and verifications alike.
//
// Keys are stored in tiles of 16 consecutive KV positions, transposed, so that 16 scores come from one pass over the
// head's elements: fp32 [tile][Hkv][D][16], bf16 in pairs [tile][Hkv][D/2][16][2]. Values are [KV position][Hkv][D]. A
// block is a multiple of 16 positions. Scores of a row are kept whole, then one softmax, then the sum over values in
// ascending position: the result of a row does not depend on how rows were cut into steps.
#pragma once

#include "vec.h"

constexpr int KEYS = 16;
constexpr int QUERIES = 6;  // query vectors that share a pass over K and V

INLINE float* key_place(float* cache, int64_t kv_pos, int head, int num_heads, int dim, int d) {
  return cache + (((kv_pos / KEYS) * num_heads + head) * dim + d) * KEYS + kv_pos % KEYS;
}
INLINE bf16* key_place(bf16* cache, int64_t kv_pos, int head, int num_heads, int dim, int d) {
  return cache + ((((kv_pos / KEYS) * num_heads + head) * (dim / 2) + d / 2) * KEYS + kv_pos % KEYS) * 2 + d % 2;
}

template <class T>
INLINE void store_key(T* cache, int64_t kv_pos, int head, int num_heads, int dim, const float* k) {
  for (int d = 0; d < dim; d++) from_float(key_place(cache, kv_pos, head, num_heads, dim, d), k[d]);
}

// Scores of NQ query vectors q [NQ][dim] with the 16 keys of a tile.
template <int NQ>
INLINE void tile_scores(const float* q, const float* tile, int dim, f32x16* out) {
  f32x16 acc[NQ] = {};
  for (int d = 0; d < dim; d++) {
    f32x16 keys = load(tile + d * KEYS);
    for (int i = 0; i < NQ; i++) acc[i] = fma(q[i * dim + d], keys, acc[i]);
  }
  for (int i = 0; i < NQ; i++) out[i] = acc[i];
}
template <int NQ>
INLINE void tile_scores(const bf16* q, const bf16* tile, int dim, f32x16* out) {
  f32x16 acc[NQ] = {};
#if NATIVE_BF16
  for (int d = 0; d < dim; d += 2) {
    __m512bh keys = (__m512bh)_mm512_loadu_si512(tile + d * KEYS);
    for (int i = 0; i < NQ; i++) {
      int32_t pair;
      memcpy(&pair, q + i * dim + d, 4);
      acc[i] = (f32x16)_mm512_dpbf16_ps((__m512)acc[i], (__m512bh)_mm512_set1_epi32(pair), keys);
    }
  }
#endif
  for (int i = 0; i < NQ; i++) out[i] = acc[i];
}

// out [NQ][dim] = sum over positions first..last of probs [NQ][stride] (from `first`) times values.
template <int NQ, class T>
INLINE void weigh_values(const T* cache, const int32_t* table, int block_size, int num_heads, int head, int dim, int first,
                         int last, const float* probs, int stride, float* out) {
  const size_t step = (size_t)num_heads * dim;
  for (int d0 = 0; d0 < dim; d0 += 64) {
    const int width = dim - d0 < 64 ? dim - d0 : 64;
    f32x16 acc[NQ][4] = {};
    for (int start = first; start <= last;) {
      const int block = start / block_size, offset = start % block_size;
      const int end = (block + 1) * block_size - 1 < last ? (block + 1) * block_size - 1 : last;
      const T* v = cache + ((size_t)table[block] * block_size + offset) * step + (size_t)head * dim + d0;
      for (int p = start; p <= end; p++, v += step) {
        f32x16 value[4];
        if (width == 64) {
          for (int c = 0; c < 4; c++) value[c] = load(v + 16 * c);
        } else {
          for (int c = 0; c < 4; c++) value[c] = 16 * c < width ? load_n(v + 16 * c, width - 16 * c) : f32x16{};
        }
        for (int i = 0; i < NQ; i++) {
          const float weight = probs[i * stride + p - first];
          for (int c = 0; c < 4; c++) acc[i][c] = fma(weight, value[c], acc[i][c]);
        }
      }
      start = end + 1;
    }
    for (int i = 0; i < NQ; i++)
      for (int c = 0; 16 * c < width; c++) store_n(out + i * dim + d0 + 16 * c, acc[i][c], width - 16 * c);
  }
}

// NQ query vectors of one sequence and one KV head; vector i stands at position positions[i] (ascending).
// scores: room for NQ * (positions[NQ - 1] + 33) floats. out [NQ][dim].
template <int NQ, class T>
static void attend(const T* q, const T* k_cache, const T* v_cache, const int32_t* table, int block_size, int num_heads,
                   int head, int dim, const int* positions, int window, float scale, float* scores, float* out) {
  const int last = positions[NQ - 1];
  const int oldest = window && positions[0] - window + 1 > 0 ? positions[0] - window + 1 : 0;
  const int first = oldest / KEYS * KEYS;
  const int stride = (last - first) / KEYS * KEYS + KEYS;
  f32x16 best[NQ];
  for (int i = 0; i < NQ; i++) best[i] = splat(-INFINITY);
  for (int p = first; p <= last; p += KEYS) {
    const int64_t kv_pos = (int64_t)table[p / block_size] * block_size + p % block_size;
    f32x16 tile[NQ];
    tile_scores<NQ>(q, k_cache + ((kv_pos / KEYS) * num_heads + head) * dim * KEYS, dim, tile);
    for (int i = 0; i < NQ; i++) {
      i32x16 key = lanes() + p;
      i32x16 seen = key <= positions[i];
      if (window) seen &= key > positions[i] - window;
      f32x16 score = select(seen, tile[i] * scale, splat(-INFINITY));
      best[i] = vmax(best[i], score);
      store(scores + i * stride + p - first, score);
    }
  }
  for (int i = 0; i < NQ; i++) {
    const float top = max_lane(best[i]);
    f32x16 total = {};
    for (int p = 0; p < stride; p += KEYS) {
      f32x16 score = load(scores + i * stride + p);
      f32x16 weight = select(score == splat(-INFINITY), splat(0.0f), vexp(score - top));
      total += weight;
      store(scores + i * stride + p, weight);
    }
    const f32x16 scaled = splat(1.0f / sum(total));
    for (int p = 0; p < stride; p += KEYS) store(scores + i * stride + p, load(scores + i * stride + p) * scaled);
  }
  weigh_values<NQ>(v_cache, table, block_size, num_heads, head, dim, first, last, scores, stride, out);
}

template <class T>
static void attend_any(int num, const T* q, const T* k_cache, const T* v_cache, const int32_t* table, int block_size,
                       int num_heads, int head, int dim, const int* positions, int window, float scale, float* scores,
                       float* out) {
#define CASE(N)                                                                                                     \
  case N:                                                                                                           \
    return attend<N>(q, k_cache, v_cache, table, block_size, num_heads, head, dim, positions, window, scale, scores, \
                     out);
  switch (num) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
#undef CASE
}
