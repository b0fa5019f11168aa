// All sources of one sequence, and the draft that is being made: DraftChooser of drafters/chooser.py.
//
// Owns the sequence's text, what its sources know, and its own record of acceptance; its adapter's record is Python's.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "sources.h"

namespace drafts {

enum Kind : int32_t { FOREIGN, NGRAM, PREDICTION, HISTORY, CHAIN };

// One source as Python describes it; mirrored in drafters/native.py.
struct SourceSpec {
  const double* prior;    // [num_levels]
  double* shared;         // [num_levels, 2], of its adapter
  const void* data;       // tokens of a prediction, a History
  int64_t data_len;       // tokens of a prediction, the row of a chain
  int64_t prompt_len;     // tokens of the sequence that are no output
  int32_t kind;
  int32_t num_levels;
  int32_t own;            // sources of one name share a record: the number of the first of them
  int32_t is_head;        // its name is "head"
  int32_t is_stepped;     // it gets its guesses between positions, with those of other sequences
  int32_t name;           // the caller's number of its name
};

enum ConstraintAsk : int32_t { REWIND, ALLOWS, ADVANCE };

struct Constrainer {
  int32_t (*constrain)(int32_t what, int32_t draft, int64_t token);
};

class Sequence {
 public:
  Sequence(const SourceSpec* specs, int num, bool is_constrained, double* positions, bool is_traced)
      : is_traced(is_traced), is_constrained_(is_constrained), positions_(positions) {
    for (int idx = 0; idx < num; idx++) {
      const SourceSpec& spec = specs[idx];
      Member member;
      member.source = make(spec, idx);
      member.prior.assign(spec.prior, spec.prior + spec.num_levels);
      member.shared = spec.shared;
      member.name = spec.name, member.own = spec.own, member.is_head = spec.is_head, member.is_stepped = spec.is_stepped;
      if (spec.own == idx) member.counts.assign(2 * spec.num_levels, 0.0);
      members_.push_back(std::move(member));
    }
  }

  void append(const int32_t* tokens, int64_t num) { text_.insert(text_.end(), tokens, tokens + num); }

  void begin(const Asker& asker, const Constrainer& constrainer) {
    tokens.clear(), chosen.clear(), chances.clear(), guesses_.clear(), asked_.clear();
    survival = 1.0;
    if (is_constrained_) constrainer.constrain(REWIND, asker.draft, 0);
    for (Member& member : members_)
      if (member.is_alive && member.source->begin(asker, text_) == FAILED) member.is_alive = false;
  }

  // Propose one more token if all would survive with that chance; false when the draft ends here.
  bool extend(const Asker& asker, const Constrainer& constrainer, double least_survival) {
    const size_t first = guesses_.size();
    rates_.clear();
    for (size_t idx = 0; idx < members_.size(); idx++) {
      Member& member = members_[idx];
      if (!member.is_alive) continue;
      Guess guess;
      const Said said = member.source->peek(asker, guess);
      if (said == FAILED) member.is_alive = false;
      if (said != SOMETHING) continue;
      guesses_.push_back({(int32_t)idx, guess});
      rates_.push_back(rate(own(member) + 2 * guess.level, member.shared + 2 * guess.level, member.prior[guess.level]));
    }
    double best_rate = -1.0;
    const int64_t best = take_best(asker, constrainer, first, least_survival, best_rate);
    asked_.push_back({guesses_.size(), best < 0 ? NO_TOKEN : guesses_[best].guess.token});
    if (best < 0 || survival * best_rate < least_survival) return false;
    survival *= best_rate;
    const int64_t token = guesses_[best].guess.token;
    tokens.push_back(token);
    chosen.push_back(members_[guesses_[best].source].name);
    if (is_traced) chances.push_back(best_rate);
    for (Member& member : members_)
      if (member.is_alive && member.source->follow(asker, token) == FAILED) member.is_alive = false;
    return true;
  }

  double next_rate() const { return position_rate(positions_, tokens.size()); }

  bool has_head() const {
    for (const Member& member : members_)
      if (member.is_alive && member.is_head) return true;
    return false;
  }

  bool has_stepped() const {
    for (const Member& member : members_)
      if (member.is_alive && member.is_stepped) return true;
    return false;
  }

  void drop_stepped() {
    for (Member& member : members_)
      if (member.is_stepped) member.is_alive = false;
  }

  // Learn from the tokens that came, and go on by them: every guess up to the first wrong draft was made on true ground.
  void learn(const int32_t* committed, int64_t num) {
    size_t at = 0;
    for (size_t position = 0; position < asked_.size() && position < (size_t)num; position++) {
      const int64_t token = committed[position];
      if (position < MAX_POSITIONS) observe(positions_ + 2 * position, SHARED_DECAY, asked_[position].best == token);
      for (; at < asked_[position].end; at++) {
        Member& member = members_[guesses_[at].source];
        const Guess& guess = guesses_[at].guess;
        observe(own(member) + 2 * guess.level, SEQUENCE_DECAY, guess.token == token);
        observe(member.shared + 2 * guess.level, SHARED_DECAY, guess.token == token);
      }
    }
    guesses_.clear(), asked_.clear();
    append(committed, num);
  }

  int64_t size() const { return text_.size(); }

  std::vector<int64_t> tokens;  // of the draft
  std::vector<int32_t> chosen;  // name of the source of each
  std::vector<double> chances;  // that each is right, those before it being right; only where it is traced
  double survival = 1.0;        // chance that every token of the draft is right
  const bool is_traced;

 private:
  static constexpr int64_t NO_TOKEN = INT64_MIN;

  struct Member {
    std::unique_ptr<Source> source;
    std::vector<double> prior, counts;
    double* shared;
    int32_t own, name;
    bool is_head, is_stepped, is_alive = true;
  };
  struct Made {
    int32_t source;
    Guess guess;
  };
  struct Asked {
    size_t end;    // of the position's guesses
    int64_t best;  // the token, also of the last position, which did not pay
  };

  static std::unique_ptr<Source> make(const SourceSpec& spec, int idx) {
    switch (spec.kind) {
      case NGRAM: return std::make_unique<Ngram>();
      case PREDICTION: return std::make_unique<Prediction>((const int32_t*)spec.data, spec.data_len, spec.prompt_len);
      case HISTORY: return std::make_unique<HistoryVotes>(*(const History*)spec.data, spec.prompt_len);
      case CHAIN: return std::make_unique<Chain>(spec.data_len);
      default: return std::make_unique<Foreign>(idx);
    }
  }

  double* own(Member& member) { return members_[member.own].counts.data(); }

  // The most credible of the guesses from `first` on that is allowed, the earlier of equal ones; forbidden ones are
  // taken out. -1: none. The constraint goes on by it unless the draft ends here for want of survival.
  int64_t take_best(const Asker& asker, const Constrainer& constrainer, size_t first, double least, double& best_rate) {
    while (guesses_.size() > first) {
      const size_t at = std::max_element(rates_.begin(), rates_.end()) - rates_.begin();
      if (!is_constrained_) return best_rate = rates_[at], first + at;
      const bool goes_on = survival * rates_[at] >= least;
      if (constrainer.constrain(goes_on ? ADVANCE : ALLOWS, asker.draft, guesses_[first + at].guess.token))
        return best_rate = rates_[at], first + at;
      guesses_.erase(guesses_.begin() + first + at);
      rates_.erase(rates_.begin() + at);
    }
    return -1;
  }

  Text text_;
  std::vector<Member> members_;
  std::vector<Made> guesses_;  // of all positions, also those not chosen
  std::vector<Asked> asked_;   // by position
  std::vector<double> rates_;
  bool is_constrained_;
  double* positions_;  // [MAX_POSITIONS, 2], of its adapter
};

}  // namespace drafts
