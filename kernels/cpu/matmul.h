// Rows of activations times panels (64 columns) of packed weight matrices.
//
// A matrix is stored panel by panel, within a panel by pairs or fours of input elements, so that a panel is one stream of memory:
//   F32   [panel][K][64] float
//   BF16  [panel][K/2][64][2] bfloat16
//   INT8  [panel][K/4][64][4] uint8, 128 above the value
//   INT4  [panel][K/4][2][64] bytes of two codes, and [panel][K/16][64][2] steps and offsets (int8.h)
// K is padded with zeros to a multiple of 64, N to whole panels. INT8 and INT4 have one scale for each column, are multiplied by rows
// of integers (quantize.h), and their sums are exact; codes of 4 bits are decoded in the first cache level, once for the rows of a
// task (choose_blocks). With AMX, AVX-512 BF16 or NEON's BF16 other activations are bf16, and products are tiles (matmul_tiles.h)
// or pairs; elsewhere they are fp32 and weights are widened. Sums are fp32 over K in ascending order, whatever the number of rows,
// and however K is cut into blocks: a sum that is stored and loaded again is the same.
#pragma once

#include <algorithm>

#include "ahead.h"
#include "int8.h"
#include "quantize.h"

enum Format { F32 = 0, BF16 = 1, INT8 = 2, INT4 = 3 };
constexpr int PANEL = 64;

struct Matrix {
  const void* data;
  const uint8_t* groups;  // INT4: steps and offsets
  const float* scales;    // INT8 and INT4: [panels][64]
  const float* bias;      // [n] or null
  int32_t n, k, kp, format;

  int panels() const { return (n + PANEL - 1) / PANEL; }
  size_t num_bytes() const { return (size_t)panels() * PANEL * kp * (format == F32 ? 4 : format == BF16 ? 2 : 1); }
};

// Whether so many bytes of weights may be read again for each block of rows: they stay in the last cache level.
INLINE bool is_near(size_t num_bytes) { return num_bytes <= 4 << 20; }

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

template <int MR, int NB>
INLINE void begin(const float* tile, f32x16 (&acc)[MR][NB], bool from_zero) {
  for (int r = 0; r < MR; r++)
    for (int c = 0; c < NB; c++) acc[r][c] = from_zero ? f32x16{} : load(tile + r * PANEL + 16 * c);
}

template <int MR, int NB>
INLINE void finish(float* tile, f32x16 (&acc)[MR][NB]) {
  for (int r = 0; r < MR; r++)
    for (int c = 0; c < NB; c++) store(tile + r * PANEL + 16 * c, acc[r][c]);
}

// once(step) for each step of K, of which LINE use up a cache line of a row. Where there are `soon`, rows that the next pass
// multiplies, a line of each comes from the second level or farther meanwhile.
template <int MR, int LINE, class A, class F>
INLINE void each_step(int steps, const A* soon, int stride, F&& once) {
  int p = 0;
  if (BLOCKS_AT_ONCE == 4 && soon)
    for (; p + LINE <= steps; p += LINE) {
      for (int r = 0; r < MR; r++) __builtin_prefetch((const char*)(soon + r * stride) + p * (64 / LINE), 0, 3);
      for (int i = 0; i < LINE; i++) once(p + i);
    }
  for (; p < steps; p++) once(p);
}

// tile [MR][64] = x [MR][inputs of `steps`] * w, or goes on from there if this is not the first block of K.
#if NATIVE_BF16
template <int MR, class Next>
INLINE void multiply(const bf16* x, int stride, const bf16* w, int steps, float* tile, bool first, Next& ahead,
                     const bf16* soon = nullptr) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB];
    begin<MR, NB>(tile + 16 * b, acc, first);
    const bf16* from = w + 32 * b;
    each_step<MR, 16>(steps, soon, stride, [&](int p) INLINE_LAMBDA {
      ahead.step();
      bf16x32 weight[NB];
      for (int c = 0; c < NB; c++) weight[c] = load_bf16(from + 32 * c);
      for (int r = 0; r < MR; r++) {
        const bf16x32 both = splat_pair(x + r * stride + 2 * p);
        for (int c = 0; c < NB; c++) acc[r][c] = add_dots(acc[r][c], both, weight[c]);
      }
      from += 2 * PANEL;
    });
    finish<MR, NB>(tile + 16 * b, acc);
  }
}
#else
template <int MR, class Next>
INLINE void multiply(const bf16*, int, const bf16*, int, float*, bool, Next&, const bf16* = nullptr) {
  __builtin_trap();  // bf16 activations need the instructions
}
#endif

template <int MR, class Next>
INLINE void multiply(const float* x, int stride, const bf16* w, int steps, float* tile, bool first, Next& ahead,
                     const float* soon = nullptr) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB];
    begin<MR, NB>(tile + 16 * b, acc, first);
    each_step<MR, 8>(steps, soon, stride, [&](int p) INLINE_LAMBDA {
      ahead.step();
      for (int c = 0; c < NB; c++) {
        u32x16 words = load_pairs(w + p * 2 * PANEL + 32 * (b + c));
        f32x16 even = (f32x16)(words << 16), odd = (f32x16)(words & 0xffff0000u);
        for (int r = 0; r < MR; r++) {
          acc[r][c] = fma(x[r * stride + 2 * p], even, acc[r][c]);
          acc[r][c] = fma(x[r * stride + 2 * p + 1], odd, acc[r][c]);
        }
      }
    });
    finish<MR, NB>(tile + 16 * b, acc);
  }
}

template <int MR, class Next>
INLINE void multiply(const float* x, int stride, const float* w, int steps, float* tile, bool first, Next& ahead,
                     const float* soon = nullptr) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    f32x16 acc[MR][NB];
    begin<MR, NB>(tile + 16 * b, acc, first);
    each_step<MR, 16>(steps, soon, stride, [&](int k) INLINE_LAMBDA {
      ahead.step();
      for (int c = 0; c < NB; c++) {
        f32x16 weight = load(w + k * PANEL + 16 * (b + c));
        for (int r = 0; r < MR; r++) acc[r][c] = fma(x[r * stride + k], weight, acc[r][c]);
      }
    });
    finish<MR, NB>(tile + 16 * b, acc);
  }
}

// Sums of whole numbers, in the memory of floats.
template <int MR, class Next>
INLINE void multiply(const int8_t* x, int stride, const uint8_t* w, int steps, float* tile, bool first, Next& ahead,
                     const int8_t* soon = nullptr) {
  constexpr int NB = BLOCKS_AT_ONCE;
  for (int b = 0; b < 4; b += NB) {
    i32x16 acc[MR][NB];
    for (int r = 0; r < MR; r++)
      for (int c = 0; c < NB; c++) acc[r][c] = first ? splat_int(0) : (i32x16)load(tile + r * PANEL + 16 * (b + c));
    each_step<MR, 16>(steps, soon, stride, [&](int q) INLINE_LAMBDA {
      ahead.step();
      Weights8 weight[NB];
      for (int c = 0; c < NB; c++) weight[c] = load_weights(w + 4 * PANEL * q + 64 * (b + c));
      for (int r = 0; r < MR; r++) {
        const Acts8 acts = splat_quad(x + r * stride + 4 * q);
        for (int c = 0; c < NB; c++) acc[r][c] = add_products(acc[r][c], acts, weight[c]);
      }
    });
    for (int r = 0; r < MR; r++)
      for (int c = 0; c < NB; c++) store(tile + r * PANEL + 16 * (b + c), (f32x16)acc[r][c]);
  }
}

constexpr int MANY_ROWS = 32;           // from here on a task's rows leave the first cache level between two panels
constexpr int BLOCK_BYTES = 24 * 1024;  // of weights, at most: half of the first cache level

// Where a block of K begins.
struct BlockStart {
  const Matrix* matrix;
  int panel, input;

  size_t inputs_before() const { return (size_t)panel * matrix->kp + input; }
};

// Weights that are multiplied where they lie.
template <class W>
struct InMemory {
  typedef W Weight;
  static constexpr bool IS_DECODED = false;
  static constexpr int INPUT_BYTES = PANEL * sizeof(W);  // of memory, for an input

  static const W* memory(const BlockStart& at) { return (const W*)at.matrix->data + at.inputs_before() * PANEL; }
  const W* block(const BlockStart& at, int, const BlockStart&) { return memory(at); }
};

// Codes of 4 bits, decoded in blocks of whole groups. Steps and offsets of the `next` block are asked for meanwhile.
struct FourBits {
  typedef uint8_t Weight;
  static constexpr bool IS_DECODED = true;
  static constexpr int INPUT_BYTES = CODE_BYTES / 4;
  alignas(64) uint8_t decoded[BLOCK_BYTES];

  static const uint8_t* memory(const BlockStart& at) {
    return (const uint8_t*)at.matrix->data + at.inputs_before() * INPUT_BYTES;
  }
  static const uint8_t* groups(const BlockStart& at) {
    return at.matrix->groups + at.inputs_before() / (4 * GROUP_QUADS) * GROUP_BYTES;
  }
  const uint8_t* block(const BlockStart& at, int inputs, const BlockStart& next) {
    decode_int4(memory(at), groups(at), inputs / 4, decoded, groups(next));
    return decoded;
  }
};

// A step of K in panels of W: a pair, or four.
template <class W>
constexpr int INPUTS = sizeof(W) == 4 ? 1 : 4 / sizeof(W);

// Rows are taken in passes of equal height.
INLINE int num_passes(int rows) { return (rows + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE; }

// `behind`: where the rows' next block of K begins, if they are too many to stay in the first cache level.
template <class A, class W, class Next>
static void multiply_rows(const A* x, int stride, int rows, const W* w, int steps, float* tile, bool first, Next&& ahead,
                          const A* behind = nullptr) {
  for (int passes = num_passes(rows), r = 0; passes; passes--) {
    const int now = (rows - r + passes - 1) / passes;
    const A* from = x + (size_t)r * stride;
    const A* soon = !behind || passes == 1 ? behind : from + (size_t)now * stride;
    float* to = tile + r * PANEL;
    switch (now) {
      case 1: multiply<1>(from, stride, w, steps, to, first, ahead); break;
      case 2: multiply<2>(from, stride, w, steps, to, first, ahead); break;
      case 3: multiply<3>(from, stride, w, steps, to, first, ahead); break;
      case 4: multiply<4>(from, stride, w, steps, to, first, ahead, soon); break;
      case 5: multiply<5>(from, stride, w, steps, to, first, ahead, soon); break;
      default: multiply<ROWS_AT_ONCE>(from, stride, w, steps, to, first, ahead, soon);
    }
    r += now;
  }
}

// A block of K stays in the first cache level while all rows pass, and the one behind it comes from memory meanwhile: of this
// panel, or at its end of the next. So do the pieces that are wanted behind the products.
template <class Source, class A>
static void multiply_blocks(const Panel& panel, const A* x, int rows, float* tile) {
  typedef typename Source::Weight W;
  constexpr int EACH = INPUTS<W>, LINES = EACH * Source::INPUT_BYTES / 64, MOST = BLOCK_BYTES / 2 / (EACH * PANEL * sizeof(W));
  Source source;
  const Matrix* m = panel.matrix;
  const int kp = m->kp, steps = kp / EACH, passes = num_passes(rows) * (4 / BLOCKS_AT_ONCE);
  Pieces others = Pieces::within(steps * passes, panel.wanted, panel.num_wanted);
  if constexpr (!Source::IS_DECODED)
    if (rows == 1 && passes == 1) {
      const W* w = source.memory({m, panel.idx, 0});
      if (!others.lines) return multiply_rows(x, kp, rows, w, steps, tile, true, Nothing());
      return multiply_rows(x, kp, rows, w, steps, tile, true, others);
    }
  const int blocks = (steps + MOST - 1) / MOST, equal = (steps + blocks - 1) / blocks;
  const int at_once = (equal + GROUP_QUADS - 1) / GROUP_QUADS * GROUP_QUADS;  // codes are decoded by groups
  for (int p = 0; p < steps; p += at_once) {
    const int now = std::min(at_once, steps - p), left = steps - p - now;
    const BlockStart from{m, panel.idx, EACH * p};
    BlockStart next = from;  // if there is none
    int soon = 0;
    if (left) next.input += EACH * now, soon = std::min(at_once, left);
    else if (panel.next < m->panels()) next = {m, panel.next, 0}, soon = std::min(at_once, steps);
    const W* w = source.block(from, EACH * now, next);
    Ahead<true> base = Ahead<true>::within(now * passes, source.memory(next), soon * LINES);
    const A* behind = rows >= MANY_ROWS ? x + EACH * (left ? p + now : 0) : nullptr;
    if (!others.lines) multiply_rows(x + EACH * p, kp, rows, w, now, tile, p == 0, base, behind);
    else multiply_rows(x + EACH * p, kp, rows, w, now, tile, p == 0, Both{base, others}, behind);
  }
}

// out [rows][64]: sums of whole numbers become what they stand for.
static void scale_sums(const Panel& panel, const QuantizedRows& act, int row, int rows, float* out) {
  const float* scales = panel.matrix->scales + (size_t)panel.idx * PANEL;
  for (int r = 0; r < rows; r++, out += PANEL)
    for (int c = 0; c < PANEL; c += 16) {
      const i32x16 sums = (i32x16)load(out + c) - WEIGHT_ZERO * act.sums[row + r];
      store(out + c, to_floats(sums) * act.scales[row + r] * load(scales + c));
    }
}

// out [rows][64] = x [rows][kp] * one panel, without bias.
template <class A>
static void multiply_panel(const Panel& panel, const A* x, int rows, float* out) {
  const int format = panel.matrix->format;
  if constexpr (sizeof(A) == 1) {
    if (format == INT8) multiply_blocks<InMemory<uint8_t>>(panel, x, rows, out);
    else multiply_blocks<FourBits>(panel, x, rows, out);
  } else if (format == BF16) multiply_blocks<InMemory<bf16>>(panel, x, rows, out);
  else if constexpr (sizeof(A) == 4) multiply_blocks<InMemory<float>>(panel, x, rows, out);
  else __builtin_trap();
}

// The same for one row and 4-bit codes, which need not be decoded. False where the CPU cannot do that.
static bool multiply_codes(const Panel& panel, const int8_t* x, int row_sum, float* out) {
#if defined(__AVX512F__) && defined(__AVX512VNNI__)
  const BlockStart at{panel.matrix, panel.idx, 0};
  const int quads = panel.matrix->kp / 4;
  multiply_1_int4(x, FourBits::memory(at), FourBits::groups(at), quads, WEIGHT_ZERO * row_sum, (int32_t*)out,
                  Pieces::within(quads, panel.wanted, panel.num_wanted));
  return true;
#else
  return false;
#endif
}

#if NATIVE_AMX
#include "matmul_tiles.h"
#endif

// out [num][padded rows][64] = rows `row` and following of x times each panel, all of matrices with the same kp and format,
// without bias. `act` are those rows as integers, for matrices that want them.
template <class A>
static void multiply_panels(const Panel* panels, int num, const Rows<A>& x, const QuantizedRows& act, int row, int rows, float* out) {
  const Matrix& m = *panels[0].matrix;
  const size_t each = (size_t)pad_rows(rows) * PANEL;
  if (m.format == F32 || m.format == BF16) {
#if NATIVE_AMX
    if constexpr (sizeof(A) == 2) return multiply_tiles<InMemory<bf16>>(panels, num, x, row, rows, out);
#endif
    for (int p = 0; p < num; p++) multiply_panel(panels[p], x.at(row, 0), rows, out + p * each);
    return;
  }
#if NATIVE_AMX
  if (rows > 1 || act.codes.height > 1) {
    if (m.format == INT8) multiply_tiles<InMemory<uint8_t>>(panels, num, act.codes, row, rows, out);
    else multiply_tiles<FourBits>(panels, num, act.codes, row, rows, out);
  } else
#endif
    for (int p = 0; p < num; p++) {
      const int8_t* from = act.codes.at(row, 0);
      float* to = out + p * each;
      const bool is_done = rows == 1 && m.format == INT4 && multiply_codes(panels[p], from, act.sums[row], to);
      if (!is_done) multiply_panel(panels[p], from, rows, to);
    }
  for (int p = 0; p < num; p++) scale_sums(panels[p], act, row, rows, out + p * each);
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
  return {std::min(MAX_ROWS, pad_rows(std::max(1, num_rows))), std::clamp(num_panels / (4 * threads), 1, most)};
}
