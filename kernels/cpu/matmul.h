// Rows of activations times panels (64 columns) of packed weight matrices.
//
// A matrix is stored panel by panel, within a panel by pairs of input elements, so that a panel is one stream of memory:
//   F32   [panel][K][64] float
//   BF16  [panel][K/2][64][2] bfloat16
//   INT8  [panel][K/2][64][2] int8,   with scales [panel][K/group][64] float
//   INT4  [panel][K/2][32] uint16, nibble c of word 2j+i is column 16c+j, element i; codes index 16 bf16 levels; scales
// K is padded with zeros to a multiple of 64, N to whole panels. Quantized groups are decoded to bf16 pairs in the first
// cache level, once for all rows. With AMX or AVX-512 BF16 activations are bf16, and products are tiles (amx.h) or pairs;
// elsewhere they are fp32 and weights are widened. Sums are fp32 over K in ascending order (for quantized ones, group by
// group), whatever the number of rows, and however K is cut into blocks: a sum that is stored and loaded again is the same.
#pragma once

#include <algorithm>

#include "amx.h"
#include "vec.h"

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int PANEL = 64;
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

// A piece of memory that is needed soon.
struct Piece {
  const char *at, *end;
};

// The columns of one panel of a matrix; the panel that this thread takes next, unless others are quicker; and what will be
// read when the products are there.
struct Panel {
  const Matrix* matrix;
  int idx, next;
  const Piece* wanted = nullptr;
  int num_wanted = 0;
};

// Sums of so many rows and blocks of 16 columns stay in registers.
#if defined(__AVX512F__)
constexpr int ROWS_AT_ONCE = NATIVE_BF16 ? 6 : 4, BLOCKS_AT_ONCE = 4;
#else
constexpr int ROWS_AT_ONCE = NATIVE_BF16 ? 6 : 5, BLOCKS_AT_ONCE = 1;
#endif

// Lines of memory that are asked for in each step of K, so that memory does not wait for products. All at once would fill
// the core's buffers for lines that are on their way, and the products would wait.
struct Ahead {
  const char *at, *end;
  int lines;  // a step
  INLINE_METHOD void step() {
    for (int i = 0; i < lines; i++) __builtin_prefetch(at + 64 * i, 0, 3);
    at += 64 * lines;
    if (at >= end) lines = 0;
  }
};

// The same of several pieces.
struct Pieces {
  const Piece *next, *last;
  int lines;
  Piece now = {};
  INLINE_METHOD void step() {
    for (int i = 0; i < lines; i++, now.at += 64) {
      if (now.at >= now.end) {
        if (next == last) {
          lines = 0;
          return;
        }
        now = *next++;
      }
      __builtin_prefetch(now.at, 0, 3);
    }
  }
};

struct Both {
  Ahead& panel;
  Pieces& pieces;
  INLINE_METHOD void step() {
    panel.step();
    pieces.step();
  }
};

struct Nothing {
  INLINE_METHOD void step() {}
};

template <int MR, int NB>
INLINE void begin(const float* tile, f32x16 (&acc)[MR][NB], bool from_zero) {
  for (int r = 0; r < MR; r++)
    for (int c = 0; c < NB; c++) acc[r][c] = from_zero ? f32x16{} : load(tile + r * PANEL + 16 * c);
}

// tile [MR][64] (stride 64) = x [MR][2 * pairs] * w, or goes on from there if this is not the first block of K; if scale is given,
// += scale * that.
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
template <int MR, class Next>
INLINE void multiply(const bf16* x, int stride, const bf16* w, int pairs, float* tile, const float* scale, bool first,
                     Next& ahead) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB];
    begin<MR, NB>(tile + 16 * b, acc, first || scale);
    const bf16* from = w + 32 * b;
    for (int p = 0; p < pairs; p++, from += 2 * PANEL) {
      ahead.step();
      bf16x32 weight[NB];
      for (int c = 0; c < NB; c++) weight[c] = load_bf16(from + 32 * c);
      for (int r = 0; r < MR; r++) {
        const bf16x32 both = splat_pair(x + r * stride + 2 * p);
        for (int c = 0; c < NB; c++) acc[r][c] = add_dots(acc[r][c], both, weight[c]);
      }
    }
    finish<MR, NB>(tile + 16 * b, acc, scale ? scale + 16 * b : nullptr, first);
  }
}
#else
template <int MR, class Next>
INLINE void multiply(const bf16*, int, const bf16*, int, float*, const float*, bool, Next&) {
  __builtin_trap();  // bf16 activations need the instructions
}
#endif

template <int MR, class Next>
INLINE void multiply(const float* x, int stride, const bf16* w, int pairs, float* tile, const float* scale, bool first,
                     Next& ahead) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB];
    begin<MR, NB>(tile + 16 * b, acc, first || scale);
    for (int p = 0; p < pairs; p++) {
      ahead.step();
      for (int c = 0; c < NB; c++) {
        u32x16 words = load_pairs(w + p * 2 * PANEL + 32 * (b + c));
        f32x16 even = (f32x16)(words << 16), odd = (f32x16)(words & 0xffff0000u);
        for (int r = 0; r < MR; r++) {
          acc[r][c] = fma(x[r * stride + 2 * p], even, acc[r][c]);
          acc[r][c] = fma(x[r * stride + 2 * p + 1], odd, acc[r][c]);
        }
      }
    }
    finish<MR, NB>(tile + 16 * b, acc, scale ? scale + 16 * b : nullptr, first);
  }
}

template <int MR, class Next>
INLINE void multiply(const float* x, int stride, const float* w, int pairs, float* tile, const float*, bool first,
                     Next& ahead) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB];
    begin<MR, NB>(tile + 16 * b, acc, first);
    for (int k = 0; k < 2 * pairs; k++) {
      ahead.step();
      for (int c = 0; c < NB; c++) {
        f32x16 weight = load(w + k * PANEL + 16 * (b + c));
        for (int r = 0; r < MR; r++) acc[r][c] = fma(x[r * stride + k], weight, acc[r][c]);
      }
    }
    finish<MR, NB>(tile + 16 * b, acc, nullptr, first);
  }
}

// Rows are taken in passes of equal height.
INLINE int num_passes(int rows) { return (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; }

template <class A, class W, class Next>
static void multiply_rows(const A* x, int stride, int rows, const W* w, int pairs, float* tile, const float* scale,
                          bool first, Next&& ahead) {
  for (int passes = num_passes(rows), r = 0; passes; passes--) {
    const int now = (rows - r + passes - 1) / passes;
    const A* from = x + (size_t)r * stride;
    float* to = tile + r * PANEL;
    switch (now) {
      case 1: multiply<1>(from, stride, w, pairs, to, scale, first, ahead); break;
      case 2: multiply<2>(from, stride, w, pairs, to, scale, first, ahead); break;
      case 3: multiply<3>(from, stride, w, pairs, to, scale, first, ahead); break;
      case 4: multiply<4>(from, stride, w, pairs, to, scale, first, ahead); break;
      case 5: multiply<5>(from, stride, w, pairs, to, scale, first, ahead); break;
      default: multiply<ROWS_AT_ONCE>(from, stride, w, pairs, to, scale, first, ahead);
    }
    r += now;
  }
}

// A block of K stays in the first cache level while all rows pass, and the one behind it comes from memory meanwhile: of this
// panel, or at its end of `next`, which may be null. So do the pieces that are wanted behind the products.
constexpr int BLOCK_PAIRS = 48;
template <class A, class W>
static void multiply_blocks(const A* x, int stride, int rows, const W* w, int pairs, float* tile, const W* next,
                            const Piece* wanted, int num_wanted) {
  constexpr int LINES = 2 * PANEL * sizeof(W) / 64;  // of a pair
  const int passes = num_passes(rows) * (4 / BLOCKS_AT_ONCE), steps = pairs * passes * (sizeof(W) / 2);
  size_t wanted_lines = 0;
  for (int i = 0; i < num_wanted; i++) wanted_lines += (wanted[i].end - wanted[i].at + 63) / 64;
  Pieces others{wanted, wanted + num_wanted, (int)((wanted_lines + steps - 1) / steps)};
  if (rows == 1 && passes == 1) {
    if (!num_wanted) return multiply_rows(x, stride, rows, w, pairs, tile, nullptr, true, Nothing());
    return multiply_rows(x, stride, rows, w, pairs, tile, nullptr, true, others);
  }
  const int blocks = (pairs + BLOCK_PAIRS - 1) / BLOCK_PAIRS, at_once = (pairs + blocks - 1) / blocks;
  for (int p = 0; p < pairs; p += at_once) {
    const int now = std::min(at_once, pairs - p), left = pairs - p - now;
    const W* from = w + (size_t)p * 2 * PANEL;
    const char* ahead = (const char*)(left ? from + now * 2 * PANEL : next);
    const size_t lines = (size_t)std::min(at_once, left ? left : next ? pairs : 0) * LINES;
    const int block_steps = now * passes * (sizeof(W) / 2);
    Ahead base{ahead, ahead + 64 * lines, (int)((lines + block_steps - 1) / block_steps)};
    if (!others.lines) multiply_rows(x + 2 * p, stride, rows, from, now, tile, nullptr, p == 0, base);
    else multiply_rows(x + 2 * p, stride, rows, from, now, tile, nullptr, p == 0, Both{base, others});
  }
}

// 32 int8 -> 32 bf16; every int8 is exact in bf16.
INLINE void decode_int8(const int8_t* in, bf16* out) {
#if NATIVE_BF16 && defined(__AVX512F__)
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
#if NATIVE_BF16 && defined(__AVX512F__)
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

// 64 columns x one group of K, as bf16 pairs.
static void decode_group(const Matrix& m, int panel, int group, bf16* out) {
  const int half = m.group / 2;
  const size_t first_pair = (size_t)panel * (m.kp / 2) + group * half;
  if (m.format == INT8) {
    const int8_t* in = (const int8_t*)m.data + first_pair * 2 * PANEL;
    for (int i = 0; i < half * 4; i++) decode_int8(in + 32 * i, out + 32 * i);
  } else {
    const uint16_t* in = (const uint16_t*)m.data + first_pair * 32;
    for (int p = 0; p < half; p++) decode_int4(in + 32 * p, m.levels, out + 2 * PANEL * p);
  }
}
INLINE const float* group_scales(const Matrix& m, int panel, int group) {
  return m.scales + ((size_t)panel * (m.kp / m.group) + group) * PANEL;
}

// out [rows][64] = x [rows][kp] * one panel, without bias.
template <class A>
static void multiply_panel(const Panel& panel, const A* x, int rows, float* out) {
  const Matrix& m = *panel.matrix;
  const size_t pairs = m.kp / 2, first = panel.idx * pairs * 2 * PANEL;
  auto multiply_as = [&](auto* data) {
    auto* next = panel.next < m.panels() ? data + panel.next * pairs * 2 * PANEL : nullptr;
    multiply_blocks(x, m.kp, rows, data + first, pairs, out, next, panel.wanted, panel.num_wanted);
  };
  if (m.format == F32) {
    if constexpr (sizeof(A) == 4) multiply_as((const float*)m.data);
    else __builtin_trap();
    return;
  }
  if (m.format == BF16) return multiply_as((const bf16*)m.data);
  alignas(64) bf16 decoded[MAX_GROUP * PANEL];
  for (int g = 0; g * m.group < m.kp; g++) {
    decode_group(m, panel.idx, g, decoded);
    multiply_rows(x + g * m.group, m.kp, rows, decoded, m.group / 2, out, group_scales(m, panel.idx, g), g == 0,
                  Nothing());
  }
}

#if NATIVE_AMX
constexpr int BLOCK_STEPS = 6;              // 24 KiB of weights and 12 of rows: both stay in the first cache level
constexpr size_t ACT_LIMIT = 1024 * 1024;  // bytes of rows that may stay in the second

// out [padded rows][64] (+)= rows times a block of a panel, while the block that comes next is fetched from memory, a few lines
// in each step: memory does not wait for products, nor they for it.
static void multiply_block(const bf16* x, size_t next_rows, int tiles, const bf16* w, int steps, float* out, bool first,
                           const bf16* next) {
  const int lines = (64 + tiles - 1) / tiles;  // of 64, in as many passes as there are tiles
  int pass = 0;
  auto fetch = [&]() -> Fetch<false> {
    const int start = std::min(pass++ * lines, 64);
    return {(const char*)next + (size_t)start * steps * 64, std::min(lines, 64 - start)};
  };
  int t = 0;
  for (; t + 2 <= tiles; t += 2)
    for (int half = 0; half < 2; half++)
      multiply_32(x + t * next_rows, next_rows, w + 64 * half, steps, out + t * TILE_ROWS * PANEL + 32 * half, first, fetch());
  if (t < tiles) multiply_16(x + t * next_rows, TILE_ROWS * TILE_K, w, steps, out + t * TILE_ROWS * PANEL, first, fetch());
}

// out [num][padded rows][64], from rows that lie in tiles. Sums go on where they stopped: no block of K changes an order.
static void multiply_stored(const Panel* panels, int num, const Rows<bf16>& act, int row, int rows, float* out) {
  const bf16* x = act.at(row, 0);
  const int kp = panels[0].matrix->kp, steps = kp / TILE_K, tiles = pad_rows(rows) / TILE_ROWS;
  const size_t next_rows = (size_t)kp * TILE_ROWS;
  auto weights = [&](int p, int s) {
    return (const bf16*)panels[p].matrix->data + ((size_t)panels[p].idx * kp + s * TILE_K) * PANEL;
  };
  if (rows == 1) {
    for (int p = 0; p < num; p++) multiply_1(x, weights(p, 0), steps, out + (size_t)p * TILE_ROWS * PANEL);
    return;
  }
  if (tiles == 1) {
    for (int p = 0; p < num; p++)
      multiply_16(x, act.step(), weights(p, 0), steps, out + (size_t)p * TILE_ROWS * PANEL, true,
                  Fetch<true>{(const char*)weights(p, 0) + 2048, 64});
    return;
  }
  const int blocks = (steps + BLOCK_STEPS - 1) / BLOCK_STEPS, at_once = (steps + blocks - 1) / blocks;
  // Rows that do not fit are taken in blocks of K, all panels for each.
  const bool panel_by_panel = tiles * next_rows * sizeof(bf16) <= ACT_LIMIT;
  for (int i = 0, p = 0, s = 0; i < num * blocks; i++) {
    int next_p = p, next_s = s;
    if (panel_by_panel) next_s += at_once;
    else next_p++;
    if (next_s >= steps) next_s = 0, next_p++;
    if (next_p == num && !panel_by_panel) next_p = 0, next_s += at_once;
    const bool is_last = i == num * blocks - 1;  // what follows in memory is the next task's, or soon will be
    const bf16* next = is_last ? weights(num - 1, 0) + (size_t)kp * PANEL : weights(next_p, next_s);
    multiply_block(x + (size_t)s * TILE_ROWS * TILE_K, next_rows, tiles, weights(p, s), std::min(at_once, steps - s),
                   out + (size_t)p * tiles * TILE_ROWS * PANEL, s == 0, next);
    p = next_p, s = next_s;
  }
}

static void multiply_decoded(const Panel& panel, const Rows<bf16>& x, int first_row, int rows, float* out) {
  const Matrix& m = *panel.matrix;
  const int steps = m.group / TILE_K;
  alignas(64) bf16 decoded[MAX_GROUP * PANEL];
  alignas(64) float part[TILE_ROWS * PANEL];
  for (int g = 0; g * m.group < m.kp; g++) {
    decode_group(m, panel.idx, g, decoded);
    const float* scale = group_scales(m, panel.idx, g);
    for (int row = 0; row < rows; row += TILE_ROWS) {
      multiply_16(x.at(first_row + row, g * m.group), x.step(), decoded, steps, part, true,
                  Fetch<true>{});
      for (int r = 0; r < std::min(TILE_ROWS, rows - row); r++)
        for (int c = 0; c < PANEL; c += 16) {
          float* sum = out + (row + r) * PANEL + c;
          f32x16 value = load(part + r * PANEL + c), by = load(scale + c);
          store(sum, g ? fma(value, by, load(sum)) : value * by);
        }
    }
  }
}
#endif

// out [num][padded rows][64] = rows `row` and following of x times each panel, all of matrices with the same kp and format,
// without bias.
template <class A>
static void multiply_panels(const Panel* panels, int num, const Rows<A>& x, int row, int rows, float* out) {
  const Matrix& m = *panels[0].matrix;
#if NATIVE_AMX
  if constexpr (sizeof(A) == 2) {
    if (m.format == BF16) return multiply_stored(panels, num, x, row, rows, out);
    for (int p = 0; p < num; p++) multiply_decoded(panels[p], x, row, rows, out + (size_t)p * pad_rows(rows) * PANEL);
    return;
  }
#endif
  for (int p = 0; p < num; p++) multiply_panel(panels[p], x.at(row, 0), rows, out + (size_t)p * pad_rows(rows) * PANEL);
}

// How many rows and panels a task has. Tiles want many: each row and weight is read from memory once for all of a task. Other
// products are bound by arithmetic, and their results should stay in the first cache level.
constexpr int FEW_ROWS = 64, MAX_ROWS = NATIVE_AMX ? 512 : FEW_ROWS;
constexpr int MAX_PANELS = NATIVE_AMX ? 4 : 2;
struct Blocks {
  int rows, panels;
};
template <class A>
static Blocks choose_blocks(int num_rows, int num_panels, int most, int threads) {
  if (!IN_TILES<A>) return {FEW_ROWS, 1};
  return {std::min(MAX_ROWS, pad_rows(num_rows)), std::clamp(num_panels / (4 * threads), 1, most)};
}
