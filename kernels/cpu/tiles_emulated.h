// AMX's tile instructions in plain code, so that level `amx` can be built and tested on CPUs without them (-DEMULATE_TILES).
//
// Says what results are, nothing of speed, nor of what a compiler may do with the real intrinsics. All tiles are 16 rows of 64
// bytes, as amx.h configures them; an instruction before the configuration, or after the release, ends the process.
// TDPBF16PS as amx.h describes it: subnormal numbers are zeros, of its inputs and of every step.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "vec.h"

namespace emulated {
struct alignas(64) Tile {
  uint32_t words[16][16];
};
static thread_local Tile tiles[8];
static thread_local bool configured = false;

static inline Tile& tile(int idx) {
  if (configured) return tiles[idx];
  fprintf(stderr, "a tile is used by a thread that has none\n");
  abort();
}

static void configure(const void* config) {
  const uint8_t* bytes = (const uint8_t*)config;
  configured = bytes[0] == 1;
  for (int i = 0; i < 8; i++) configured = configured && bytes[16 + 2 * i] == 64 && bytes[48 + i] == 16;
  memset(tiles, 0, sizeof(tiles));
}

static void load_rows(int to, const void* from, size_t stride) {
  for (int r = 0; r < 16; r++) memcpy(tile(to).words[r], (const char*)from + r * stride, 64);
}

static void store_rows(int from, void* to, size_t stride) {
  for (int r = 0; r < 16; r++) memcpy((char*)to + r * stride, tile(from).words[r], 64);
}

// All arithmetic between two of these flushes, as AVX-512 does with this setting.
struct Flush {
  unsigned before = _mm_getcsr();
  Flush() { _mm_setcsr(before | 0x8040); }
  ~Flush() { _mm_setcsr(before); }
};

static void multiply_bf16(int sums, int x, int w) {
  Flush flush;
  for (int r = 0; r < 16; r++) {
    f32x16 even = {}, odd = {};
    for (int p = 0; p < 16; p++) {
      const uint32_t both = tile(x).words[r][p];
      const u32x16 weights = load_pairs((const bf16*)tile(w).words[p]);
      even = fma(to_float((bf16)both), (f32x16)(weights << 16), even);
      odd = fma(to_float((bf16)(both >> 16)), (f32x16)(weights & 0xffff0000u), odd);
    }
    float* to = (float*)tile(sums).words[r];
    store(to, load(to) + (even + odd));
  }
}

static void multiply_int8(int sums, int x, int w) {
  for (int r = 0; r < 16; r++)
    for (int q = 0; q < 16; q++) {
      const int8_t* acts = (const int8_t*)&tile(x).words[r][q];
      const uint8_t* weights = (const uint8_t*)tile(w).words[q];
      for (int c = 0; c < 16; c++) {
        int32_t dot = 0;
        for (int k = 0; k < 4; k++) dot += acts[k] * weights[4 * c + k];
        tile(sums).words[r][c] += (uint32_t)dot;
      }
    }
}
}  // namespace emulated

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbsud
#define _tile_loadconfig(config) emulated::configure(config)
#define _tile_release() (emulated::configured = false)
#define _tile_loadd(to, from, stride) emulated::load_rows(to, from, stride)
#define _tile_stored(from, to, stride) emulated::store_rows(from, to, stride)
#define _tile_zero(to) memset(&emulated::tile(to), 0, sizeof(emulated::Tile))
#define _tile_dpbf16ps(sums, x, w) emulated::multiply_bf16(sums, x, w)
#define _tile_dpbsud(sums, x, w) emulated::multiply_int8(sums, x, w)
