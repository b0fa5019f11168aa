// What a step's rows begin with: embeddings, cos and sin of their positions, and where their keys and values go.
//
// cos and sin are made in doubles and then rounded, so that they have the same bits wherever they are made; angles are floats, as
// in specserve/model/rope.py, which is the reference.
#pragma once

#include <vector>

#include "vec.h"

typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));

constexpr double INTEGER_ROUNDER = 6755399441055744.0;  // added, it rounds to an integer in the low mantissa bits

// cos and sin of `half` angles, position * frequency each, times `scale`. Angles up to 2^20 quarters of a turn.
static void cos_sin_of(float position, const float* frequencies, int half, float scale, float* cos, float* sin) {
  for (int i = 0; i < half; i += 8) {
    const int num = half - i < 8 ? half - i : 8;
    f64x8 angle = {};
    for (int l = 0; l < num; l++) angle[l] = position * frequencies[i + l];
    const f64x8 rounder = f64x8{} + INTEGER_ROUNDER;
    f64x8 n = angle * 6.36619772367581382433e-01 + rounder;  // quarters of a turn
    const i64x8 quarter = (i64x8)n - (i64x8)rounder;
    n = n - rounder;
    const f64x8 r = (angle - n * 1.57079632673412561417) - n * 6.07710050650619224932e-11, z = r * r;
    // fdlibm's polynomials, to less than 2^-57
    const f64x8 s = r + r * z * (-1.66666666666666324348e-01 + z * (8.33333333332248946124e-03 + z * (-1.98412698298579493134e-04 +
                    z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10)))));
    const f64x8 c = 1.0 - 0.5 * z + z * z * (4.16666666666666019037e-02 + z * (-1.38888888888741095749e-03 +
                    z * (2.48015872894767294178e-05 + z * (-2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 +
                    z * -1.13596475577881948265e-11)))));
    const i64x8 is_odd = (quarter & 1) != 0;
    const f64x8 of_cos = is_odd ? s : c, of_sin = is_odd ? c : s;
    const f64x8 cosines = ((quarter + 1) & 2) != 0 ? -of_cos : of_cos, sines = (quarter & 2) != 0 ? -of_sin : of_sin;
    for (int l = 0; l < num; l++) {
      const float by = frequencies[i + l] != 0 ? scale : 1.0f;  // 0: no position turns these dimensions
      cos[i + l] = (float)cosines[l] * by, sin[i + l] = (float)sines[l] * by;
    }
  }
}

// out [n] = a row of the embedding, as floats, times `scale`.
template <class W>
static void embed_row(const W* row, int n, float scale, float* out) {
  for (int c = 0; c < n; c += 16) store_n(out + c, load_n(row + c, n - c) * scale, n - c);
}

// Of all rows and sequences, what follows from where sequences stand and which blocks they have.
struct Places {
  std::vector<int32_t> cu_query_lens, context_lens;  // [S + 1], [S]
  std::vector<const int32_t*> tables;                // [S]
  std::vector<int64_t> positions, slots;             // [T]; a slot is block * block_size + offset

  // `starts`: the position of each sequence's first row; `blocks`: all sequences' tables, one after the other.
  void set(int num_seqs, int num_rows, int block_size, const int64_t* starts, const int64_t* query_lens, const int64_t* table_lens,
           const int32_t* blocks) {
    cu_query_lens.assign(1, 0), context_lens.clear(), tables.clear();
    positions.resize(num_rows), slots.resize(num_rows);
    int64_t row = 0;
    for (int i = 0; i < num_seqs; blocks += table_lens[i++]) {
      for (int64_t at = starts[i]; at < starts[i] + query_lens[i]; at++, row++) {
        positions[row] = at;
        slots[row] = (int64_t)blocks[at / block_size] * block_size + at % block_size;
      }
      tables.push_back(blocks);
      context_lens.push_back((int32_t)(starts[i] + query_lens[i]));
      cu_query_lens.push_back((int32_t)row);
    }
  }
};
