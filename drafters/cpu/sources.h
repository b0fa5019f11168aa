// What guesses: the sources that are native, and a voice for those that Python is asked for.
//
// Each is the source of the same name in drafters/*.py, guess by guess. `text` is the sequence's prompt and output.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "acceptance.h"
#include "history.h"
#include "suffix.h"

namespace drafts {

using Text = std::vector<int32_t>;

struct Guess {
  int64_t token;
  int32_t level;
};

enum Said : int32_t { FAILED = -1, NOTHING = 0, SOMETHING = 1 };
enum Ask : int32_t { BEGIN, PEEK, FOLLOW };

// Chains of guesses that heads made on a device, a row each; drafters/chains.py.
struct Chains {
  const int32_t* tokens;
  const float* probabilities;
  const int64_t* lens;  // tokens of the sequence that a chain continues
  uint8_t* wanted;
  int64_t width;
};

// Who asks: what a source may need of the step. `ask` asks Python's source number `source` of draft number `draft`.
struct Asker {
  int32_t (*ask)(int32_t what, int32_t draft, int32_t source, int64_t token, int64_t* guess);
  const Chains* chains;
  int32_t draft;
};

class Source {
 public:
  virtual ~Source() = default;
  virtual Said begin(const Asker& asker, const Text& text) = 0;
  virtual Said peek(const Asker& asker, Guess& guess) = 0;
  virtual Said follow(const Asker& asker, int64_t token) = 0;
};

class Foreign : public Source {
 public:
  explicit Foreign(int32_t number) : number_(number) {}

  Said begin(const Asker& asker, const Text&) override { return ask(asker, BEGIN, 0, nullptr); }
  Said follow(const Asker& asker, int64_t token) override { return ask(asker, FOLLOW, token, nullptr); }
  Said peek(const Asker& asker, Guess& guess) override {
    int64_t answer[2] = {0, 0};
    const Said said = ask(asker, PEEK, 0, answer);
    guess = {answer[0], (int32_t)answer[1]};
    return said;
  }

 private:
  Said ask(const Asker& asker, Ask what, int64_t token, int64_t* guess) const {
    return (Said)asker.ask(what, asker.draft, number_, token, guess);
  }
  int32_t number_;
};

class Ngram : public Source {
 public:
  Said begin(const Asker&, const Text& text) override {
    text_ = &text;
    draft_.clear();
    index_.extend(text);
    match();
    return NOTHING;
  }
  Said peek(const Asker&, Guess& guess) override {
    if (!has_next()) return NOTHING;
    guess = {at(match_.next), match_level(match_.length)};
    return SOMETHING;
  }
  Said follow(const Asker&, int64_t token) override {
    const bool is_right = has_next() && at(match_.next) == token;
    draft_.push_back(token);
    if (is_right) match_.next++, match_.length++;
    else match();
    return NOTHING;
  }

 private:
  static constexpr int64_t SUFFIX_LEN = 64;

  int64_t size() const { return text_->size() + draft_.size(); }
  bool has_next() const { return match_.next != NOWHERE && match_.next < size(); }
  int64_t at(int64_t idx) const {
    return idx < (int64_t)text_->size() ? (*text_)[idx] : draft_[idx - text_->size()];
  }
  void match() {
    const int64_t end = size() - 1;
    match_ = index_.longest_match(*text_, std::min(SUFFIX_LEN, size()), [&](int64_t k) { return at(end - k); }, -1);
  }

  SuffixIndex index_;
  const Text* text_ = nullptr;
  std::vector<int64_t> draft_;
  Match match_;
};

class Prediction : public Source {
 public:
  Prediction(const int32_t* tokens, int64_t num, int64_t prompt_len)
      : prediction_(tokens, tokens + num), num_seen_(prompt_len) {
    index_.extend(prediction_);
  }
  Said begin(const Asker&, const Text& text) override {
    const int64_t size = text.size();
    for (int64_t idx = num_seen_; idx < size; idx++) {
      if (is_next(next_, text[idx])) last_ = ++next_, match_len_++;
      else next_ = NOWHERE;
    }
    if (next_ == NOWHERE && size > num_seen_) {
      const Match match = index_.longest_match(
          prediction_, std::min<int64_t>(64, size), [&](int64_t k) { return (int64_t)text[size - 1 - k]; }, last_);
      if (match.next != NOWHERE) next_ = last_ = match.next, match_len_ = match.length;
    }
    num_seen_ = size;
    draft_next_ = next_, draft_len_ = 0;
    return NOTHING;
  }
  Said peek(const Asker&, Guess& guess) override {
    if (draft_next_ == NOWHERE || draft_next_ >= (int64_t)prediction_.size()) return NOTHING;
    guess = {prediction_[draft_next_], match_level(match_len_ + draft_len_)};
    return SOMETHING;
  }
  Said follow(const Asker&, int64_t token) override {
    if (draft_next_ == NOWHERE) return NOTHING;
    draft_next_ = is_next(draft_next_, token) ? draft_next_ + 1 : NOWHERE;
    draft_len_++;
    return NOTHING;
  }

 private:
  bool is_next(int64_t at, int64_t token) const {
    return at != NOWHERE && at < (int64_t)prediction_.size() && prediction_[at] == token;
  }

  Text prediction_;
  SuffixIndex index_;
  int64_t num_seen_, next_ = 0, last_ = 0, match_len_ = 8, draft_next_ = NOWHERE, draft_len_ = 0;
};

class HistoryVotes : public Source {
 public:
  HistoryVotes(const History& history, int64_t prompt_len) : cursor_(history), prompt_len_(prompt_len) {}

  Said begin(const Asker&, const Text& text) override {
    cursor_.begin(text.data() + prompt_len_, text.size() - prompt_len_);
    return NOTHING;
  }
  Said peek(const Asker&, Guess& guess) override {
    int64_t match_len;
    int num_votes, num_candidates, agreement = 0;
    if (!cursor_.peek(guess.token, match_len, num_votes, num_candidates)) return NOTHING;
    const double share = (double)num_votes / num_candidates;
    if (num_candidates < MANY && num_votes == num_candidates) agreement = 4;
    else for (double least : AGREEMENTS) agreement += share >= least;
    guess.level = match_level(match_len) * 5 + agreement;
    return SOMETHING;
  }
  Said follow(const Asker&, int64_t token) override {
    cursor_.follow(token);
    return NOTHING;
  }

 private:
  Cursor cursor_;
  int64_t prompt_len_;
};

class Chain : public Source {
 public:
  explicit Chain(int64_t row) : row_(row) {}

  Said begin(const Asker& asker, const Text& text) override {
    const Chains& chains = *asker.chains;
    chains.wanted[row_] = 1;
    next_ = 0;
    guesses_.clear();
    if (chains.lens[row_] != (int64_t)text.size()) return NOTHING;
    for (int64_t idx = row_ * chains.width; idx < (row_ + 1) * chains.width; idx++) {
      const double probability = chains.probabilities[idx];
      if (chains.tokens[idx] < 0 || !(probability >= 0.0 && probability <= 1.0)) break;
      guesses_.push_back({chains.tokens[idx], std::min(NUM_LEVELS - 1, (int32_t)(probability * NUM_LEVELS))});
    }
    return NOTHING;
  }
  Said peek(const Asker&, Guess& guess) override {
    if (next_ >= guesses_.size()) return NOTHING;
    guess = guesses_[next_];
    return SOMETHING;
  }
  Said follow(const Asker&, int64_t token) override {
    const bool is_right = next_ < guesses_.size() && guesses_[next_].token == token;
    next_ = is_right ? next_ + 1 : guesses_.size();
    return NOTHING;
  }

 private:
  static constexpr int32_t NUM_LEVELS = 12;
  int64_t row_;
  std::vector<Guess> guesses_;
  size_t next_ = 0;
};

}  // namespace drafts
