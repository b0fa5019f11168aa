// Rows of activations that lie in tiles times panels of packed weights: blocks of K on AMX (amx.h).
//
// Part of matmul.h, which says how matrices lie. Sums go on where they stopped: no block of K changes an order.
#pragma once

static_assert(WEIGHT_ZERO == 128, "TDPBSUD takes weights as they are stored");
constexpr int BLOCK_STEPS = BLOCK_BYTES / (64 * PANEL);  // beside 12 KiB of rows: both stay in the first cache level
constexpr size_t ACT_LIMIT = 1024 * 1024;                // bytes of rows that may stay in the second

// out [padded rows][64] (+)= rows times a block of a panel, while the block that comes next is fetched from memory, a few lines
// in each step: memory does not wait for products, nor they for it. A step of that block has `num_lines`.
template <class X, class W>
static void multiply_block(const X* x, size_t next_rows, int tiles, const W* w, int steps, float* out, bool first,
                           const void* next, int num_lines) {
  const int lines = (num_lines + tiles - 1) / tiles;  // in as many passes as there are tiles
  int pass = 0;
  auto ahead = [&] {
    const int start = std::min(pass++ * lines, num_lines);
    const int now = std::min(lines, num_lines - start);
    return Ahead<false>::within(steps, (const char*)next + (size_t)start * steps * 64, now * steps);
  };
  int t = 0;
  for (; t + 2 <= tiles; t += 2)
    for (int half = 0; half < 2; half++)
      multiply_32(x + t * next_rows, next_rows, w + 32 * INPUTS<W> * half, steps, out + t * TILE_ROWS * PANEL + 32 * half, first,
                  ahead());
  if (t < tiles) multiply_16(x + t * next_rows, TILE_ROWS * TILE_K<X>, w, steps, out + t * TILE_ROWS * PANEL, first, ahead());
}

// out [num][padded rows][64], from rows that lie in tiles; of int8 rows the sums are int32.
template <class Source, class X>
static void multiply_tiles(const Panel* panels, int num, const Rows<X>& act, int row, int rows, float* out) {
  Source source;
  auto start = [&](int p, int step) -> BlockStart { return {panels[p].matrix, panels[p].idx, step * TILE_K<X>}; };
  const X* x = act.at(row, 0);
  const int kp = act.kp, steps = kp / TILE_K<X>, tiles = pad_rows(rows) / TILE_ROWS;
  const size_t next_rows = (size_t)kp * TILE_ROWS;
  constexpr int LINES = TILE_K<X> * Source::INPUT_BYTES / 64;  // of memory, for a step
  if constexpr (sizeof(X) == 2)
    if (act.height == 1) {
      for (int p = 0; p < num; p++) multiply_1(x, source.memory(start(p, 0)), steps, out + (size_t)p * TILE_ROWS * PANEL);
      return;
    }
  const int blocks = (steps + BLOCK_STEPS - 1) / BLOCK_STEPS, at_once = (steps + blocks - 1) / blocks;
  if (tiles == 1) {
    for (int p = 0; p < num; p++)
      for (int s = 0, now; s < steps; s += now) {
        now = Source::IS_DECODED ? std::min(at_once, steps - s) : steps;
        const BlockStart next = start(p, s + now);
        // Codes are asked for a block ahead; what is multiplied where it lies is one stream, asked for half a step ahead.
        const BlockStart from = start(p, s);
        const char* soon = Source::IS_DECODED ? (const char*)source.memory(next) : (const char*)source.memory(from) + 32 * LINES;
        multiply_16(x + s * act.step(), act.step(), source.block(from, now * TILE_K<X>, next), now,
                    out + (size_t)p * TILE_ROWS * PANEL, s == 0, Ahead<true>::within(now, soon, now * LINES));
      }
    return;
  }
  // Rows that do not fit are taken in blocks of K, all panels for each.
  const bool panel_by_panel = tiles * next_rows * sizeof(X) <= ACT_LIMIT;
  for (int i = 0, p = 0, s = 0; i < num * blocks; i++) {
    int next_p = p, next_s = s;
    if (panel_by_panel) next_s += at_once;
    else next_p++;
    if (next_s >= steps) next_s = 0, next_p++;
    if (next_p == num && !panel_by_panel) next_p = 0, next_s += at_once;
    const bool is_last = i == num * blocks - 1;  // what follows in memory is the next task's, or soon will be
    const BlockStart next = is_last ? start(num - 1, steps) : start(next_p, next_s);
    const int now = std::min(at_once, steps - s);
    multiply_block(x + (size_t)s * TILE_ROWS * TILE_K<X>, next_rows, tiles, source.block(start(p, s), now * TILE_K<X>, next), now,
                   out + (size_t)p * tiles * TILE_ROWS * PANEL, s == 0, source.memory(next), LINES);
    p = next_p, s = next_s;
  }
}
