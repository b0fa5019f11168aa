// Rows of activations that lie in tiles times panels of packed weights: blocks of K on AMX (amx.h).
//
// Part of matmul.h, which says how matrices lie. Sums go on where they stopped: no block of K changes an order.
#pragma once

static_assert(WEIGHT_ZERO == 128, "TDPBSUD takes weights as they are stored");
constexpr int BLOCK_STEPS = 6;              // 24 KiB of weights and 12 of rows: both stay in the first cache level
constexpr size_t ACT_LIMIT = 1024 * 1024;  // bytes of rows that may stay in the second

// Weights that are multiplied where they lie; a step is a tile's inputs.
template <class W>
struct InMemory {
  typedef W Weight;
  static constexpr int LINES = 64;  // of memory, of a step
  const Panel* panels;

  const W* memory(int p, int step) const {
    return (const W*)panels[p].matrix->data + ((size_t)panels[p].idx * panels[p].matrix->kp + step * TILE_K<W>) * PANEL;
  }
  const W* block(int p, int step, int) const { return memory(p, step); }
};

struct FourBits {
  typedef uint8_t Weight;
  static constexpr int LINES = 32;
  const Panel* panels;
  alignas(64) uint8_t decoded[BLOCK_STEPS * 64 * PANEL];

  explicit FourBits(const Panel* panels) : panels(panels) {}
  const uint8_t* memory(int p, int step) const { return Codes::of(*panels[p].matrix, panels[p].idx, 64 * step).codes; }
  const uint8_t* block(int p, int step, int steps) {
    const Codes from = Codes::of(*panels[p].matrix, panels[p].idx, 64 * step);
    decode_int4(from.codes, from.groups, 16 * steps, decoded);
    return decoded;
  }
};

// out [padded rows][64] (+)= rows times a block of a panel, while the block that comes next is fetched from memory, a few lines
// in each step: memory does not wait for products, nor they for it. A step of that block has `num_lines`.
template <class X, class W>
static void multiply_block(const X* x, size_t next_rows, int tiles, const W* w, int steps, float* out, bool first,
                           const void* next, int num_lines) {
  const int lines = (num_lines + tiles - 1) / tiles;  // in as many passes as there are tiles
  int pass = 0;
  auto fetch = [&]() -> Fetch<false> {
    const int start = std::min(pass++ * lines, num_lines);
    return {(const char*)next + (size_t)start * steps * 64, std::min(lines, num_lines - start)};
  };
  int t = 0;
  for (; t + 2 <= tiles; t += 2)
    for (int half = 0; half < 2; half++)
      multiply_32(x + t * next_rows, next_rows, w + 32 * INPUTS<W> * half, steps, out + t * TILE_ROWS * PANEL + 32 * half, first,
                  fetch());
  if (t < tiles) multiply_16(x + t * next_rows, TILE_ROWS * TILE_K<X>, w, steps, out + t * TILE_ROWS * PANEL, first, fetch());
}

// out [num][padded rows][64], from rows that lie in tiles; of int8 rows the sums are int32.
template <class X, class Source>
static void multiply_tiles(Source source, int num, const Rows<X>& act, int row, int rows, float* out) {
  const X* x = act.at(row, 0);
  const int kp = act.kp, steps = kp / TILE_K<X>, tiles = pad_rows(rows) / TILE_ROWS;
  const size_t next_rows = (size_t)kp * TILE_ROWS;
  constexpr bool STORED = !std::is_same_v<Source, FourBits>;
  if constexpr (sizeof(X) == 2)
    if (act.height == 1) {
      for (int p = 0; p < num; p++) multiply_1(x, source.memory(p, 0), steps, out + (size_t)p * TILE_ROWS * PANEL);
      return;
    }
  const int blocks = (steps + BLOCK_STEPS - 1) / BLOCK_STEPS, at_once = (steps + blocks - 1) / blocks;
  if (tiles == 1) {
    for (int p = 0; p < num; p++)
      for (int s = 0, now; s < steps; s += now) {
        now = STORED ? steps : std::min(at_once, steps - s);
        const char* next = (const char*)source.memory(p, STORED ? 0 : s + now) + 2048 * STORED;
        multiply_16(x + s * act.step(), act.step(), source.block(p, s, now), now, out + (size_t)p * TILE_ROWS * PANEL, s == 0,
                    Fetch<true>{next, Source::LINES});
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
    const void* next = is_last ? source.memory(num - 1, steps) : source.memory(next_p, next_s);
    const int now = std::min(at_once, steps - s);
    multiply_block(x + (size_t)s * TILE_ROWS * TILE_K<X>, next_rows, tiles, source.block(p, s, now), now,
                   out + (size_t)p * tiles * TILE_ROWS * PANEL, s == 0, next, Source::LINES);
    p = next_p, s = next_s;
  }
}
