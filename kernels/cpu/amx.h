// Products on Intel AMX: tiles of 16 rows x 64 bytes, and what keeps them in order.
//
// One configuration for everything, all eight tiles full: an instruction takes as long for 1 row as for 16 (16 cycles),
// because it is the 16 x 64 bytes of weights that go through the unit. So rows are padded to 16 with whatever lies there, and
// their results are not read. TDPBF16PS sums 16 even and 16 odd products apart, from zero, fused, and adds both to the sum,
// with subnormal numbers as zeros: within a row the order depends on K alone, and what is not a tile has to keep it.
//
// TDPBSUD's sums are whole numbers and exact in any order.
//
// Activations lie in tiles, [rows / 16][K / 32][16][32] bf16 or [rows / 16][K / 64][16][64] int8: a tile is 1 KiB in one piece,
// where rows of 2 KiB and more would fall on the same few sets of the first cache level. Fewer than 16 rows lie as
// [K / 32][rows][32], so that what is loaded beside them is of the steps that follow and takes no room. Weights are read where they
// are packed for all levels: 16 pairs (bf16) or fours (int8) of a panel are four tiles, 256 bytes from row to row.
#pragma once

#include "vec.h"
#ifdef EMULATE_TILES
#include "tiles_emulated.h"
#endif

constexpr int TILE_ROWS = 16;
template <class A>
constexpr int TILE_K = sizeof(A) <= 2 ? 64 / sizeof(A) : 32;  // inputs of a tile, or of as much of a row

template <class A>
constexpr bool IN_TILES = NATIVE_AMX && sizeof(A) <= 2;
INLINE int pad_rows(int rows) { return NATIVE_AMX ? (rows + TILE_ROWS - 1) / TILE_ROWS * TILE_ROWS : rows; }

// Rows of activations, padded with zeros to kp columns: in tiles or one behind the other.
template <class A>
struct Rows {
  static constexpr int K = TILE_K<A>;
  A* data;
  int kp, height;  // rows of a tile

  Rows(A* data, int kp, int num_rows) : data(data), kp(kp), height(num_rows < TILE_ROWS ? num_rows : TILE_ROWS) {}
  static size_t size(int num_rows, int kp) { return (size_t)pad_rows(num_rows) * kp + TILE_ROWS * K; }

  // From a multiple of 16 on, 16 columns are in one piece.
  INLINE_METHOD A* at(int row, int column) const {
    if constexpr (IN_TILES<A>)
      return data + (size_t)(row / TILE_ROWS) * kp * TILE_ROWS + (size_t)(column / K * height + row % TILE_ROWS) * K +
             column % K;
    else
      return data + (size_t)row * kp + column;
  }
  // From a tile's columns to the next.
  INLINE_METHOD size_t step() const { return IN_TILES<A> ? (size_t)height * K : K; }

  // n (at most 16) values from `column` on, which need not be a multiple of 16.
  INLINE_METHOD void set(int row, int column, f32x16 v, int n) const {
    if (column % 16 == 0) return store_n(at(row, column), v, n);
    float values[16];
    store(values, v);
    for (int i = 0; i < n && i < 16; i++) from_float(at(row, column + i), values[i]);
  }
  INLINE_METHOD void clear_from(int row, int column) const {
    for (; column < kp; column++) *at(row, column) = A(0);
  }
};

#if NATIVE_AMX
// A thread that multiplies holds one; without it there are no tiles, and with it each switch of threads saves 8 KiB.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
    // GCC 12's header says that the first 8 bytes are read: stores to the others may be left out (ggml's were).
    asm volatile("" : : "r"(&config) : "memory");
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
};

constexpr int WEIGHT_STRIDE = 4 * 64;  // bytes from one pair or four of a panel's inputs to the next

// GCC does not know that tile loads read memory: what was written before stays before.
INLINE void tile_fence() { asm volatile("" ::: "memory"); }

// Tiles 0 to 3 are sums, 16 x 16 floats each, of rows that are 64 floats apart.
constexpr int SUM_STRIDE = 4 * 64;
INLINE void load_sums(const float* c0, const float* c1, const float* c2, const float* c3, bool first) {
  tile_fence();
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c0, SUM_STRIDE);
  _tile_loadd(1, c1, SUM_STRIDE);
  _tile_loadd(2, c2, SUM_STRIDE);
  _tile_loadd(3, c3, SUM_STRIDE);
}
INLINE void store_sums(float* c0, float* c1, float* c2, float* c3) {
  _tile_stored(0, c0, SUM_STRIDE);
  _tile_stored(1, c1, SUM_STRIDE);
  _tile_stored(2, c2, SUM_STRIDE);
  _tile_stored(3, c3, SUM_STRIDE);
}

// Subnormal numbers are zeros, as they are to tiles.
class FlushSubnormals {
 public:
  FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(before_); }
  FlushSubnormals(const FlushSubnormals&) = delete;

 private:
  unsigned before_;
};

// c [64] = the first row of x times 64 columns of weights, in the order of tiles and with their bits (of a NaN, any).
//
// A row alone is bound by memory, and a core that uses tiles runs slower.
INLINE void multiply_1(const bf16* x, const bf16* w, int steps, float* c) {
  FlushSubnormals flush;
  f32x16 sum[4] = {};
  for (int s = 0; s < steps; s++, x += TILE_K<bf16>) {
    f32x16 even[4] = {}, odd[4] = {};
    for (int p = 0; p < TILE_K<bf16>; p += 2, w += 2 * 64) {
      const float x0 = to_float(x[p]), x1 = to_float(x[p + 1]);
      for (int b = 0; b < 4; b++) {
        u32x16 words = load_pairs(w + 32 * b);
        even[b] = fma(x0, (f32x16)(words << 16), even[b]);
        odd[b] = fma(x1, (f32x16)(words & 0xffff0000u), odd[b]);
      }
    }
    for (int b = 0; b < 4; b++) sum[b] = sum[b] + (even[b] + odd[b]);
  }
  for (int b = 0; b < 4; b++) store(c + 16 * b, sum[b]);
}

// Tile numbers are part of the instruction's name to GCC. X: bf16, or int8_t (times uint8_t; sums are int32_t in floats' place).
#define TILE_PRODUCT(sums, x, w) \
  if constexpr (sizeof(X) == 2) _tile_dpbf16ps(sums, x, w); \
  else _tile_dpbsud(sums, x, w)

// c [16][64] (+)= x, one tile of rows (or fewer), times 64 columns of weights, `steps` times a tile's inputs.
template <class X, class W, class Next>
INLINE void multiply_16(const X* x, size_t x_step, const W* w, int steps, float* c, bool first, Next&& ahead) {
  constexpr int EACH = 4 / sizeof(W);  // inputs of a column that lie together
  load_sums(c, c + 16, c + 32, c + 48, first);
  for (int s = 0; s < steps; s++, x += x_step, w += 64 * TILE_K<X>) {
    ahead.step();
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, WEIGHT_STRIDE);
    TILE_PRODUCT(0, 4, 6);
    _tile_loadd(7, w + 16 * EACH, WEIGHT_STRIDE);
    TILE_PRODUCT(1, 4, 7);
    _tile_loadd(6, w + 32 * EACH, WEIGHT_STRIDE);
    TILE_PRODUCT(2, 4, 6);
    _tile_loadd(7, w + 48 * EACH, WEIGHT_STRIDE);
    TILE_PRODUCT(3, 4, 7);
  }
  store_sums(c, c + 16, c + 32, c + 48);
}

// The same for two tiles of rows and 32 of the columns: each tile that is loaded is used twice.
template <class X, class W, class Next>
INLINE void multiply_32(const X* x, size_t next_rows, const W* w, int steps, float* c, bool first, Next&& ahead) {
  constexpr int EACH = 4 / sizeof(W);
  float* c2 = c + 16 * 64;
  load_sums(c, c + 16, c2, c2 + 16, first);
  for (int s = 0; s < steps; s++, x += TILE_ROWS * TILE_K<X>, w += 64 * TILE_K<X>) {
    ahead.step();
    _tile_loadd(6, w, WEIGHT_STRIDE);
    _tile_loadd(4, x, 64);
    TILE_PRODUCT(0, 4, 6);
    _tile_loadd(5, x + next_rows, 64);
    TILE_PRODUCT(2, 5, 6);
    _tile_loadd(7, w + 16 * EACH, WEIGHT_STRIDE);
    TILE_PRODUCT(1, 4, 7);
    TILE_PRODUCT(3, 5, 7);
  }
  store_sums(c, c + 16, c2, c2 + 16);
}
#undef TILE_PRODUCT
#else
struct Tiles {
  Tiles() {}  // says that it is used
};
#endif
