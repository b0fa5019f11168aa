// Attention of ragged queries over the paged KV cache: prefill chunks, decodes and verifications alike.
//
// Keys and values lie in tiles of 16 consecutive KV positions, [tile][Hkv][16 * D], so that a head's part is one piece:
// keys transposed, fp32 [D][16] or bf16 in pairs of elements [D/2][16][2]; values fp32 [16][D] or bf16 in pairs of
// positions [8][D][2]. A block is a multiple of 16 positions.
//
// A context is cut into splits of 256 positions. Of each a query has a largest score, the sum of its weights and their
// sum of values, relative to that score; in ascending order they become one (merge). The cuts depend on positions
// alone, so that the result of a query is the same bits whoever computes its splits: one thread or several, for one
// query or many.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vec.h"

constexpr int KEYS = 16;
constexpr int SPLIT = 256;
constexpr int QUERIES = 64;  // query vectors of a task, which share a pass over keys and values
constexpr int QUERY_TILE = 16;

// One KV head of one sequence. len: positions that are written.
template <class T>
struct Context {
  const T *k, *v;
  const int32_t* table;
  int block_size, num_heads, head, dim, len, window;
  float scale, softcap;  // softcap 0: scores are not capped

  // Where the tiles of positions begin..end lie, in keys and in values; begin is a multiple of 16.
  void find_tiles(int begin, int end, size_t* tiles) const {
    const int in_block = block_size / KEYS;
    int block = begin / block_size, idx = begin % block_size / KEYS;
    for (; begin < end; begin += KEYS, idx++) {
      if (idx == in_block) idx = 0, block++;
      *tiles++ = (((size_t)table[block] * in_block + idx) * num_heads + head) * dim * KEYS;
    }
  }
};

// What splits give for up to QUERIES vectors, and what they become: largest scores, sums of weights, sums of values
// [n][dim].
struct Partial {
  float *top, *total, *out;

  static size_t size(int n, int dim) { return (size_t)(n + QUERY_TILE - 1) / QUERY_TILE * QUERY_TILE * (dim + 2); }
  static Partial at(float* place, int n, int dim) {
    const int padded = (n + QUERY_TILE - 1) / QUERY_TILE * QUERY_TILE;
    return {place, place + padded, place + 2 * padded};
  }
  Partial from(int vector, int dim) const { return {top + vector, total + vector, out + (size_t)vector * dim}; }
};

INLINE void store_key(float* cache, int64_t kv_pos, int head, int num_heads, int dim, const float* k) {
  float* tile = cache + ((kv_pos / KEYS) * num_heads + head) * dim * KEYS + kv_pos % KEYS;
  for (int d = 0; d < dim; d++) tile[d * KEYS] = k[d];
}
INLINE void store_key(bf16* cache, int64_t kv_pos, int head, int num_heads, int dim, const float* k) {
  bf16* tile = cache + ((kv_pos / KEYS) * num_heads + head) * dim * KEYS + kv_pos % KEYS * 2;
  for (int d = 0; d < dim; d += 16) {
    bf16 elements[16];
    store(elements, load_n(k + d, dim - d));
    for (int i = 0; i < 16 && d + i < dim; i += 2) memcpy(tile + (d + i) * KEYS, elements + i, 4);
  }
}

INLINE void store_value(float* cache, int64_t kv_pos, int head, int num_heads, int dim, const float* v) {
  memcpy(cache + ((kv_pos / KEYS) * num_heads + head) * dim * KEYS + kv_pos % KEYS * dim, v, 4 * dim);
}
// Another thread may write the other half of the pairs at the same time, so nothing but this half is touched.
INLINE void store_value(bf16* cache, int64_t kv_pos, int head, int num_heads, int dim, const float* v) {
  bf16* pairs = cache + ((kv_pos / KEYS) * num_heads + head) * dim * KEYS + kv_pos % KEYS / 2 * 2 * dim;
  for (int d = 0; d < dim; d += 16) {
#if NATIVE_BF16 && defined(__AVX512F__)
    const __m512i wide = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)load_n(v + d, dim - d)));
    const __mmask32 half = (dim - d < 16 ? (1u << 2 * (dim - d)) - 1 : ~0u) & (kv_pos % 2 ? 0xaaaaaaaau : 0x55555555u);
    _mm512_mask_storeu_epi16(pairs + 2 * d, half, kv_pos % 2 ? _mm512_slli_epi32(wide, 16) : wide);
#else
    for (int i = d; i < std::min(d + 16, dim); i++) pairs[2 * i + kv_pos % 2] = to_bf16(v[i]);
#endif
  }
}

// out [NQ][NT]: scores of NQ query vectors q [NQ][dim] with the 16 keys of NT tiles, while as many others come from
// memory, if there are any.
template <int NQ, int NT>
INLINE void tile_scores(const float* q, const float* const* tiles, const float* const* ahead, int dim, f32x16 (*out)[NT]) {
  f32x16 acc[NQ][NT] = {};
  for (int d = 0; d < dim; d++)
    for (int t = 0; t < NT; t++) {
      if (ahead) __builtin_prefetch(ahead[t] + d * KEYS);
      const f32x16 keys = load(tiles[t] + d * KEYS);
      for (int i = 0; i < NQ; i++) acc[i][t] = fma(q[i * dim + d], keys, acc[i][t]);
    }
  memcpy(out, acc, sizeof(acc));
}
template <int NQ, int NT>
INLINE void tile_scores(const bf16* q, const bf16* const* tiles, const bf16* const* ahead, int dim, f32x16 (*out)[NT]) {
  f32x16 acc[NQ][NT] = {};
#if NATIVE_BF16
  for (int d = 0; d < dim; d += 2) {
    bf16x32 keys[NT];
    for (int t = 0; t < NT; t++) {
      if (ahead) __builtin_prefetch(ahead[t] + d * KEYS);
      keys[t] = load_bf16(tiles[t] + d * KEYS);
    }
    for (int i = 0; i < NQ; i++) {
      const bf16x32 both = splat_pair(q + i * dim + d);
      for (int t = 0; t < NT; t++) acc[i][t] = add_dots(acc[i][t], both, keys[t]);
    }
  }
#endif
  memcpy(out, acc, sizeof(acc));
}

// The values of a tile that begins at `position`, or, where some of them are not written yet, a copy with zeros there:
// what lies in memory may be NaN, and no weight hides that.
template <class T>
INLINE const T* value_tile(const Context<T>& c, size_t place, int position, T* copy) {
  const T* tile = c.v + place;
  const int num = c.len - position, dim = c.dim;
  if (num >= KEYS) return tile;
  if (sizeof(T) == 4) {
    std::copy(tile, tile + num * dim, copy);
    std::fill(copy + num * dim, copy + KEYS * dim, T(0));
  } else {
    std::copy(tile, tile + (num + 1) / 2 * 2 * dim, copy);
    std::fill(copy + (num + 1) / 2 * 2 * dim, copy + KEYS * dim, T(0));
    if (num % 2)
      for (int d = 0; d < dim; d++) copy[num / 2 * 2 * dim + 2 * d + 1] = T(0);
  }
  return copy;
}

// acc [NQ][4] += weights [NQ][SPLIT], of 16 positions, times 64 columns of a tile of values, while another comes.
template <int NQ>
INLINE void weigh_tile(const float* tile, const float* ahead, int dim, int width, const float* weights, f32x16 (&acc)[NQ][4]) {
  for (int p = 0; p < KEYS; p++, tile += dim) {
    if (ahead)
      for (int c = 0; c < width; c += 16) __builtin_prefetch(ahead + p * dim + c);
    f32x16 value[4];
    for (int c = 0; c < 4; c++)
      value[c] = width == 64 ? load(tile + 16 * c) : 16 * c < width ? load_n(tile + 16 * c, width - 16 * c) : f32x16{};
    for (int i = 0; i < NQ; i++)
      for (int c = 0; c < 4; c++) acc[i][c] = fma(weights[i * SPLIT + p], value[c], acc[i][c]);
  }
}
template <int NQ>
INLINE void weigh_tile(const bf16* tile, const bf16* ahead, int dim, int width, const bf16* weights, f32x16 (&acc)[NQ][4]) {
#if NATIVE_BF16
#pragma GCC unroll 1  // unrolled, the sums lie in memory
  for (int p = 0; p < KEYS; p += 2, tile += 2 * dim) {
    if (ahead)
      for (int c = 0; c < width; c += 16) __builtin_prefetch(ahead + p * dim + 2 * c);
    bf16x32 value[4];
    for (int c = 0; c < 4; c++)
      value[c] = width == 64 ? load_bf16(tile + 32 * c) : load_bf16_n(tile + 32 * c, width - 16 * c);
    for (int i = 0; i < NQ; i++) {
      const bf16x32 both = splat_pair(weights + i * SPLIT + p);
      for (int c = 0; c < 4; c++) acc[i][c] = add_dots(acc[i][c], both, value[c]);
    }
  }
#endif
}

// cap * tanh(score / cap); -inf, a key that is not seen, stays.
INLINE f32x16 capped(f32x16 score, float cap) {
  return select(score == splat(-INFINITY), score, cap * vtanh(score * (1.0f / cap)));
}

// NQ vectors q [NQ][dim] at ascending positions over positions begin..end of one split; begin is a multiple of 16, end
// is not included and may stand behind those that a vector sees. scores: room for NQ * SPLIT floats. `is_cold`: keys and
// values come from memory, where a head's lie in pieces of a tile each, too short for the CPU to foresee. DIM: the head's
// size where it is known, which leaves registers for sums, else 0.
template <int NQ, int DIM, class T>
static void attend_split(const Context<T>& c, const T* q, const int* positions, int begin, int end, float* scores,
                         Partial to, bool is_cold) {
  const int dim = DIM ? DIM : c.dim;
  size_t tiles[SPLIT / KEYS + 2];
  c.find_tiles(begin, std::min(end + 2 * KEYS, c.len), tiles);
  const int last = (std::min(end + 2 * KEYS, c.len) - 1 - begin) / KEYS;
  f32x16 best[NQ];
  for (int i = 0; i < NQ; i++) best[i] = splat(-INFINITY);
  auto score_tiles = [&](int p, auto num) {
    constexpr int NT = decltype(num)::value;
    const T *keys[NT], *ahead[NT];
    for (int t = 0; t < NT; t++) {
      const int idx = (p - begin) / KEYS + t;
      keys[t] = c.k + tiles[idx], ahead[t] = c.k + tiles[std::min(idx + 2, last)];
    }
    f32x16 found[NQ][NT];
    tile_scores<NQ, NT>(q, keys, is_cold ? ahead : nullptr, dim, found);
    for (int t = 0; t < NT; t++, p += KEYS) {
      const bool sees_all = !c.window && p + KEYS - 1 <= positions[0];
      for (int i = 0; i < NQ; i++) {
        f32x16 score = found[i][t] * c.scale;
        if (!sees_all) {
          i32x16 key = lanes() + p;
          i32x16 seen = key <= positions[i];
          if (c.window) seen &= key > positions[i] - c.window;
          score = select(seen, score, splat(-INFINITY));
        }
        best[i] = vmax(best[i], score);
        store(scores + i * SPLIT + p - begin, score);
      }
    }
  };
  int p = begin;
  for (; p + KEYS < end; p += 2 * KEYS) score_tiles(p, std::integral_constant<int, 2>());
  if (p < end) score_tiles(p, std::integral_constant<int, 1>());
  T* weights = (T*)scores;  // bf16 ones overwrite scores that have been read
  for (int i = 0; i < NQ; i++) {
    if (c.softcap) {  // grows with the score, so that the largest stays the largest
      best[i] = capped(best[i], c.softcap);
      for (int p = 0; p < end - begin; p += KEYS)
        store(scores + i * SPLIT + p, capped(load(scores + i * SPLIT + p), c.softcap));
    }
    const float top = max_lane(best[i]);
    f32x16 total = {};
    for (int p = 0; p < end - begin; p += KEYS) {
      f32x16 score = load(scores + i * SPLIT + p);
      f32x16 weight = select(score == splat(-INFINITY), splat(0.0f), vexp(score - top));
      total += weight;
      store(weights + i * SPLIT + p, weight);
    }
    to.top[i] = top, to.total[i] = sum(total);
  }
  alignas(64) T copy[KEYS * 256];
  for (int d = 0; d < dim; d += 64) {
    const int width = DIM % 64 == 0 && DIM ? 64 : std::min(64, dim - d);
    f32x16 acc[NQ][4] = {};
    for (int p = begin; p < end; p += KEYS) {
      const int idx = (p - begin) / KEYS, column = sizeof(T) == 2 ? 2 * d : d;
      const T* values = value_tile(c, tiles[idx], p, copy) + column;
      const T* ahead = is_cold ? c.v + tiles[std::min(idx + 2, last)] + column : nullptr;
      weigh_tile<NQ>(values, ahead, dim, width, weights + p - begin, acc);
    }
    for (int i = 0; i < NQ; i++)
      for (int col = 0; 16 * col < width; col++)
        store_n(to.out + i * dim + d + 16 * col, acc[i][col], width - 16 * col);
  }
}

// `sum` of n vectors and the split behind it become one.
INLINE void merge(int n, int dim, Partial sum, Partial split) {
  for (int start = 0; start < n; start += 16) {
    const int num = std::min(16, n - start);
    const f32x16 none = splat(-INFINITY), old_top = load_n(sum.top + start, num), top = load_n(split.top + start, num);
    const f32x16 both = vmax(old_top, top);
    float keep[16], add[16];
    store(keep, select(old_top == none, splat(0.0f), vexp(old_top - both)));
    store(add, select(top == none, splat(0.0f), vexp(top - both)));
    store_n(sum.top + start, both, num);
    const f32x16 kept = load_n(sum.total + start, num) * load(keep);
    store_n(sum.total + start, fma(load_n(split.total + start, num), load(add), kept), num);
    for (int i = 0; i < num; i++) {
      float *out = sum.out + (size_t)(start + i) * dim, *from = split.out + (size_t)(start + i) * dim;
      for (int d = 0; d < dim; d += 16)
        store_n(out + d, fma(add[i], load_n(from + d, dim - d), load_n(out + d, dim - d) * keep[i]), dim - d);
    }
  }
}
INLINE void clear(int n, int dim, Partial sum) {
  std::fill(sum.top, sum.top + n, -INFINITY);
  std::fill(sum.total, sum.total + n, 0.0f);
  std::fill(sum.out, sum.out + (size_t)n * dim, 0.0f);
}

#include "attention_amx.h"

constexpr int QUERIES_AT_ONCE = 6;

// How many vectors share the instructions of one pass.
template <class T>
INLINE int vectors_at_once(int dim) {
  return in_tiles<T>(dim) ? 2 * QUERY_TILE : QUERIES_AT_ONCE;
}
constexpr size_t SCORES = 2 * QUERY_TILE * SPLIT;  // room for those of so many

// Where what a vector at `position` sees begins, or two tiles at most before it.
template <class T>
INLINE int first_seen(const Context<T>& c, int position) {
  return c.window && position >= c.window ? (position - c.window + 1) / (2 * KEYS) * (2 * KEYS) : 0;
}

// n vectors q [n][dim], padded to whole tiles, at ascending positions, over one split.
template <class T>
static void attend_split_any(const Context<T>& c, int n, const T* q, const int* positions, int split, float* scores,
                             Partial to) {
  const int at_once = vectors_at_once<T>(c.dim);
  for (int i = 0; i < n; i += at_once) {
    const int num = std::min(at_once, n - i);
    const int begin = std::max(split * SPLIT, first_seen(c, positions[i]));
    const int end = std::min(split * SPLIT + SPLIT, positions[i + num - 1] + 1);
    const Partial part = to.from(i, c.dim);
    if (begin >= end) {
      clear(num, c.dim, part);
      continue;
    }
    if constexpr (MAY_USE_TILES<T>)
      if (in_tiles<T>(c.dim)) {
        attend_split_in_tiles(c, num, q + (size_t)i * c.dim, positions + i, begin, end, scores, part);
        continue;
      }
    const T* from = q + (size_t)i * c.dim;
    auto attend = [&](auto num, auto dim) {
      attend_split<decltype(num)::value, decltype(dim)::value>(c, from, positions + i, begin, end, scores, part, i == 0);
    };
    const std::integral_constant<int, 0> any;
    switch (num) {
      case 1: attend(std::integral_constant<int, 1>(), any); break;
      case 2: attend(std::integral_constant<int, 2>(), any); break;
      case 3: attend(std::integral_constant<int, 3>(), any); break;
      case 4: attend(std::integral_constant<int, 4>(), any); break;
      case 5: attend(std::integral_constant<int, 5>(), any); break;
      default:
        if (c.dim == 64) attend(std::integral_constant<int, QUERIES_AT_ONCE>(), std::integral_constant<int, 64>());
        else attend(std::integral_constant<int, QUERIES_AT_ONCE>(), any);
    }
  }
}
