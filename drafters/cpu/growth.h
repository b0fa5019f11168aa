// Grows the drafts of a step, position by position, and decides how many rows each gets: DraftGrowth of
// specserve/drafting/growth.py and what that takes of budget.py and cost_model.py, sum by sum in the same order.
#pragma once

#include <chrono>
#include <cmath>

#include "sequence.h"

namespace drafts {

constexpr int LEAST_LOOK = 8;
constexpr double SLACK = 0.5, MEAN_RATE = 0.1;
constexpr int MEAN_FIRST = 3;

// A step's drafts and what they may cost; mirrored in drafters/native.py. Arrays [S] are by draft.
struct Growth {
  // What Python says of the step.
  Sequence* const* sequences;  // [S]
  const int32_t* num_new;      // [S] tokens that the sequence has more than when it was last here
  const int32_t* new_tokens;   // of all of them, one after the other
  const int32_t* limits;       // [S] tokens
  const uint8_t* is_fixed;     // [S] takes what its sources say, whatever it costs
  const int32_t* node_rows;    // [num_nodes] seconds by rows, straight in between
  const double* node_seconds;
  Chains chains;
  // Python's part.
  int32_t (*ask)(int32_t what, int32_t draft, int32_t source, int64_t token, int64_t* guess);
  int32_t (*constrain)(int32_t what, int32_t draft, int64_t token);
  int32_t (*step_heads)(const int32_t* drafts, int32_t num, int32_t starts);  // 0: they failed
  double (*clock)();  // null: the machine's
  // What comes of it.
  int32_t* num_admitted;  // [S]
  int64_t* tokens;        // those admitted, one draft after the other
  int32_t* chosen;        // name of the source of each
  double* chances;        // of each, of sequences that are traced; null: none is
  int32_t num_seqs;
  int32_t num_nodes;
  int32_t num_decoding;
  int32_t num_rows;
  int32_t max_rows;
  int32_t drafted;        // in: whether the latest step took drafts; out: whether this one does
  double enter_gain;
  double draft_s;
  double row_price;
  // What is learned.
  double head_s;          // one step of the heads
  double ask_s;           // one position of one sequence, heads left out: a running mean
  int32_t num_seen;       // of it
  int32_t unused;
};

class Grower {
 public:
  explicit Grower(Growth& growth) : g_(growth), constrainer_{growth.constrain} {
    alone_s_ = seconds(g_.num_decoding), undrafted_s_ = seconds(g_.num_rows);
  }

  void run() {
    const double start = now();
    const int32_t* tokens = g_.new_tokens;
    for (int idx = 0; idx < g_.num_seqs; idx++) {
      Sequence& sequence = *g_.sequences[idx];
      sequence.append(tokens, g_.num_new[idx]);
      tokens += g_.num_new[idx];
      sequence.begin(asker(idx), constrainer_);
    }
    grow();
    double base = g_.num_decoding;
    int num_fixed = 0;
    auto end = candidates_.begin();
    double fixed_survival = 0.0;
    for (const Candidate& candidate : candidates_) {
      if (g_.is_fixed[candidate.draft]) num_fixed++, fixed_survival += candidate.survival;
      else *end++ = candidate;
    }
    base += fixed_survival;
    candidates_.erase(end, candidates_.end());
    std::stable_sort(candidates_.begin(), candidates_.end(),
                     [](const Candidate& a, const Candidate& b) { return a.survival > b.survival; });
    g_.draft_s = now() - start;
    const int num_auto = best_prefix(base, num_fixed);
    for (int idx = 0; idx < g_.num_seqs; idx++)
      g_.num_admitted[idx] = g_.is_fixed[idx] ? (int32_t)g_.sequences[idx]->tokens.size() : 0;
    double expected = base;
    for (int num = 0; num < num_auto; num++) {
      g_.num_admitted[candidates_[num].draft]++;
      expected += candidates_[num].survival;
    }
    g_.drafted = num_fixed + num_auto > 0;
    set_price(num_fixed + num_auto, expected);
    write();
  }

 private:
  struct Candidate {
    double survival;
    int32_t draft;
  };

  Asker asker(int32_t draft) const { return {g_.ask, &g_.chains, draft}; }

  double now() const {
    if (g_.clock) return g_.clock();
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }

  // Every position worth considering, position by position.
  void grow() {
    std::vector<int32_t> growing(g_.num_seqs), still;
    for (int idx = 0; idx < g_.num_seqs; idx++) growing[idx] = idx;
    double expected = g_.num_decoding;
    int num_rows = g_.num_rows;
    double least = price(expected, num_rows, growing.size());
    step_heads(growing, true);
    while (!growing.empty()) {
      const double start = now();
      still.clear();
      for (int32_t idx : growing) {
        if (num_rows >= g_.max_rows) break;
        Sequence& sequence = *g_.sequences[idx];
        if (!sequence.extend(asker(idx), constrainer_, g_.is_fixed[idx] ? 0.0 : SLACK * least)) continue;
        num_rows++, expected += sequence.survival;
        candidates_.push_back({sequence.survival, idx});
        if ((int)sequence.tokens.size() < g_.limits[idx]) still.push_back(idx);
      }
      observe_ask((now() - start) / growing.size());
      if (num_rows >= g_.max_rows) break;
      least = price(expected, num_rows, still.size());
      worth_going_on(still, growing, least, expected / step_seconds(num_rows - g_.num_rows));
      step_heads(growing, false);
    }
  }

  // The drafts whose next position is worth a guess: it has to bring more tokens than its time would.
  void worth_going_on(const std::vector<int32_t>& drafts, std::vector<int32_t>& going, double least, double rate) {
    going.clear();
    for (int32_t idx : drafts)
      if (g_.is_fixed[idx]) going.push_back(idx);
    const size_t num_fixed = going.size();
    double gain = 0.0;
    bool has_head = false;
    for (int32_t idx : drafts) {
      const Sequence& sequence = *g_.sequences[idx];
      if (g_.is_fixed[idx] || !(sequence.survival >= SLACK * least)) continue;
      going.push_back(idx);
      gain += sequence.next_rate() * std::max(0.0, sequence.survival - least);
      has_head = has_head || sequence.has_head();
    }
    const double head_s = has_head ? g_.head_s : 0.0;
    if (gain < rate * (head_s + g_.ask_s * (going.size() - num_fixed))) going.resize(num_fixed);
  }

  void step_heads(const std::vector<int32_t>& growing, bool starts) {
    stepped_.clear();
    for (int32_t idx : growing)
      if (g_.sequences[idx]->has_stepped()) stepped_.push_back(idx);
    if (stepped_.empty() || g_.step_heads(stepped_.data(), stepped_.size(), starts)) return;
    for (int32_t idx : stepped_) g_.sequences[idx]->drop_stepped();
  }

  void observe_ask(double seconds) {
    if (++g_.num_seen <= MEAN_FIRST) g_.ask_s = g_.num_seen > 1 ? std::min(seconds, g_.ask_s) : seconds;
    else g_.ask_s += MEAN_RATE * (std::min(seconds, 2 * g_.ask_s) - g_.ask_s);
  }

  double seconds(int num_rows) const {
    const int at = std::lower_bound(g_.node_rows, g_.node_rows + g_.num_nodes, num_rows) - g_.node_rows;
    const int idx = at < 1 ? 1 : std::min(at, g_.num_nodes - 1);
    const int low = g_.node_rows[idx - 1];
    const double* times = g_.node_seconds + idx;
    if (num_rows <= low) return times[-1];
    return times[-1] + (times[0] - times[-1]) * (num_rows - low) / (g_.node_rows[idx] - low);
  }

  double step_seconds(int num_drafts) const {
    return alone_s_ + seconds(g_.num_rows + num_drafts) - undrafted_s_;
  }

  // The least that one more row may cost: the cheapest average over the next 1, 2, 4 .. up to `room` rows.
  double row_seconds(int num_rows, int room) const {
    const double here = seconds(num_rows);
    double least = INFINITY;
    for (int ahead = 1; ahead <= room; ahead *= 2)
      least = std::min(least, (seconds(num_rows + ahead) - here) / ahead);
    return least;
  }

  // Tokens that a further row has to bring to raise the rate.
  double price(double expected, int num_rows, int num_growing) const {
    const int room = std::min(g_.max_rows - num_rows, std::max(LEAST_LOOK, num_growing));
    if (room < 1 || !num_growing) return 1.0;
    return expected / step_seconds(num_rows - g_.num_rows) * row_seconds(num_rows, room);
  }

  int best_prefix(double expected, int num_fixed) const {
    int best = 0;
    double best_rate = expected / (step_seconds(num_fixed) + g_.draft_s);
    const double least = best_rate * (1.0 + (g_.drafted ? 0.0 : g_.enter_gain));
    for (size_t num = 1; num <= candidates_.size(); num++) {
      expected += candidates_[num - 1].survival;
      const double rate = expected / (step_seconds(num_fixed + num) + g_.draft_s);
      if (rate > best_rate) best = num, best_rate = rate;
    }
    return best_rate > least ? best : 0;
  }

  void set_price(int num_drafts, double expected) {
    const int room = g_.max_rows - g_.num_rows - num_drafts;
    if (room > 0 && g_.num_decoding)
      g_.row_price = expected * row_seconds(g_.num_rows + num_drafts, std::min(room, LEAST_LOOK)) / step_seconds(num_drafts);
  }

  void write() const {
    int64_t* tokens = g_.tokens;
    int32_t* chosen = g_.chosen;
    double* chances = g_.chances;
    for (int idx = 0; idx < g_.num_seqs; idx++) {
      const Sequence& sequence = *g_.sequences[idx];
      if (chances) {
        if (sequence.is_traced) std::copy_n(sequence.chances.begin(), g_.num_admitted[idx], chances);
        chances += g_.num_admitted[idx];
      }
      tokens = std::copy_n(sequence.tokens.begin(), g_.num_admitted[idx], tokens);
      chosen = std::copy_n(sequence.chosen.begin(), g_.num_admitted[idx], chosen);
    }
  }

  Growth& g_;
  Constrainer constrainer_;
  std::vector<Candidate> candidates_;
  std::vector<int32_t> stepped_;
  double alone_s_, undrafted_s_;  // of steps of the sequences that decode, and of all rows that are no drafts
};

}  // namespace drafts
