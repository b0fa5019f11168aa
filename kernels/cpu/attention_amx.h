// One split of attention on AMX tiles: 16 query vectors at once, both products and the softmax between them.
//
// Keys and values lie in memory as tiles want them, 16 keys x pairs of elements and 16 columns x 8 pairs of positions. Weights
// are rounded to bf16 for the second product; their sum is not. One vector is a tile, too: tiles have an order of their own.
// The softmax, not the products, takes most of the time, hence its own exponential.
#pragma once

#include "amx.h"

template <class T>
constexpr bool MAY_USE_TILES = NATIVE_AMX && sizeof(T) == 2;

// Whether vectors of this size go through tiles; others have them in part, and go the way of AVX-512.
template <class T>
INLINE bool in_tiles(int dim) {
  return MAY_USE_TILES<T> && dim % 32 == 0;
}

#if NATIVE_AMX
// While a thread attends: 5 holds weights [16][16], 6 and 7 hold values [8][16][2], the others 16 x 64 bytes of anything.
class AttentionTiles {
 public:
  AttentionTiles() {
    _tile_storeconfig(&before_);
    Config config;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    config.row_bytes[5] = 32, config.rows[6] = config.rows[7] = 8;
    _tile_loadconfig(&config);
  }
  ~AttentionTiles() { _tile_loadconfig(&before_); }
  AttentionTiles(const AttentionTiles&) = delete;

 private:
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  };
  Config before_;
};

constexpr float HIDDEN = -1e30f;  // a score whose weight is 0; finite, so that nothing needs to ask for it

// 2^x to 1e-7, 1 for 0, 0 for very small x, NaN for NaN.
INLINE __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(1.326472721e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.671512812e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.550733745e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402224208e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931469776e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// R rows of scores [tiles][16][16], from `row` on, become weights of the same places.
template <int R>
INLINE void soften(const float* scores, int row, int tiles, float scale, bf16* weights, Partial to) {
  __m512 best[R], total[R], shift[R];
  for (int r = 0; r < R; r++) best[r] = _mm512_set1_ps(HIDDEN), total[r] = _mm512_setzero_ps();
  scores += row * KEYS, weights += row * KEYS;
  for (int t = 0; t < tiles; t++)
    for (int r = 0; r < R; r++) best[r] = _mm512_max_ps(_mm512_load_ps(scores + (t * 16 + r) * KEYS), best[r]);
  const float to_log2 = scale * 1.44269504f;
  for (int r = 0; r < R; r++) {
    const float top = max_lane((f32x16)best[r]);
    to.top[row + r] = top == HIDDEN ? -INFINITY : top * scale;
    shift[r] = _mm512_set1_ps(top == HIDDEN ? 0.0f : -top * to_log2);
  }
  const __m512 factor = _mm512_set1_ps(to_log2);
  for (int t = 0; t < tiles; t++)
    for (int r = 0; r < R; r++) {
      const __m512 score = _mm512_load_ps(scores + (t * 16 + r) * KEYS);
      const __m512 weight = exp2_of(_mm512_fmadd_ps(score, factor, shift[r]));
      total[r] = _mm512_add_ps(total[r], weight);
      store(weights + (t * 16 + r) * KEYS, (f32x16)weight);
    }
  for (int r = 0; r < R; r++) to.total[row + r] = sum((f32x16)total[r]);
}

// As attend_split, for up to 16 vectors; q has 16 in memory, whatever they hold, and `to` has room for 16.
static void attend_split_in_tiles(const Context<bf16>& c, int n, const bf16* q, const int* positions, int begin, int end,
                                  float* scores, Partial to) {
  const int tiles = (end - begin + KEYS - 1) / KEYS;
  size_t places[SPLIT / KEYS + 1];
  for (int t = 0; t < tiles; t++) places[t] = c.tile(begin + t * KEYS);
  places[tiles] = places[tiles - 1];  // of an odd number the last is done twice
  tile_fence();
  for (int t = 0; t < tiles; t += 2) {
    _tile_zero(0);
    _tile_zero(1);
    const bf16 *keys = c.k + places[t], *next = c.k + places[t + 1];
    for (int d = 0; d < c.dim; d += 32) {
      _tile_loadd(2, q + d, 2 * c.dim);
      _tile_loadd(3, keys + d * KEYS, 64);
      _tile_dpbf16ps(0, 2, 3);
      _tile_loadd(4, next + d * KEYS, 64);
      _tile_dpbf16ps(1, 2, 4);
    }
    _tile_stored(0, scores + t * 16 * KEYS, 64);
    _tile_stored(1, scores + (t + 1) * 16 * KEYS, 64);
    for (const bf16* values : {c.v + places[t], c.v + places[t + 1]})
      for (int i = 0; i < c.dim * KEYS; i += 32) __builtin_prefetch(values + i, 0, 2);
  }
  for (int t = 0; t < tiles; t++) {
    const int first = begin + t * KEYS;
    if (first + KEYS - 1 <= positions[0] && !(c.window && first <= positions[n - 1] - c.window)) continue;
    for (int i = 0; i < n; i++) {
      const i32x16 key = lanes() + first;
      i32x16 seen = key <= positions[i];
      if (c.window) seen &= key > positions[i] - c.window;
      float* row = scores + (t * 16 + i) * KEYS;
      store(row, select(seen, load(row), splat(HIDDEN)));
    }
  }
  alignas(64) bf16 weights[16 * SPLIT];
  int row = 0;
  for (; row + 4 <= n; row += 4) soften<4>(scores, row, tiles, c.scale, weights, to);
  if (n % 4 == 1) soften<1>(scores, row, tiles, c.scale, weights, to);
  if (n % 4 == 2) soften<2>(scores, row, tiles, c.scale, weights, to);
  if (n % 4 == 3) soften<3>(scores, row, tiles, c.scale, weights, to);
  alignas(64) bf16 copy[KEYS * 256];
  const bf16* last = value_tile(c, begin + (tiles - 1) * KEYS, copy);
  const int stride = 4 * c.dim;
  tile_fence();
  for (int d = 0; d < c.dim; d += 64) {
    const bool wide = d + 32 < c.dim;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int t = 0; t < tiles; t++) {
      const bf16* values = (t == tiles - 1 ? last : c.v + places[t]) + 2 * d;
      _tile_loadd(5, weights + t * 16 * KEYS, 32);
      _tile_loadd(6, values, stride);
      _tile_dpbf16ps(0, 5, 6);
      _tile_loadd(7, values + 32, stride);
      _tile_dpbf16ps(1, 5, 7);
      if (!wide) continue;
      _tile_loadd(6, values + 64, stride);
      _tile_dpbf16ps(2, 5, 6);
      _tile_loadd(7, values + 96, stride);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, to.out + d, stride);
    _tile_stored(1, to.out + d + 16, stride);
    if (!wide) continue;
    _tile_stored(2, to.out + d + 32, stride);
    _tile_stored(3, to.out + d + 48, stride);
  }
  tile_fence();
}
#else
struct AttentionTiles {
  AttentionTiles() {}  // says that it is used
};
#endif
