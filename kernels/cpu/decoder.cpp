// The forward pass of a decoder on the CPU as one call: all layers, all sequences, all adapters of a step.
//
// kernels/native.py builds this file and mirrors its structs; specserve/compute/native/decoder.py fills them. Owns scratch
// memory and the order of phases; within a phase, tasks are taken from a counter (team.h). The model's semantics are those of
// specserve/compute/torch/decoder.py, whose torch code is the reference. Invariant: the result of a row is a function of the row,
// its context and its adapter, bit for bit, whatever else is in the step; hence drafts cannot change a token.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdlib>
#include <memory>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "attention.h"
#include "heads.h"
#include "inputs.h"
#include "lora.h"
#include "matmul.h"
#include "sampling.h"
#include "team.h"

enum Module { Q, K, V, O, GATE, UP, DOWN, NUM_MODULES };
// Norms quantize what they norm; QUANTIZE is what O and DOWN read.
enum Phase { BEGIN, NORM, QUANTIZE, SHRINK, QKV, ROPE, ATTENTION, OUT, GATE_UP, DOWN_, LM_HEAD, BEST, NUM_PHASES };

struct Layer {
  Matrix modules[NUM_MODULES];
  const float *input_norm, *mlp_norm, *q_norm, *k_norm, *post_attention_norm, *post_mlp_norm;  // null where absent
  void *k_cache, *v_cache;
  int32_t window;  // 0: all
  int32_t rope;    // which of Model::frequencies
};

struct Model {
  const Layer* layers;
  const float* norm;
  int32_t num_layers, hidden_size, num_heads, num_kv_heads, head_dim, is_gelu, is_bf16, num_ropes;
  float eps, attention_scale, attention_softcap;
  const void* embed;            // [V][H]
  const float* frequencies[2];  // of rotary embeddings, [D / 2] radians a position
  float rope_scales[2], embed_scale;
  int32_t embed_is_bf16;   // else fp32
  int32_t norms_whole_qk;  // q_norm and k_norm are over all heads as one
  int32_t norms_turned_qk;  // or over heads that are rotated
  int32_t query_length;    // positions, after each of which queries grow
  float query_beta;        // by this times a logarithm; 0: they do not
};

struct Step {
  int32_t num_rows, num_seqs, num_hidden, block_size, max_rank, num_taps;
  float* x;               // [T][H] embeddings in, scratch afterwards; null: they are the model's own
  const int64_t* tokens;  // [T]
  const int64_t *starts, *query_lens, *table_lens;  // [S]: position of the first row, rows, blocks
  const int32_t* blocks;                            // all sequences' block tables, one after the other
  const int64_t* hidden_indices;
  const int32_t* row_slots;  // [T], -1: no adapter; null: none in the step
  const Lora* lora;          // [slots][layers][NUM_MODULES]
  float* hidden;                 // [L + P][H], normed, of the rows hidden_indices
  int32_t tap_layers[128];
  float* taps[128];     // [L + P][H] each
  double* seconds;      // [NUM_PHASES], added to
  const int32_t* stop;  // not 0: end before the next layer, which another thread may ask for; null: nobody may
  const Matrix* lm_head;
  float* logits;  // [L][panels * 64] of the first rows of `hidden`
  int64_t* best;  // [L], the first of the largest of each row's first `vocab_size`
  uint8_t* bad;   // [L], whether it holds NaN
  int32_t num_logits, vocab_size, num_bad, unused;  // num_bad is what comes out
};

// Scratch memory, in large pages where it is large and there are such: a prompt's products were a seventh slower without.
struct Buffer {
  static constexpr size_t LARGE_PAGE = 2 << 20;
  void* data = nullptr;
  size_t size = 0;
  template <class T>
  T* get(size_t count) {
    if (count * sizeof(T) > size) {
      free(data);
      const size_t alignment = count * sizeof(T) < LARGE_PAGE / 2 ? 64 : LARGE_PAGE;
      size = (count * sizeof(T) + alignment - 1) / alignment * alignment;
      data = aligned_alloc(alignment, size);
      if (!data) abort();
#if defined(__linux__)
      if (alignment == LARGE_PAGE) madvise(data, size, MADV_HUGEPAGE);
#endif
    }
    return (T*)data;
  }
  ~Buffer() { free(data); }
};

struct Engine {
  explicit Engine(int num_threads) : team(num_threads), attention(num_threads), products(num_threads), rows(num_threads), draws(num_threads) {}
  Team team;
  Buffer act, act2, codes, row_scales, row_sums, qkv, rotated, h, y, last;
  std::vector<Buffer> attention, products, rows, draws;
  std::vector<Top> tops;
  Buffer embedded, cos[2], sin[2], growth;  // cos and sin: [T][D / 2], growth: [T], of queries
  Places places;
  Buffer partials;
  std::vector<std::atomic<int>> splits_left;

  // The inputs of matrices that are multiplied in whole numbers: those of one phase at a time.
  QuantizedRows quantized(int kp, int num_rows) const {
    return {{(int8_t*)codes.data, kp, num_rows}, (float*)row_scales.data, (int32_t*)row_sums.data};
  }

  void make_room_for_integers(int kp, int num_rows) {
    codes.get<int8_t>(Rows<int8_t>::size(num_rows, kp));
    row_scales.get<float>(num_rows);
    row_sums.get<int32_t>(num_rows);
    for (auto& row : rows) row.get<float>(kp);
  }

  void make_room(int num_rows) {
    for (auto& buffer : products) buffer.get<float>((size_t)MAX_PANELS * std::min(MAX_ROWS, pad_rows(num_rows)) * PANEL);
  }
};

// Adds what passes between its ends to the seconds of each phase; null: nobody wants to know.
struct Clock {
  explicit Clock(double* seconds) : seconds(seconds) {
    if (seconds) last = std::chrono::steady_clock::now();
  }
  void end(Phase phase) {
    if (!seconds) return;
    auto now = std::chrono::steady_clock::now();
    seconds[phase] += std::chrono::duration<double>(now - last).count();
    last = now;
  }
  double* seconds;
  std::chrono::steady_clock::time_point last;
};

// Queries of one KV head, over all splits or one of them.
struct AttentionTask {
  int32_t seq, head, first_row, num_rows, first_group, num_groups;
  int32_t split = -1, num_splits = 0, counter = 0;
  size_t partials = 0;  // where those of its splits are
};

// Runs fn(first panel, panels, first row, rows) over all blocks of at most `most` panels, and waits for all. Weights that are far
// are read once, by all rows for each; of those that stay in a cache (`is_near`) all pass for each block of rows.
template <class A, class F>
static void for_blocks(Team& team, int num_panels, int most, int num_rows, bool is_near, F fn) {
  const Blocks block = choose_blocks<A>(num_rows, num_panels, most, team.size());
  const int row_blocks = (num_rows + block.rows - 1) / block.rows;
  const int panel_blocks = (num_panels + block.panels - 1) / block.panels;
  const int tasks = panel_blocks * row_blocks;
  for (int i; (i = team.next(tasks)) >= 0;) {
    const int row = (is_near ? i / panel_blocks : i % row_blocks) * block.rows;
    const int panel = (is_near ? i % panel_blocks : i / row_blocks) * block.panels;
    fn(panel, std::min(block.panels, num_panels - panel), row, std::min(block.rows, num_rows - row));
  }
  team.barrier();
}

template <class A>
class Forward {
 public:
  Forward(Engine& engine, const Model& model, const Step& step) : e(engine), m(model), s(step), T(step.num_rows), x(step.x), row_slots(step.row_slots) {
    q_size = m.num_heads * m.head_dim;
    kv_size = m.num_kv_heads * m.head_dim;
    places_panels = m.head_dim == PANEL && !m.norms_whole_qk;
    const Layer& first = m.layers[0];
    const int widest = std::max({first.modules[Q].kp, first.modules[O].kp, first.modules[DOWN].kp});
    const size_t rows = T;
    if (!x) x = e.embedded.get<float>(rows * m.hidden_size);
    for (int i = 0; i < m.num_ropes; i++) {
      e.cos[i].get<float>(rows * m.head_dim / 2);
      e.sin[i].get<float>(rows * m.head_dim / 2);
    }
    e.growth.get<float>(rows);
    e.places.set(s.num_seqs, T, s.block_size, s.starts, s.query_lens, s.table_lens, s.blocks);
    act = e.act.get<A>(Rows<A>::size(T, widest));
    act2 = e.act2.get<A>(Rows<A>::size(T, widest));
    e.make_room(T);
    is_quantized = first.modules[Q].format >= INT8;
    if (is_quantized) e.make_room_for_integers(widest, T);
    if (!places_panels) qkv = e.qkv.get<float>(rows * (q_size + 2 * kv_size));
    rotated = e.rotated.get<A>(rows * q_size);
    y = e.y.get<float>(rows * m.hidden_size);
    h_stride = 3 * s.max_rank;
    h = e.h.get<float>(rows * h_stride + 1);
    if (s.num_hidden < T) {
      e.last.get<float>((size_t)s.num_hidden * m.hidden_size);
      last_slots.resize(s.num_hidden);
    }
    plan_attention();
  }

  int is_stopped = 0;

  void operator()(int thread) {
    Tiles tiles;
    Clock clock(thread == 0 ? s.seconds : nullptr);
    begin_rows();
    clock.end(BEGIN);
    for (int idx = 0; idx < m.num_layers; idx++) {
      const Layer& layer = m.layers[idx];
      if (thread == 0 && s.stop) is_stopped = __atomic_load_n(s.stop, __ATOMIC_RELAXED);
      norm_rows(layer.input_norm, layer.modules[Q].kp, thread);
      clock.end(NORM);
      if (is_stopped) return;  // behind a barrier, so that all threads see the same
      shrink_rows(idx, act, {Q, K, V});
      clock.end(SHRINK);
      multiply_qkv(idx, layer, thread);
      clock.end(QKV);
      place_rows(layer);
      clock.end(ROPE);
      attend_rows(layer, thread);
      if (idx == m.num_layers - 1 && s.num_hidden < T) leave_rows(layer, thread);
      clock.end(ATTENTION);
      quantize_rows(layer.modules[O].kp, thread);
      clock.end(QUANTIZE);
      shrink_rows(idx, act2, {O});
      clock.end(SHRINK);
      multiply_residual(idx, layer, O, layer.post_attention_norm, thread);
      clock.end(OUT);
      norm_rows(layer.mlp_norm, layer.modules[GATE].kp, thread);
      clock.end(NORM);
      shrink_rows(idx, act, {GATE, UP});
      clock.end(SHRINK);
      multiply_gate_up(idx, layer, thread);
      clock.end(GATE_UP);
      quantize_rows(layer.modules[DOWN].kp, thread);
      clock.end(QUANTIZE);
      shrink_rows(idx, act2, {DOWN});
      clock.end(SHRINK);
      multiply_residual(idx, layer, DOWN, layer.post_mlp_norm, thread);
      clock.end(DOWN_);
      for (int tap = 0; tap < s.num_taps; tap++)
        if (s.tap_layers[tap] == idx && thread == 0)
          for (int i = 0; i < s.num_hidden; i++)
            memcpy(s.taps[tap] + (size_t)i * m.hidden_size, x + hidden_row(i) * m.hidden_size,
                   4 * (size_t)m.hidden_size);
    }
    for (int i; (i = e.team.next(s.num_hidden)) >= 0;)
      norm_row(x + hidden_row(i) * m.hidden_size, m.norm, s.hidden + (size_t)i * m.hidden_size);
    e.team.barrier();
    clock.end(NORM);
  }

 private:
  void begin_rows() {
    const int half = m.head_dim / 2, width = m.hidden_size;
    for (int t; (t = e.team.next(T)) >= 0;) {
      for (int i = 0; i < m.num_ropes; i++)
        cos_sin_of((float)e.places.positions[t], m.frequencies[i], half, m.rope_scales[i],
                   (float*)e.cos[i].data + (size_t)t * half, (float*)e.sin[i].data + (size_t)t * half);
      // As specserve/model/rope.py has it, rounded once.
      if (m.query_beta) ((float*)e.growth.data)[t] = 1 + m.query_beta * std::log(1.0 + e.places.positions[t] / m.query_length);
      if (s.x) continue;
      float* to = x + (size_t)t * width;
      const size_t from = (size_t)s.tokens[t] * width;
      if (m.embed_is_bf16) embed_row((const bf16*)m.embed + from, width, m.embed_scale, to);
      else embed_row((const float*)m.embed + from, width, m.embed_scale, to);
    }
    e.team.barrier();
  }

  float rms_scale(const float* x, int n) const {
    f32x16 squares = {};
    for (int c = 0; c < n; c += 16) {
      f32x16 v = load_n(x + c, n - c);
      squares = fma(v, v, squares);
    }
    return 1.0f / std::sqrt(sum(squares) / n + m.eps);
  }

  void norm_row(const float* x, const float* weight, float* out) {
    const int n = m.hidden_size;
    const float scale = rms_scale(x, n);
    for (int c = 0; c < n; c += 16) store_n(out + c, load_n(x + c, n - c) * scale * load_n(weight + c, n - c), n - c);
  }

  void norm_rows(const float* weight, int kp, int thread) {
    const int n = m.hidden_size;
    const Rows<A> out(act, kp, T);
    for (int t; (t = e.team.next(T)) >= 0;) {
      const float* from = x + (size_t)t * n;
      const float scale = weight ? rms_scale(from, n) : 1.0f;
      for (int c = 0; c < n; c += 16) {
        const f32x16 value = load_n(from + c, n - c);
        out.set(t, c, weight ? value * scale * load_n(weight + c, n - c) : value, n - c);
      }
      out.clear_from(t, n);
      if (is_quantized) quantize_row(out, t, e.quantized(kp, T), (float*)e.rows[thread].data);
    }
    e.team.barrier();
  }

  void quantize_rows(int kp, int thread) {
    if (!is_quantized) return;
    const Rows<A> in(act2, kp, T);
    for (int t; (t = e.team.next(T)) >= 0;) quantize_row(in, t, e.quantized(kp, T), (float*)e.rows[thread].data);
    e.team.barrier();
  }

  const Lora* lora_of(int row, int layer, int module) const {
    const int slot = row_slots ? row_slots[row] : -1;
    if (slot < 0) return nullptr;
    const Lora* lora = s.lora + ((size_t)slot * m.num_layers + layer) * NUM_MODULES + module;
    return lora->a ? lora : nullptr;
  }

  void shrink_rows(int layer, A* x, std::initializer_list<int> modules) {
    if (!row_slots) return;
    constexpr int ROWS = 4, SHRINK_START = 16;
    const int chunks = (T + ROWS - 1) / ROWS, num = (int)modules.size();
    for (int i; (i = e.team.next(chunks * num)) >= 0;) {
      const int place = i % num, module = modules.begin()[place];
      const Matrix& base = m.layers[layer].modules[module];
      const Rows<A> in(x, base.kp, T);
      for (int t = i / num * ROWS, end = std::min(T, t + ROWS), same; t < end; t += same) {
        const Lora* lora = lora_of(t, layer, module);
        for (same = 1; same < SHRINK_ROWS && t + same < end && lora_of(t + same, layer, module) == lora;) same++;
        if (!lora) continue;
        if (t + same < end)
          if (const Lora* next = lora_of(t + same, layer, module))  // a stream that the CPU does not foresee
            for (int i = 0; i < SHRINK_START; i++) __builtin_prefetch((const char*)next->a + 64 * i, 0, 3);
        const A* rows[SHRINK_ROWS];
        for (int n = 0; n < same; n++) rows[n] = in.at(t + n, 0);
        float* to = h + (size_t)t * h_stride + place * s.max_rank;
        if (same == SHRINK_ROWS) shrink<SHRINK_ROWS>(*lora, rows, in.step(), base.k, to, h_stride);
        else shrink<1>(*lora, rows, in.step(), base.k, to, h_stride);
      }
    }
    e.team.barrier();
  }

  static bool are_near(const Layer& layer, std::initializer_list<int> modules) {
    size_t num_bytes = 0;
    for (int module : modules) num_bytes += layer.modules[module].num_bytes();
    return is_near(num_bytes);
  }

  // One panel of one of the layer's modules; `place` is the module's place in h.
  struct Part {
    int module, place, panel;
  };

  // out [num][padded rows][64]: columns of modules with the same inputs, with bias and LoRA. `added_to`: what they will be added to,
  // like x, which is asked for meanwhile; or null.
  void multiply_parts(int layer, const Part* parts, int num, A* x, int row, int rows, float* out, const float* added_to = nullptr) {
    Panel panels[MAX_PANELS];
    Piece pieces[MAX_PANELS][2 * FEW_ROWS];
    for (int p = 0; p < num; p++) {
      panels[p] = {&m.layers[layer].modules[parts[p].module], parts[p].panel, parts[p].panel + e.team.size()};
      if constexpr (IN_TILES<A>) {
        if (row_slots) fetch_lora(layer, parts[p], row, rows);
        continue;
      }
      panels[p].wanted = pieces[p];
      if (row_slots) panels[p].num_wanted = lora_pieces(layer, parts[p], row, rows, pieces[p]);
      if (added_to && rows >= MANY_ROWS)
        panels[p].num_wanted += row_pieces(added_to, parts[p].panel, row, rows, pieces[p] + panels[p].num_wanted);
      if (places_panels && (parts[p].module == K || parts[p].module == V))
        panels[p].num_wanted += cache_pieces(m.layers[layer], parts[p], row, rows, pieces[p] + panels[p].num_wanted);
    }
    const int kp = panels[0].matrix->kp;
    multiply_panels(panels, num, Rows<A>(x, kp, T), e.quantized(kp, T), row, rows, out);
    for (int p = 0; p < num; p++) finish_part(layer, parts[p], row, rows, out + (size_t)p * pad_rows(rows) * PANEL);
  }

  // Each row's part of B is a short stream that starts cold; the base panel's products hide its way from memory. Gives how many there are.
  int lora_pieces(int layer, const Part& part, int row, int rows, Piece* pieces) const {
    const Lora* before = nullptr;
    int num = 0;
    for (int r = 0; r < rows; r++)
      if (const Lora* lora = lora_of(row + r, layer, part.module); lora && lora != before) {
        const char* b = (const char*)((const A*)lora->b + (size_t)part.panel * lora->rank * PANEL);
        pieces[num++] = {b, b + sizeof(A) * lora->rank * PANEL};
        before = lora;
      }
    return num;
  }

  // The same of a panel's columns of rows like those of x, each of which is a short stream, too.
  int row_pieces(const float* first, int panel, int row, int rows, Piece* pieces) const {
    const int column = panel * PANEL, num = std::min(PANEL, m.hidden_size - column);
    for (int r = 0; r < rows; r++) {
      const char* at = (const char*)(first + (size_t)(row + r) * m.hidden_size + column);
      pieces[r] = {at, at + sizeof(float) * num};
    }
    return rows;
  }

  // The same of the tiles that a head's keys or values will be stored to.
  int cache_pieces(const Layer& layer, const Part& part, int row, int rows, Piece* pieces) const {
    const size_t size = sizeof(A) * KEYS * m.head_dim;
    const char* cache = (const char*)(part.module == K ? layer.k_cache : layer.v_cache);
    int64_t before = -1;
    int num = 0;
    for (int r = 0; r < rows; r++)
      if (const int64_t tile = e.places.slots[row + r] / KEYS; tile != before) {
        const char* at = cache + (tile * m.num_kv_heads + part.panel) * size;
        pieces[num++] = {at, at + size};
        before = tile;
      }
    return num;
  }

  void fetch_lora(int layer, const Part& part, int row, int rows) const {
    for (int r = 0; r < rows; r += FEW_ROWS) {
      Piece pieces[FEW_ROWS];
      const int num = lora_pieces(layer, part, row + r, std::min(FEW_ROWS, rows - r), pieces);
      for (int i = 0; i < num; i++)
        for (const char* at = pieces[i].at; at < pieces[i].end; at += 64) __builtin_prefetch(at, 0, 2);
    }
  }

  void finish_part(int layer, const Part& part, int row, int rows, float* out) {
    const Matrix& matrix = m.layers[layer].modules[part.module];
    const int column = part.panel * PANEL, num = std::min(PANEL, matrix.n - column);
    if (matrix.bias)
      for (int r = 0; r < rows; r++)
        for (int c = 0; c < num; c += 16) {
          float* to = out + r * PANEL + c;
          store(to, load(to) + load_n(matrix.bias + column + c, num - c));
        }
    if (!row_slots) return;
    for (int r = 0, same; r < rows; r += same) {
      const Lora* lora = lora_of(row + r, layer, part.module);
      for (same = 1; same < EXPAND_ROWS && r + same < rows && lora_of(row + r + same, layer, part.module) == lora;) same++;
      if (!lora) continue;
      const A* b = (const A*)lora->b + (size_t)part.panel * lora->rank * PANEL;
      const float* from = h + (size_t)(row + r) * h_stride + part.place * s.max_rank;
      if (same == EXPAND_ROWS) expand_panel<EXPAND_ROWS>(b, lora->rank, from, h_stride, out + r * PANEL);
      else
        for (int n = 0; n < same; n++) expand_panel<1>(b, lora->rank, from + n * h_stride, h_stride, out + (r + n) * PANEL);
    }
  }

  void multiply_qkv(int idx, const Layer& layer, int thread) {
    const int q_panels = layer.modules[Q].panels(), kv_panels = layer.modules[K].panels();
    const int width = q_size + 2 * kv_size, starts[] = {0, q_size, q_size + kv_size};
    float* products = (float*)e.products[thread].data;
    for_blocks<A>(e.team, q_panels + 2 * kv_panels, MAX_PANELS, T, are_near(layer, {Q, K, V}), [&](int first, int num, int row, int rows) {
      Part parts[MAX_PANELS];
      for (int p = 0; p < num; p++) {
        const int panel = first + p, module = panel < q_panels ? Q : panel < q_panels + kv_panels ? K : V;
        parts[p] = {module, module, panel - (module > Q ? q_panels : 0) - (module > K ? kv_panels : 0)};
      }
      multiply_parts(idx, parts, num, act, row, rows, products);
      for (int p = 0; p < num; p++) {
        float* from = products + (size_t)p * pad_rows(rows) * PANEL;
        if (places_panels) {
          for (int r = 0; r < rows; r++) place(layer, parts[p].module, parts[p].panel, row + r, from + r * PANEL);
          continue;
        }
        const int columns = std::min(PANEL, layer.modules[parts[p].module].n - parts[p].panel * PANEL);
        float* to = qkv + (size_t)row * width + starts[parts[p].module] + parts[p].panel * PANEL;
        for (int r = 0; r < rows; r++) memcpy(to + (size_t)r * width, from + r * PANEL, 4 * columns);
      }
    });
  }

  void head_norm(float* x, const float* weight, int n) {
    const float scale = rms_scale(x, n);
    for (int c = 0; c < n; c++) x[c] = x[c] * scale * weight[c];
  }

  void rotate(float* x, const float* cos, const float* sin) {
    const int half = m.head_dim / 2;
    for (int i = 0; i < half; i += 16) {
      const int n = half - i;
      const f32x16 a = load_n(x + i, n), b = load_n(x + i + half, n);
      const f32x16 c = load_n(cos + i, n), sn = load_n(sin + i, n);
      store_n(x + i, a * c - b * sn, n);
      store_n(x + i + half, b * c + a * sn, n);
    }
  }

  // One head of a row, [head_dim], goes where attention reads it: normed and rotated, unless it holds values.
  void place(const Layer& layer, int module, int head, int t, float* x) {
    const int dim = m.head_dim;
    if (module == V) return store_value((A*)layer.v_cache, e.places.slots[t], head, m.num_kv_heads, dim, x);
    const float* norm = m.norms_whole_qk ? nullptr : module == Q ? layer.q_norm : layer.k_norm;
    if (norm && !m.norms_turned_qk) head_norm(x, norm, dim);
    const size_t first = (size_t)t * (dim / 2);
    rotate(x, (const float*)e.cos[layer.rope].data + first, (const float*)e.sin[layer.rope].data + first);
    if (norm && m.norms_turned_qk) head_norm(x, norm, dim);
    if (module == K) return store_key((A*)layer.k_cache, e.places.slots[t], head, m.num_kv_heads, dim, x);
    A* out = rotated + (size_t)t * q_size + head * dim;
    const float by = m.query_beta ? ((const float*)e.growth.data)[t] : 1.0f;
    for (int c = 0; c < dim; c += 16) store_n(out + c, load_n(x + c, dim - c) * by, dim - c);
  }

  // Where heads have not been placed panel by panel, as they were multiplied.
  void place_rows(const Layer& layer) {
    if (places_panels) return;
    const int dim = m.head_dim, width = q_size + 2 * kv_size;
    // Rows that follow each other share the lines of a tile of keys.
    const int at_once = std::clamp(T / (4 * e.team.size()), 1, KEYS);
    for (int i; (i = e.team.next((T + at_once - 1) / at_once)) >= 0;)
      for (int t = i * at_once; t < std::min(T, (i + 1) * at_once); t++) {
        float* row = qkv + (size_t)t * width;
        if (t + 1 < std::min(T, (i + 1) * at_once))
          for (int c = 0; c < width; c += 16) __builtin_prefetch(row + width + c, 0, 3);
        if (m.norms_whole_qk) {
          head_norm(row, layer.q_norm, q_size);
          head_norm(row + q_size, layer.k_norm, kv_size);
        }
        for (int head = 0; head < m.num_heads; head++) place(layer, Q, head, t, row + head * dim);
        for (int head = 0; head < m.num_kv_heads; head++) {
          place(layer, K, head, t, row + q_size + head * dim);
          place(layer, V, head, t, row + q_size + kv_size + head * dim);
        }
      }
    e.team.barrier();
  }

  // As many as a task may have, but none that need a pass for a few vectors at the end.
  int rows_of_task(int group) const {
    const int most = std::max(1, QUERIES / group), at_once = vectors_at_once<A>(m.head_dim);
    for (int rows = most; rows > most / 2; rows--)
      if (rows * group % at_once == 0) return rows;
    return most;
  }

  // Tasks of all layers: head by head, so that its keys and values stay in the second cache level, the longest contexts
  // first. Where a head's queries are few, its splits are tasks, so that one sequence's context is read by all threads.
  void plan_attention() {
    const int group = m.num_heads / m.num_kv_heads;
    const int groups_at_once = std::min(group, QUERIES), rows_at_once = rows_of_task(group);
    size_t partials = 0;
    int counters = 0;
    for (int i = 0; i < s.num_seqs; i++) {
      const int n = e.places.cu_query_lens[i + 1] - e.places.cu_query_lens[i], num_splits = (e.places.context_lens[i] + SPLIT - 1) / SPLIT;
      for (int head = 0; head < m.num_kv_heads; head++)
        for (int row = n; row > 0; row -= rows_at_once) {
          const int num = std::min(rows_at_once, row);
          for (int g = 0; g < group; g += groups_at_once) {
            AttentionTask task{i, head, row - num, num, g, std::min(groups_at_once, group - g)};
            if (n > rows_at_once || num_splits == 1) {
              tasks.push_back(task);
              continue;
            }
            task.counter = counters++, task.partials = partials, task.num_splits = num_splits;
            partials += num_splits * Partial::size(num * task.num_groups, m.head_dim);
            for (task.split = 0; task.split < num_splits; task.split++) tasks.push_back(task);
          }
        }
    }
    e.partials.get<float>(partials);
    if ((int)e.splits_left.size() < counters) e.splits_left = std::vector<std::atomic<int>>(counters);
    for (const AttentionTask& task : tasks)
      if (task.split == 0) e.splits_left[task.counter] = task.num_splits;
    for (auto& buffer : e.attention) buffer.get<float>(SCORES + 3 * Partial::size(QUERIES, m.head_dim));
  }

  void attend_rows(const Layer& layer, int thread) {
    for (int i; (i = e.team.next((int)tasks.size())) >= 0;) attend(layer, tasks[i], (float*)e.attention[thread].data);
    e.team.barrier();
  }

  void attend(const Layer& layer, const AttentionTask& task, float* scratch) {
    const int dim = m.head_dim, group = m.num_heads / m.num_kv_heads, num = task.num_rows * task.num_groups;
    const int row = e.places.cu_query_lens[task.seq] + task.first_row;
    const int first_position = e.places.context_lens[task.seq] - (e.places.cu_query_lens[task.seq + 1] - row);
    float* scores = scratch;
    Partial sum = Partial::at(scores + SCORES, num, dim);
    Partial part = Partial::at(scores + SCORES + Partial::size(QUERIES, dim), num, dim);
    A* queries = (A*)(scores + SCORES + 2 * Partial::size(QUERIES, dim));
    int positions[QUERIES];
    for (int r = 0, v = 0; r < task.num_rows; r++)
      for (int g = 0; g < task.num_groups; g++, v++) {
        const int head = task.head * group + task.first_group + g;
        memcpy(queries + v * dim, rotated + (size_t)(row + r) * q_size + head * dim, sizeof(A) * dim);
        positions[v] = first_position + r;
      }
    const int32_t* table = e.places.tables[task.seq];
    const Context<A> context{(const A*)layer.k_cache, (const A*)layer.v_cache, table, s.block_size, m.num_kv_heads,
                             task.head, dim, e.places.context_lens[task.seq], layer.window, m.attention_scale, m.attention_softcap};
    const int first_split = first_seen(context, positions[0]) / SPLIT, last_split = positions[num - 1] / SPLIT;
    if (task.split >= 0) {
      auto of_split = [&](int i) {
        return Partial::at((float*)e.partials.data + task.partials + i * Partial::size(num, dim), num, dim);
      };
      attend_split_any(context, num, queries, positions, task.split, scores, of_split(task.split));
      // Who computes the last of the splits adds all of them.
      if (e.splits_left[task.counter].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
      e.splits_left[task.counter].store(task.num_splits, std::memory_order_relaxed);  // for the next layer
      sum = of_split(first_split);
      for (int i = first_split + 1; i <= last_split; i++) merge(num, dim, sum, of_split(i));
    } else {
      attend_split_any(context, num, queries, positions, first_split, scores, sum);
      for (int i = first_split + 1; i <= last_split; i++) {
        attend_split_any(context, num, queries, positions, i, scores, part);
        merge(num, dim, sum, part);
      }
    }
    const Rows<A> to(act2, layer.modules[O].kp, T);
    for (int r = 0, v = 0; r < task.num_rows; r++)
      for (int g = 0; g < task.num_groups; g++, v++) {
        const int column = (task.head * group + task.first_group + g) * dim;
        const float scale = 1.0f / sum.total[v];
        for (int c = 0; c < dim; c += 16)
          to.set(row + r, column + c, load_n(sum.out + v * dim + c, dim - c) * scale, dim - c);
      }
    if (task.head == 0 && task.first_group == 0)
      for (int r = 0; r < task.num_rows; r++) to.clear_from(row + r, q_size);
  }

  size_t hidden_row(int i) const { return has_left_rows ? i : s.hidden_indices[i]; }

  // Behind the last layer's keys and values nothing is wanted of most rows of a prompt: from here on the step has the others only.
  void leave_rows(const Layer& layer, int thread) {
    const int kp = layer.modules[O].kp, width = m.hidden_size;
    const Rows<A> from(act2, kp, T), to(act, kp, s.num_hidden);
    float* last_x = (float*)e.last.data;
    for (int i; (i = e.team.next(s.num_hidden)) >= 0;) {
      const int64_t row = s.hidden_indices[i];
      for (int c = 0; c < kp; c += 16) memcpy(to.at(i, c), from.at(row, c), 16 * sizeof(A));
      memcpy(last_x + (size_t)i * width, x + row * width, sizeof(float) * width);
      if (row_slots) last_slots[i] = row_slots[row];
    }
    e.team.barrier();
    if (thread == 0) {
      std::swap(act, act2);
      T = s.num_hidden, x = last_x, has_left_rows = true;
      if (row_slots) row_slots = last_slots.data();
    }
    e.team.barrier();
  }

  // x += module(act2), normed first where the architecture does so.
  void multiply_residual(int idx, const Layer& layer, int module, const float* post_norm, int thread) {
    const Matrix& matrix = layer.modules[module];
    float* products = (float*)e.products[thread].data;
    for_blocks<A>(e.team, matrix.panels(), MAX_PANELS, T, are_near(layer, {module}), [&](int first, int num, int row, int rows) {
      Part parts[MAX_PANELS];
      for (int p = 0; p < num; p++) parts[p] = {module, 0, first + p};
      multiply_parts(idx, parts, num, act2, row, rows, products, post_norm ? nullptr : x);
      for (int p = 0; p < num; p++) {
        const float* from = products + (size_t)p * pad_rows(rows) * PANEL;
        const int column = (first + p) * PANEL, columns = std::min(PANEL, matrix.n - column);
        for (int r = 0; r < rows; r++)
          for (int c = 0; c < columns; c += 16) {
            const size_t place = (size_t)(row + r) * m.hidden_size + column + c;
            f32x16 value = load(from + r * PANEL + c);
            if (post_norm) store_n(y + place, value, columns - c);
            else store_n(x + place, load_n(x + place, columns - c) + value, columns - c);
          }
      }
    });
    if (!post_norm) return;
    for (int t; (t = e.team.next(T)) >= 0;) {
      float *out = y + (size_t)t * m.hidden_size, *to = x + (size_t)t * m.hidden_size;
      norm_row(out, post_norm, out);
      for (int c = 0; c < m.hidden_size; c++) to[c] += out[c];
    }
    e.team.barrier();
  }

  void multiply_gate_up(int idx, const Layer& layer, int thread) {
    const Rows<A> to(act2, layer.modules[DOWN].kp, T);  // kp equals panels * 64
    float* products = (float*)e.products[thread].data;
    for_blocks<A>(e.team, layer.modules[GATE].panels(), MAX_PANELS / 2, T, are_near(layer, {GATE, UP}), [&](int first, int num, int row, int rows) {
      Part parts[MAX_PANELS];
      for (int p = 0; p < num; p++) parts[2 * p] = {GATE, 0, first + p}, parts[2 * p + 1] = {UP, 1, first + p};
      multiply_parts(idx, parts, 2 * num, act, row, rows, products);
      for (int p = 0; p < num; p++) {
        const float* gate = products + (size_t)2 * p * pad_rows(rows) * PANEL;
        const float* up = gate + (size_t)pad_rows(rows) * PANEL;
        for (int r = 0; r < rows; r++)
          for (int c = 0; c < PANEL; c += 16) {
            f32x16 g = load(gate + r * PANEL + c);
            store(to.at(row + r, (first + p) * PANEL + c),
                  (m.is_gelu ? gelu_tanh(g) : silu(g)) * load(up + r * PANEL + c));
          }
      }
    });
  }

  Engine& e;
  const Model& m;
  const Step& s;
  int T;
  float* x;                  // [T][H]
  const int32_t* row_slots;  // [T] or null
  bool is_quantized;
  int q_size, kv_size, h_stride;
  A *act, *act2, *rotated;
  float *qkv = nullptr, *h, *y;
  std::vector<AttentionTask> tasks;
  std::vector<int32_t> last_slots;
  bool places_panels;  // heads are panels, and go where attention reads them as they are multiplied
  bool has_left_rows = false;  // T, x and row_slots are those of hidden_indices
};

// y [rows][panels * 64] = x [rows][k] times the matrix, without bias: the lm_head.
template <class A>
static void linear(Engine& e, const Matrix& matrix, const float* x, int rows, float* y) {
  const Rows<A> act(e.act.get<A>(Rows<A>::size(rows, matrix.kp)), matrix.kp, rows);
  const bool is_quantized = matrix.format >= INT8;
  e.make_room(rows);
  if (is_quantized) e.make_room_for_integers(matrix.kp, rows);
  const QuantizedRows quantized = e.quantized(matrix.kp, rows);
  auto work = [&](int thread) {
    Tiles tiles;
    for (int t; (t = e.team.next(rows)) >= 0;) {
      for (int c = 0; c < matrix.k; c += 16)
        act.set(t, c, load_n(x + (size_t)t * matrix.k + c, matrix.k - c), matrix.k - c);
      act.clear_from(t, matrix.k);
      if (is_quantized) quantize_row(act, t, quantized, (float*)e.rows[thread].data);
    }
    e.team.barrier();
    const size_t width = (size_t)matrix.panels() * PANEL;
    float* products = (float*)e.products[thread].data;
    for_blocks<A>(e.team, matrix.panels(), MAX_PANELS, rows, is_near(matrix.num_bytes()), [&](int first, int num, int row, int rows) {
      Panel panels[MAX_PANELS];
      for (int p = 0; p < num; p++) panels[p] = {&matrix, first + p, first + p + e.team.size()};
      multiply_panels(panels, num, act, quantized, row, rows, products);
      for (int p = 0; p < num; p++)
        for (int r = 0; r < rows; r++)
          memcpy(y + (row + r) * width + (first + p) * PANEL, products + ((size_t)p * pad_rows(rows) + r) * PANEL, 4 * PANEL);
    });
  };
  e.team.run(work);
}

static void draw_rows(Engine& e, DrawRow* rows, int num_rows, int vocab) {
  const size_t blocks = (vocab + DRAW_BLOCK - 1) / DRAW_BLOCK, size = blocks * (DRAW_BLOCK * sizeof(float) + sizeof(double));
  for (auto& buffer : e.draws) buffer.get<char>(size);
  auto work = [&](int thread) {
    float* scaled = (float*)e.draws[thread].data;
    for (int r; (r = e.team.next(num_rows)) >= 0;) Draw(rows[r], vocab, scaled, (double*)(scaled + blocks * DRAW_BLOCK)).run();
  };
  e.team.run(work);
}

// The structs that kernels/native.py declares too, and their fields; it compares places and sizes when it loads the library, so
// that a field that was changed on one side only is an error there and no wild pointer here.
struct Place {
  const char *type, *field;  // field null: the struct itself
  int32_t offset, size;
};
#define STRUCT(type) {#type, nullptr, 0, sizeof(type)}
#define FIELD(type, field) {#type, #field, offsetof(type, field), sizeof(((type*)nullptr)->field)}
static const Place LAYOUT[] = {
    STRUCT(Matrix), FIELD(Matrix, data), FIELD(Matrix, groups), FIELD(Matrix, scales), FIELD(Matrix, bias), FIELD(Matrix, n),
    FIELD(Matrix, k), FIELD(Matrix, kp), FIELD(Matrix, format),
    STRUCT(Layer), FIELD(Layer, modules), FIELD(Layer, input_norm), FIELD(Layer, mlp_norm), FIELD(Layer, q_norm),
    FIELD(Layer, k_norm), FIELD(Layer, post_attention_norm), FIELD(Layer, post_mlp_norm), FIELD(Layer, k_cache),
    FIELD(Layer, v_cache), FIELD(Layer, window), FIELD(Layer, rope),
    STRUCT(Model), FIELD(Model, layers), FIELD(Model, norm), FIELD(Model, num_layers), FIELD(Model, hidden_size),
    FIELD(Model, num_heads), FIELD(Model, num_kv_heads), FIELD(Model, head_dim), FIELD(Model, is_gelu), FIELD(Model, is_bf16),
    FIELD(Model, num_ropes), FIELD(Model, eps), FIELD(Model, attention_scale), FIELD(Model, attention_softcap),
    FIELD(Model, embed), FIELD(Model, frequencies), FIELD(Model, rope_scales), FIELD(Model, embed_scale),
    FIELD(Model, embed_is_bf16), FIELD(Model, norms_whole_qk), FIELD(Model, norms_turned_qk), FIELD(Model, query_length),
    FIELD(Model, query_beta),
    STRUCT(Step), FIELD(Step, num_rows), FIELD(Step, num_seqs), FIELD(Step, num_hidden), FIELD(Step, block_size),
    FIELD(Step, max_rank), FIELD(Step, num_taps), FIELD(Step, x), FIELD(Step, tokens), FIELD(Step, starts),
    FIELD(Step, query_lens), FIELD(Step, table_lens), FIELD(Step, blocks), FIELD(Step, hidden_indices),
    FIELD(Step, row_slots), FIELD(Step, lora),
    FIELD(Step, hidden), FIELD(Step, tap_layers), FIELD(Step, taps), FIELD(Step, seconds),
    FIELD(Step, stop), FIELD(Step, lm_head), FIELD(Step, logits), FIELD(Step, best), FIELD(Step, bad), FIELD(Step, num_logits),
    FIELD(Step, vocab_size), FIELD(Step, num_bad), FIELD(Step, unused),
    STRUCT(Lora), FIELD(Lora, a), FIELD(Lora, b), FIELD(Lora, rank), FIELD(Lora, scale),
    STRUCT(Head), FIELD(Head, init_weight), FIELD(Head, embed), FIELD(Head, moves), FIELD(Head, next_weight),
    FIELD(Head, gates_x), FIELD(Head, gates_s), FIELD(Head, out_weight), FIELD(Head, copy_weight), FIELD(Head, slot_weight),
    FIELD(Head, init_bias), FIELD(Head, out_bias), FIELD(Head, gates_bias), FIELD(Head, candidate_bias), FIELD(Head, slot_bias),
    FIELD(Head, hidden_size), FIELD(Head, d), FIELD(Head, window), FIELD(Head, num_tokens), FIELD(Head, num_vocab),
    FIELD(Head, unused),
    STRUCT(HeadRow), FIELD(HeadRow, head), FIELD(HeadRow, state), FIELD(HeadRow, last), FIELD(HeadRow, tapped),
    FIELD(HeadRow, window), FIELD(HeadRow, token), FIELD(HeadRow, moved), FIELD(HeadRow, choice), FIELD(HeadRow, probability),
    STRUCT(DrawRow), FIELD(DrawRow, logits), FIELD(DrawRow, mask), FIELD(DrawRow, number), FIELD(DrawRow, top_p),
    FIELD(DrawRow, min_p), FIELD(DrawRow, temperature), FIELD(DrawRow, top_k), FIELD(DrawRow, token), FIELD(DrawRow, is_dead), {}
};
#undef STRUCT
#undef FIELD

extern "C" {

const Place* specserve_layout() { return LAYOUT; }

int specserve_uses_bf16() { return NATIVE_BF16; }

const char* specserve_int8_products() { return NATIVE_AMX ? "AMX tiles, of one row " INT8_PRODUCTS : INT8_PRODUCTS; }

void* specserve_create(int num_threads) { return new Engine(num_threads); }

void specserve_destroy(void* engine) { delete (Engine*)engine; }

int specserve_num_active(void* engine) { return ((Engine*)engine)->team.active(); }
}

template <class A>
static int32_t run_forward(Engine& engine, const Model& model, Step& step) {
  Forward<A> forward(engine, model, step);
  engine.team.run(forward);
  if (forward.is_stopped) return true;
  if (step.num_logits) {
    Clock clock(step.seconds);
    linear<A>(engine, *step.lm_head, step.hidden, step.num_logits, step.logits);
    clock.end(LM_HEAD);
    step.num_bad = best_of_rows(engine.team, engine.tops, step.logits, step.lm_head->panels() * PANEL, step.num_logits,
                                step.vocab_size, step.best, step.bad);
    clock.end(BEST);
  }
  return false;
}

extern "C" {

// Not 0: it was stopped, and gave nothing.
int32_t specserve_forward(void* engine, const Model* model, Step* step) {
  Engine& e = *(Engine*)engine;
  return model->is_bf16 ? run_forward<bf16>(e, *model, *step) : run_forward<float>(e, *model, *step);
}

void specserve_linear(void* engine, const Matrix* matrix, int is_bf16, const float* x, int rows, float* y) {
  if (is_bf16) linear<bf16>(*(Engine*)engine, *matrix, x, rows, y);
  else linear<float>(*(Engine*)engine, *matrix, x, rows, y);
}

int32_t specserve_best_of_rows(void* engine, const float* logits, int64_t stride, int32_t rows, int32_t vocab, int64_t* tokens,
                               uint8_t* bad) {
  Engine& e = *(Engine*)engine;
  return best_of_rows(e.team, e.tops, logits, stride, rows, vocab, tokens, bad);
}

void specserve_draw_rows(void* engine, DrawRow* rows, int32_t num_rows, int32_t vocab) {
  draw_rows(*(Engine*)engine, rows, num_rows, vocab);
}

void specserve_begin_heads(void* engine, HeadRow* rows, int num_rows) {
  begin_heads(((Engine*)engine)->team, rows, num_rows);
}

void specserve_step_heads(void* engine, HeadRow* rows, int num_rows) {
  step_heads(((Engine*)engine)->team, rows, num_rows);
}
}
