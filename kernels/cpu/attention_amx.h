// One split of attention on AMX tiles: up to 32 query vectors at once, both products and the softmax between them.
//
// Keys and values lie in memory as tiles want them, 16 keys x pairs of elements and 16 columns x 8 pairs of positions.
// Weights are rounded to bf16 for the second product; their sum is not. One vector is a tile, too: tiles have an order
// of their own. The softmax, not the products, takes most of the time, hence its own exponential.
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
constexpr int STEP = 32;  // positions that one instruction sums over
constexpr float HIDDEN = -1e30f;  // a score whose weight is 0; finite, so that nothing needs to ask for it

// 2^x to 3e-6, 1 for 0, 0 for very small x, NaN for NaN.
INLINE __m512 exp2_of(__m512 x) {
  const __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, whole);
  __m512 p = _mm512_set1_ps(9.582853221e-3f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.590642621e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.402409862e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931241932e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, whole);
}

// R rows of scores [steps][2][16][16], from `row` on, become weights [16][32] in the first half of each step's place.
template <int R>
static void soften(float* scores, int row, int steps, float scale, Partial to) {
  __m512 best[R], total[R], shift[R];
  for (int r = 0; r < R; r++) best[r] = _mm512_set1_ps(HIDDEN), total[r] = _mm512_setzero_ps();
  for (int s = 0; s < steps; s++)
    for (int r = 0; r < R; r++) {
      const float* place = scores + s * 16 * STEP + (row + r) * KEYS;
      best[r] = _mm512_max_ps(_mm512_max_ps(_mm512_load_ps(place), _mm512_load_ps(place + 16 * KEYS)), best[r]);
    }
  const float to_log2 = scale * 1.44269504f;
  for (int r = 0; r < R; r++) {
    const float top = _mm512_reduce_max_ps(best[r]);
    to.top[row + r] = top == HIDDEN ? -INFINITY : top * scale;
    shift[r] = _mm512_set1_ps(top == HIDDEN ? 0.0f : -top * to_log2);
  }
  const __m512 factor = _mm512_set1_ps(to_log2);
  for (int s = 0; s < steps; s++)
    for (int r = 0; r < R; r++) {
      float* place = scores + s * 16 * STEP + (row + r) * KEYS;
      const __m512 low = exp2_of(_mm512_fmadd_ps(_mm512_load_ps(place), factor, shift[r]));
      const __m512 high = exp2_of(_mm512_fmadd_ps(_mm512_load_ps(place + 16 * KEYS), factor, shift[r]));
      total[r] = _mm512_add_ps(total[r], _mm512_add_ps(low, high));
      _mm512_store_si512(place, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  for (int r = 0; r < R; r++) to.total[row + r] = sum((f32x16)total[r]);
}

// Where a step's keys and values lie; of values that are not written, and of a second tile that nobody sees, a copy
// with zeros.
struct StepPlace {
  const bf16 *keys[2], *values[2];
};

// scores [steps][2][16][16] of one tile of queries, or of two, SPLIT * 16 floats apart; q [16 or 32][dim].
template <bool TWO>
INLINE void score_steps(const StepPlace* places, int steps, const bf16* q, int dim, float* scores) {
  const int stride = 2 * dim;
  for (int s = 0; s < steps; s += TWO ? 1 : 2) {
    const StepPlace &place = places[s], &next = places[TWO ? s : std::min(s + 1, steps - 1)];
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int d = 0; d < dim; d += 32) {
      _tile_loadd(4, q + d, stride);
      _tile_loadd(6, place.keys[0] + d * KEYS, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, place.keys[1] + d * KEYS, 64);
      _tile_dpbf16ps(1, 4, 7);
      if (TWO) {
        _tile_loadd(5, q + 16 * dim + d, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else {
        _tile_loadd(6, next.keys[0] + d * KEYS, 64);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, next.keys[1] + d * KEYS, 64);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    float* to = scores + s * 16 * STEP;
    float* to_next = TWO ? to + 16 * SPLIT : scores + std::min(s + 1, steps - 1) * 16 * STEP;
    _tile_stored(0, to, 64);
    _tile_stored(1, to + 16 * KEYS, 64);
    _tile_stored(2, to_next, 64);
    _tile_stored(3, to_next + 16 * KEYS, 64);
  }
}

// out [16 or 32][dim] = weights [steps][16][32] (the steps 16 * 32 floats apart) times values, COLUMNS at once. Values
// are copied, as a step's lie in two places: to the first cache level, while tiles before them are multiplied.
template <bool TWO>
INLINE void weigh_steps(const StepPlace* places, int steps, const float* weights, int dim, float* out) {
  constexpr int COLUMNS = TWO ? 32 : 64, STRIDE = 4 * COLUMNS;
  alignas(64) bf16 buffers[2][STEP * COLUMNS];
  for (int d = 0; d < dim; d += COLUMNS) {
    const bool whole = d + COLUMNS <= dim;  // of 64 columns there may be 32
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int s = 0; s < steps; s++) {
      bf16* values = buffers[s % 2];
      for (int half = 0; half < 2; half++)
        for (int pair = 0; pair < 8; pair++) {
          const bf16* from = places[s].values[half] + 2 * (pair * dim + d);
          bf16* to = values + (half * 8 + pair) * 2 * COLUMNS;
          for (int i = 0; i < COLUMNS / 16; i++)
            if (whole || i < 2) _mm512_store_si512(to + 32 * i, _mm512_loadu_si512(from + 32 * i));
        }
      tile_fence();
      const float* weight = weights + s * 16 * STEP;
      _tile_loadd(4, weight, 64);
      _tile_loadd(6, values, STRIDE);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, values + 32, STRIDE);
      _tile_dpbf16ps(1, 4, 7);
      if (TWO) {
        _tile_loadd(5, weight + 16 * SPLIT, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      } else if (whole) {
        _tile_loadd(6, values + 64, STRIDE);
        _tile_dpbf16ps(2, 4, 6);
        _tile_loadd(7, values + 96, STRIDE);
        _tile_dpbf16ps(3, 4, 7);
      }
    }
    _tile_stored(0, out + d, 4 * dim);
    _tile_stored(1, out + d + 16, 4 * dim);
    if (!TWO && !whole) continue;
    float* others = TWO ? out + 16 * dim + d : out + d + 32;
    _tile_stored(2, others, 4 * dim);
    _tile_stored(3, others + 16, 4 * dim);
  }
}

// As attend_split, for up to 32 vectors; q has whole tiles of them in memory, whatever they hold, and so has `to`.
// begin is a multiple of 32.
static void attend_split_in_tiles(const Context<bf16>& c, int n, const bf16* q, const int* positions, int begin,
                                  int end, float* scores, Partial to) {
  const int steps = (end - begin + STEP - 1) / STEP;
  alignas(64) bf16 copies[2][KEYS * 256];
  StepPlace places[SPLIT / STEP];
  size_t tiles[SPLIT / KEYS];
  c.find_tiles(begin, end, tiles);
  for (int s = 0; s < steps; s++)
    for (int half = 0; half < 2; half++) {
      const int position = begin + s * STEP + half * KEYS;
      if (position < end) {
        const size_t tile = tiles[2 * s + half];
        places[s].keys[half] = c.k + tile;
        places[s].values[half] = value_tile(c, tile, position, copies[half]);
      } else {
        std::fill(copies[half], copies[half] + KEYS * c.dim, bf16(0));
        places[s].keys[half] = places[s].keys[0];
        places[s].values[half] = copies[half];
      }
    }
  tile_fence();
  if (n > 16) score_steps<true>(places, steps, q, c.dim, scores);
  else score_steps<false>(places, steps, q, c.dim, scores);
  for (int first = begin; first < begin + steps * STEP; first += KEYS) {
    if (first + KEYS - 1 <= positions[0] && !(c.window && first <= positions[n - 1] - c.window)) continue;
    for (int i = 0; i < n; i++) {
      const i32x16 key = lanes() + first;
      i32x16 seen = key <= positions[i];
      if (c.window) seen &= key > positions[i] - c.window;
      float* row = scores + i / 16 * 16 * SPLIT + (first - begin) * 16 + i % 16 * KEYS;
      store(row, select(seen, load(row), splat(HIDDEN)));
    }
  }
  for (int i = 0; i < n; i += 16) {
    float* tile = scores + i * SPLIT;
    const Partial part = to.from(i, c.dim);
    const int num = std::min(16, n - i);
    const float scale = c.softcap ? 1.0f : c.scale;
    if (c.softcap)
      for (int place = 0; place < steps * 16 * STEP; place += KEYS) {
        const f32x16 score = load(tile + place), hidden = splat(HIDDEN);
        store(tile + place, select(score == hidden, hidden, capped(score * c.scale, c.softcap)));
      }
    int row = 0;
    for (; row + 8 <= num; row += 8) soften<8>(tile, row, steps, scale, part);
    if (num & 4) soften<4>(tile, row, steps, scale, part), row += 4;
    if (num & 2) soften<2>(tile, row, steps, scale, part), row += 2;
    if (num & 1) soften<1>(tile, row, steps, scale, part);
  }
  if (n > 16) weigh_steps<true>(places, steps, scores, c.dim, to.out);
  else weigh_steps<false>(places, steps, scores, c.dim, to.out);
  tile_fence();
}
#endif
