// One position of lookahead heads, for sequences of any adapters: drafters/head.py says what is computed.
//
// Every row names its own head, so heads of different sizes run in one call and nothing is stacked. Weights are bf16 as
// stored, matrices [in][out], the embedding [U][d]; sums are fp32.
#pragma once

#include <algorithm>
#include <vector>

#include "lora.h"
#include "team.h"

struct Head {
  const bf16 *init_weight, *embed, *moves, *next_weight, *gates_x, *gates_s, *out_weight, *copy_weight, *slot_weight;
  const float *init_bias, *out_bias, *gates_bias, *candidate_bias, *slot_bias;
  int32_t hidden_size, d, window;
  int32_t num_tokens;  // task tokens; behind them padding that is never chosen
  int32_t num_vocab;   // with padding and "another token", the last
  int32_t unused;
};

struct HeadRow {
  const Head* head;
  float* state;  // [d]
  const float *last, *tapped;  // [H], read by begin
  const int32_t* window;       // [window], -1 where empty
  int32_t token, moved, choice;
  float probability;
};

constexpr int HEAD_CHUNK = 256;  // vocabulary rows of a task

// y [n] = bias + x [k] M, M [k][n]
static void times(const bf16* matrix, const float* bias, const float* x, int k, int n, float* y) {
  for (int c = 0; c < n; c++) y[c] = bias ? bias[c] : 0.0f;
  for (int c = 0; c < n; c += 64) {
    alignas(64) float part[64] = {};
    const int num = std::min(64, n - c);
    std::copy(y + c, y + c + num, part);
    expand(matrix + c, n, k, x, num, part);
    std::copy(part, part + num, y + c);
  }
}

INLINE float sigmoid(float x) { return 1.0f / (1.0f + std::exp(-x)); }

static void begin_head(HeadRow& row, std::vector<float>& scratch) {
  const Head& head = *row.head;
  const int n = head.hidden_size;
  scratch.resize(2 * n);
  const float* inputs[2] = {row.last, row.tapped};
  for (int i = 0; i < 2; i++) {
    double squares = 0;
    for (int c = 0; c < n; c++) squares += (double)inputs[i][c] * inputs[i][c];
    const float scale = 1.0f / std::sqrt((float)(squares / n) + 1e-6f);
    for (int c = 0; c < n; c++) scratch[i * n + c] = inputs[i][c] * scale;
  }
  times(head.init_weight, head.init_bias, scratch.data(), 2 * n, head.d, row.state);
  for (int c = 0; c < head.d; c++) row.state[c] = std::tanh(row.state[c]);
}

// The GRU cell; then scratch holds the output vector [d] and the copy query [d].
static void feed_head(HeadRow& row, std::vector<float>& scratch) {
  const Head& head = *row.head;
  const int d = head.d;
  scratch.resize(10 * d);
  float *x = scratch.data() + 2 * d, *next = x + d, *from_x = next + d, *from_s = from_x + 3 * d;
  const int next_token = head.window ? std::max(0, row.window[0]) : head.num_vocab - 1;
  for (int c = 0; c < d; c++) next[c] = to_float(head.embed[(size_t)next_token * d + c]);
  times(head.next_weight, nullptr, next, d, d, x);
  for (int c = 0; c < d; c++)
    x[c] += to_float(head.embed[(size_t)row.token * d + c]) + to_float(head.moves[row.moved * d + c]);
  times(head.gates_x, head.gates_bias, x, d, 3 * d, from_x);
  times(head.gates_s, nullptr, row.state, d, 3 * d, from_s);
  for (int c = 0; c < d; c++) {
    const float reset = sigmoid(from_x[c] + from_s[c]), update = sigmoid(from_x[d + c] + from_s[d + c]);
    const float candidate = std::tanh(from_x[2 * d + c] + reset * (from_s[2 * d + c] + head.candidate_bias[c]));
    row.state[c] = candidate + update * (row.state[c] - candidate);
  }
  times(head.out_weight, nullptr, row.state, d, d, scratch.data());
  if (head.window) times(head.copy_weight, nullptr, row.state, d, d, scratch.data() + d);
}

// The most likely choice, as `best_token` has it; logits [num_vocab] are overwritten.
static void choose(HeadRow& row, const float* output, float* logits) {
  const float* query = output + row.head->d;
  const Head& head = *row.head;
  const int d = head.d, num = head.num_vocab;
  std::vector<float> entries(head.window, -INFINITY);
  if (head.window) {
    times(head.slot_weight, head.slot_bias, row.state, d, head.window, entries.data());
    for (int w = 0; w < head.window; w++) {
      if (row.window[w] < 0) {
        entries[w] = -INFINITY;
        continue;
      }
      float dot;
      dots<1>(head.embed + (size_t)row.window[w] * d, d, query, 1.0f / std::sqrt((float)d), &dot);
      entries[w] += dot;
    }
  }
  std::fill(logits + head.num_tokens, logits + num - 1, -INFINITY);
  dots<1>(head.embed + (size_t)(num - 1) * d, d, output, 1.0f, logits + num - 1);
  logits[num - 1] += head.out_bias[num - 1];
  float top = -INFINITY;
  for (int i = 0; i < num; i++) top = std::max(top, logits[i]);
  for (float entry : entries) top = std::max(top, entry);
  f32x16 sums = {};
  for (int i = 0; i < num; i += 16) {
    f32x16 weight = vexp(load_n(logits + i, num - i) - top);
    if (num - i < 16) weight = select(lanes() < num - i, weight, splat(0.0f));
    sums += weight;
    store_n(logits + i, weight, num - i);
  }
  float total = sum(sums), entry_weight = -1.0f;
  int entry_choice = 0;
  for (int w = 0; w < head.window; w++) total += entries[w] = row.window[w] < 0 ? 0.0f : std::exp(entries[w] - top);
  for (int w = 0; w < head.window; w++) {
    if (row.window[w] >= 0 && row.window[w] < num - 1) logits[row.window[w]] += entries[w];
    else if (row.window[w] >= 0 && entries[w] > entry_weight) entry_weight = entries[w], entry_choice = w;
  }
  int best = 0;
  for (int i = 1; i < num - 1; i++) best = logits[i] > logits[best] ? i : best;
  const bool use_entry = entry_weight > logits[best];
  row.choice = use_entry ? num + entry_choice : best;
  row.probability = (use_entry ? entry_weight : logits[best]) / total;
}

static void step_heads(Team& team, HeadRow* rows, int num_rows) {
  std::vector<std::vector<float>> scratch(num_rows), logits(num_rows);
  std::vector<std::pair<int, int>> chunks;
  for (int i = 0; i < num_rows; i++) {
    logits[i].resize(rows[i].head->num_vocab);
    for (int start = 0; start < rows[i].head->num_tokens; start += HEAD_CHUNK) chunks.push_back({i, start});
  }
  auto work = [&](int) {
    for (int i; (i = team.next(num_rows)) >= 0;) feed_head(rows[i], scratch[i]);
    team.barrier();
    for (int i; (i = team.next((int)chunks.size())) >= 0;) {
      const auto [row, start] = chunks[i];
      const Head& head = *rows[row].head;
      const int end = std::min(start + HEAD_CHUNK, head.num_tokens);
      float* out = logits[row].data();
      int u = start;
      for (; u + 8 <= end; u += 8)
        dots<8>(head.embed + (size_t)u * head.d, head.d, scratch[row].data(), 1.0f, out + u);
      for (; u < end; u++) dots<1>(head.embed + (size_t)u * head.d, head.d, scratch[row].data(), 1.0f, out + u);
      for (u = start; u < end; u++) out[u] += head.out_bias[u];
    }
    team.barrier();
    for (int i; (i = team.next(num_rows)) >= 0;) choose(rows[i], scratch[i].data(), logits[i].data());
  };
  team.run(work);
}

static void begin_heads(Team& team, HeadRow* rows, int num_rows) {
  std::vector<std::vector<float>> scratch(num_rows);
  auto work = [&](int) {
    for (int i; (i = team.next(num_rows)) >= 0;) begin_head(rows[i], scratch[i]);
  };
  team.run(work);
}
