// Rows of activations as 8-bit integers: rotated, so that no column stands out, then rounded to one step for a whole row.
//
// A block of `rotation_size` columns is multiplied by a Hadamard matrix (entries 1 and -1), as the weights were before they were
// rounded (kernels/integers.py): the product of both is the same, but for the matrix' factor, which the weights' scales hold.
// Single columns of activations are much larger than others, and with steps for the largest of them the others are lost: "QuaRot",
// Ashkboos et al. 2024; we rotate in blocks, in front of every matrix, and nothing is merged into others.
// Every operation is a single rounding in fp32 in one order, so that a row has the same codes at all levels and in torch.
#pragma once

#include <algorithm>

#include "amx.h"

// The largest power of two that divides kp, a multiple of 64, but at most 512.
INLINE int rotation_size(int kp) { return std::min(kp & -kp, 512); }

struct QuantizedRows {
  Rows<int8_t> codes;
  float* scales;  // of each row: its largest rotated value / 127; NaN where one is not finite, 0 where all are (nearly) 0
  int32_t* sums;  // of each row's codes
};

// Lane i becomes v[i] + v[i + H] or v[i - H] - v[i].
template <int H>
INLINE f32x16 butterfly(f32x16 v) {
  alignas(64) static const float signs[4][16] = {
      {1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1, 1, -1}, {1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1, 1, 1, -1, -1},
      {1, 1, 1, 1, -1, -1, -1, -1, 1, 1, 1, 1, -1, -1, -1, -1}, {1, 1, 1, 1, 1, 1, 1, 1, -1, -1, -1, -1, -1, -1, -1, -1}};
  return fma(v, load(signs[H == 1 ? 0 : H == 2 ? 1 : H == 4 ? 2 : 3]), swap_lanes<H>(v));
}

// x [kp] = the row, rotated; blocks of `size`, columns at a distance of 1 first.
template <class A>
static void rotate_row(const Rows<A>& in, int row, int size, float* x) {
  for (int k = 0; k < in.kp; k += 64) {
    f32x16 v[4];
    for (int i = 0; i < 4; i++) v[i] = butterfly<8>(butterfly<4>(butterfly<2>(butterfly<1>(load(in.at(row, k + 16 * i))))));
    const f32x16 a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3];
    store(x + k, a + c);
    store(x + k + 16, b + d);
    store(x + k + 32, a - c);
    store(x + k + 48, b - d);
  }
  for (int distance = 64; distance < size; distance *= 2)
    for (int k = 0; k < in.kp; k += 2 * distance)
      for (int i = k; i < k + distance; i += 16) {
        const f32x16 a = load(x + i), b = load(x + i + distance);
        store(x + i, a + b);
        store(x + i + distance, a - b);
      }
}

// Writes row `row` of `out`; x [kp] is scratch.
template <class A>
static void quantize_row(const Rows<A>& in, int row, const QuantizedRows& out, float* x) {
  rotate_row(in, row, rotation_size(in.kp), x);
  f32x16 tops = {}, bad = {};
  for (int k = 0; k < in.kp; k += 16) {
    const f32x16 v = load(x + k);
    tops = vmax(tops, vmax(v, -v));
    bad = fma(v, splat(0.0f), bad);  // NaN once a value is not finite
  }
  const float top = max_lane(tops);
  const bool finite = sum(bad) == 0.0f, empty = !finite || top < 1e-30f;
  const float per_step = empty ? 0.0f : 127.0f / top;
  f32x16 total = {};
  for (int k = 0; k < in.kp; k += 16) {
    const f32x16 v = empty ? f32x16{} : load(x + k);
    const f32x16 whole = v * per_step + 12582912.0f;  // rounds to an integer in the low mantissa bits
    total += whole - 12582912.0f;                     // whole numbers below 2^24: exact
    store_codes(out.codes.at(row, k), (i32x16)whole - 0x4b400000);
  }
  out.scales[row] = !finite ? NAN : empty ? 0.0f : top / 127.0f;
  out.sums[row] = (int32_t)sum(total);
}
