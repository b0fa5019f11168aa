// Tokens of rows of logits: the most likely one, or one that is drawn.
//
// The semantics are those of specserve/compute/sampler.py (`best_of_rows`, `sample_rows`), which is the reference: temperature,
// top-k, top-p, min-p in this order, then the cumulative distribution in the order of the vocabulary is inverted at a given number.
// Probabilities are doubles here throughout, there floats where top-p cuts. Invariant: a row's token is a function of the row and
// its parameters, whatever the other rows are and however many threads there are.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "inputs.h"
#include "team.h"
#include "vec.h"

struct DrawRow {
  const float* logits;
  const uint32_t* mask;  // bit t % 32 of word t / 32: token t is allowed; null: all are
  double number;         // in [0, 1)
  double top_p, min_p;
  float temperature;
  int32_t top_k;  // 0: all
  int32_t token;  // what is drawn
  int32_t is_dead;  // nothing is allowed
};

struct Top {
  float value;
  bool has_nan;
};

constexpr int TOP_CHUNK = 8192;  // logits, which stay in the first cache level

INLINE Top top_of(const float* x, int n) {
  constexpr int WIDE = 4;
  f32x16 most[WIDE], bad = {};
  for (auto& m : most) m = splat(-INFINITY);
  int i = 0;
  for (; i + 16 * WIDE <= n; i += 16 * WIDE)
    for (int w = 0; w < WIDE; w++) {
      const f32x16 v = load(x + i + 16 * w);
      most[w] = vmax(most[w], v);
      bad = select(v == v, bad, splat(1.0f));
    }
  Top top{max_lane(vmax(vmax(most[0], most[1]), vmax(most[2], most[3]))), max_lane(bad) > 0};
  for (; i < n; i++) {
    top.has_nan |= x[i] != x[i];
    if (x[i] > top.value) top.value = x[i];
  }
  return top;
}

// tokens[r]: the first of the largest of row r; bad[r]: whether it holds NaN. Gives how many do.
static int best_of_rows(Team& team, std::vector<Top>& tops, const float* logits, int64_t stride, int rows, int vocab,
                        int64_t* tokens, uint8_t* bad) {
  const int chunks = (vocab + TOP_CHUNK - 1) / TOP_CHUNK;
  tops.resize((size_t)rows * chunks);
  auto work = [&](int) {
    for (int i; (i = team.next(rows * chunks)) >= 0;) {
      const int at = i % chunks * TOP_CHUNK;
      tops[i] = top_of(logits + i / chunks * stride + at, std::min(TOP_CHUNK, vocab - at));
    }
    team.barrier();
    for (int r; (r = team.next(rows)) >= 0;) {
      const Top* own = &tops[(size_t)r * chunks];
      int best = 0;
      bad[r] = own[0].has_nan;
      for (int c = 1; c < chunks; c++) {
        bad[r] |= own[c].has_nan;
        if (own[c].value > own[best].value) best = c;
      }
      const float* x = logits + r * stride;
      int64_t token = best * TOP_CHUNK;
      while (!bad[r] && x[token] != own[best].value) token++;
      tokens[r] = token;
    }
  };
  team.run(work);
  int num_bad = 0;
  for (int r = 0; r < rows; r++) num_bad += bad[r];
  return num_bad;
}

typedef float f32x8_any __attribute__((vector_size(32), aligned(4), may_alias));

// e^x of x up to 0, to about 2 ulp; 0 below -700.
INLINE f64x8 exp_of_negative(f64x8 x) {
  const f64x8 rounder = f64x8{} + INTEGER_ROUNDER;
  f64x8 n = x * 1.4426950408889634 + rounder;
  const i64x8 exponent = (i64x8)n - (i64x8)rounder;
  n = n - rounder;
  const f64x8 r = (x - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  constexpr double FACTORS[] = {1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
                                1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      0.5,         1.0,        1.0};
  f64x8 p = f64x8{} + 1.0 / 6227020800;
  for (double factor : FACTORS) p = p * r + factor;
  const f64x8 power = (f64x8)((i64x8)p + (exponent << 52));
  return x > -700.0 ? power : f64x8{};
}

constexpr int DRAW_BLOCK = 64;  // tokens

// One row's logits by its temperature, and what of them may be drawn.
class Draw {
 public:
  // `scaled` has room for whole blocks, `sums` for a number each.
  Draw(DrawRow& row, int vocab, float* scaled, double* sums)
      : row(row), blocks((vocab + DRAW_BLOCK - 1) / DRAW_BLOCK), vocab(vocab), scaled(scaled), sums(sums) {}

  void run() {
    scale();
    row.is_dead = peak == -INFINITY;
    row.token = vocab - 1;
    if (row.is_dead) return;
    if (row.top_k > 0 && row.top_k < vocab) floor = value_at_rank(row.top_k);
    if (row.top_p < 1.0) floor = value_at_mass(row.top_p);
    pick();
  }

 private:
  static constexpr int BUCKETS = 1024, BUCKETS_A_UNIT = 16;

  void scale() {
    const f32x16 temperature = splat(row.temperature);
    for (int i = 0; i < vocab; i += 16) store_n(scaled + i, load_n(row.logits + i, vocab - i) / temperature, vocab - i);
    std::fill(scaled + vocab, scaled + (size_t)blocks * DRAW_BLOCK, -INFINITY);
    if (row.mask)
      for (int i = 0; i < vocab; i += 32)
        if (const uint32_t word = row.mask[i / 32]; word != 0xffffffffu)
          for (int t = i; t < std::min(i + 32, vocab); t++)
            if (!(word >> (t - i) & 1)) scaled[t] = -INFINITY;
    f32x16 most = splat(-INFINITY);
    for (int i = 0; i < blocks * DRAW_BLOCK; i += 16) most = vmax(load(scaled + i), most);
    peak = max_lane(most);
  }

  // What the tokens of a block count, most likely ones 1.
  void weights(int block, double* out) const {
    const f64x8 most = f64x8{} + (double)peak;
    for (int i = 0; i < DRAW_BLOCK; i += 8) {
      const f64x8 value = __builtin_convertvector(*(const f32x8_any*)(scaled + block * DRAW_BLOCK + i), f64x8);
      const f64x8 weight = exp_of_negative(value - most);
      *(f64x8*)(out + i) = (value >= (double)floor) & (weight >= row.min_p) ? weight : f64x8{};
    }
  }

  int bucket(float value) const {
    const float at = (peak - value) * BUCKETS_A_UNIT;
    return at < BUCKETS - 1 ? (int)at : BUCKETS - 1;
  }

  std::vector<float> members(int of_bucket) const {
    std::vector<float> found;
    for (int i = 0; i < vocab; i++)
      if (scaled[i] >= floor && bucket(scaled[i]) == of_bucket) found.push_back(scaled[i]);
    return found;
  }

  // The k-th largest.
  float value_at_rank(int k) const {
    int counts[BUCKETS] = {};
    for (int i = 0; i < vocab; i++) counts[bucket(scaled[i])]++;
    int at = 0;
    for (; at < BUCKETS - 1 && counts[at] < k; at++) k -= counts[at];
    std::vector<float> found = members(at);
    if (found.empty()) return -INFINITY;  // NaN among them
    const auto there = found.begin() + std::min((size_t)k, found.size()) - 1;
    std::nth_element(found.begin(), there, found.end(), std::greater<float>());
    return *there;
  }

  // The least likely of the fewest most likely that have this share of the mass.
  float value_at_mass(double share) {
    double masses[BUCKETS] = {}, total = 0;
    alignas(64) double own[DRAW_BLOCK];
    const double min_p = row.min_p;
    row.min_p = 0;  // it comes behind
    for (int b = 0; b < blocks; b++) {
      weights(b, own);
      for (int i = 0; i < DRAW_BLOCK; i++) masses[bucket(scaled[b * DRAW_BLOCK + i])] += own[i];
    }
    row.min_p = min_p;
    for (double mass : masses) total += mass;
    const double wanted = share * total;
    double mass = 0;
    int at = 0;
    for (; at < BUCKETS - 1 && mass + masses[at] < wanted; at++) mass += masses[at];
    std::vector<float> found = members(at);
    std::sort(found.begin(), found.end(), std::greater<float>());
    for (float value : found)
      if ((mass += exp_of_negative(f64x8{} + ((double)value - peak))[0]) >= wanted) return value;
    return found.empty() ? floor : found.back();
  }

  void pick() {
    alignas(64) double own[DRAW_BLOCK];
    double total = 0, before = 0;
    int last = 0;
    for (int b = 0; b < blocks; b++) {
      weights(b, own);
      f64x8 sum = {};
      for (int i = 0; i < DRAW_BLOCK; i += 8) sum += *(const f64x8*)(own + i);
      sums[b] = 0;
      for (int i = 0; i < 8; i++) sums[b] += sum[i];
      total += sums[b];
      if (sums[b] > 0) last = b;
    }
    const double wanted = row.number * total;
    int b = 0;
    for (; b < last && before + sums[b] <= wanted; b++) before += sums[b];
    weights(b, own);
    for (int i = 0; i < DRAW_BLOCK; i++) {
      if (!(own[i] > 0)) continue;
      row.token = b * DRAW_BLOCK + i;  // the last of the block, if sums round so that none is beyond
      if ((before += own[i]) > wanted) return;
    }
  }

  DrawRow& row;
  const int blocks, vocab;
  float* scaled;
  double* sums;
  float peak = 0, floor = -INFINITY;
};
