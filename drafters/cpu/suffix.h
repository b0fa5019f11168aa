// Where the newest tokens occurred before: drafters/suffix_index.py with the bigrams in a table of 4 bytes an entry.
//
// A slot holds the newest position of a bigram, the index after it, and each position the one before it of the same
// bigram; which bigram a slot is of is read from the text.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

namespace drafts {

constexpr int MAX_MATCH_LEN = 32, MAX_COMPARED = 16;
constexpr int64_t NOWHERE = -1;

struct Match {
  int64_t next = NOWHERE;  // index of the continuation
  int64_t length = 0;
};

class SuffixIndex {
 public:
  // Index what was appended to `text` since the last call.
  void extend(const std::vector<int32_t>& text) {
    if (2 * text.size() > slots_.size()) rebuild(text);
    else add(text, num_indexed_);
  }

  // As in Python; `back(k)` is the k-th token from the end of a suffix of `suffix_len`, near < 0 the most recent.
  template <class Back>
  Match longest_match(const std::vector<int32_t>& text, int64_t suffix_len, const Back& back, int64_t near) const {
    Match best;
    if (suffix_len < 2 || slots_.empty() || !is_token(back(0)) || !is_token(back(1))) return best;
    int64_t best_rank = 0, size = text.size();
    int32_t position = slots_[slot(text, back(1), back(0))];
    for (int num = 0; position && num <= MAX_COMPARED; num++, position = before_[position]) {
      if (position >= size) continue;
      int64_t length = 2, limit = std::min<int64_t>({MAX_MATCH_LEN, position, suffix_len});
      while (length < limit && text[position - length - 1] == back(length)) length++;
      const int64_t rank = near >= 0 ? -std::llabs(position - near) : position;
      if (best.next == NOWHERE || length > best.length || (length == best.length && rank > best_rank))
        best = {position, length}, best_rank = rank;
    }
    return best;
  }

 private:
  static bool is_token(int64_t token) { return token >= 0 && token <= INT32_MAX; }

  size_t slot(const std::vector<int32_t>& text, int64_t first, int64_t second) const {
    uint64_t hash = ((uint64_t)first << 32 | (uint64_t)second) * 0x9E3779B97F4A7C15u;
    const size_t mask = slots_.size() - 1;
    for (size_t at = (hash >> 32) & mask;; at = (at + 1) & mask) {
      const int32_t end = slots_[at];
      if (!end || (text[end - 2] == first && text[end - 1] == second)) return at;
    }
  }

  void rebuild(const std::vector<int32_t>& text) {
    size_t size = 64;
    while (size < 4 * text.size()) size *= 2;
    slots_.assign(size, 0);
    add(text, 1);
  }

  void add(const std::vector<int32_t>& text, size_t from) {
    if (before_.size() < text.size() + 1) before_.resize(text.size() + 1);
    for (size_t end = from; end < text.size(); end++) {
      int32_t& newest = slots_[slot(text, text[end - 1], text[end])];
      before_[end + 1] = newest;
      newest = end + 1;
    }
    num_indexed_ = std::max(num_indexed_, text.size());
  }

  std::vector<int32_t> slots_, before_;
  size_t num_indexed_ = 1;
};

}  // namespace drafts
