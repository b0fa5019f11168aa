// Follows a sequence's output through its adapter's task history: HistoryCursor and TaskHistory.match in Python.
//
// The table is Python's, immutable; whoever made the sequence keeps it alive.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace drafts {

constexpr int MAX_CONTEXT = 24, MAX_CANDIDATES = 64;
constexpr double AGREEMENTS[] = {0.5, 0.8, 0.95};
constexpr int MANY = 4;

// Mirrored in drafters/native.py; what each is, drafters/task_history.py says.
struct History {
  const uint8_t* reversed;
  const int32_t* sorted;
  const int32_t* rank;
  const void* text;
  const uint32_t* ids;
  const int32_t* bounds;
  const int32_t* starts;
  int32_t text_len;
  int32_t num_ids;
  int32_t num_starts;
  int32_t token_bytes;

  uint32_t at(int64_t position) const {
    return token_bytes == 2 ? ((const uint16_t*)text)[position] : ((const uint32_t*)text)[position];
  }

  uint32_t local(int64_t token) const {  // 0: not in the text
    if (token < 0) return 0;
    const uint32_t* found = std::lower_bound(ids, ids + num_ids, (uint64_t)token);
    return found < ids + num_ids && *found == (uint64_t)token ? found - ids + 1 : 0;
  }

  const uint8_t* key(int64_t position) const { return reversed + (text_len - position) * token_bytes; }
};

class Cursor {
 public:
  explicit Cursor(const History& history) : history_(history) {}

  // Stand at the end of `output`, which only grows; an empty one stands at the starts of the completions.
  void begin(const int32_t* output, int64_t num) {
    locals_.resize(num_known_);
    for (; num_known_ < num; num_known_++) {
      const uint32_t local = history_.local(output[num_known_]);
      locals_.push_back(local);
      near_ = near_ >= 0 && history_.at(near_) == local && local ? near_ + 1 : -1;
    }
    if (num) {
      match_again();
      near_ = matched_;
    } else {
      candidates_.assign(history_.starts, history_.starts + history_.num_starts);
      read_next();
      match_len_ = 0;
    }
  }

  // The token that most candidates have, the newest one's of equals; false if there is none.
  bool peek(int64_t& token, int64_t& match_len, int& num_votes, int& num_candidates) const {
    const int num = num_candidates = candidates_.size();
    if (!num) return false;
    const int newest = std::max_element(candidates_.begin(), candidates_.end()) - candidates_.begin();
    uint32_t winner = next_[newest];
    num_votes = std::count(next_, next_ + num, winner);
    if (2 * num_votes < num) {  // else nobody has more
      int32_t winners_newest = candidates_[newest];
      for (int first = 0; first < num; first++) {  // of a token its first counts all
        const int votes = std::count(next_ + first, next_ + num, next_[first]);
        if (votes < num_votes) continue;
        const int32_t its_newest = newest_with(next_[first]);
        if (votes > num_votes || its_newest > winners_newest)
          winner = next_[first], num_votes = votes, winners_newest = its_newest;
      }
    }
    token = history_.ids[winner - 1];
    match_len = match_len_;
    return true;
  }

  void follow(int64_t token) {
    const uint32_t local = history_.local(token);
    locals_.push_back(local);
    size_t kept = 0;
    if (local) {
      for (size_t idx = 0; idx < candidates_.size(); idx++) {
        if (next_[idx] != local) continue;
        const int32_t position = candidates_[idx] + 1;
        const uint32_t next = history_.at(position);
        if (next) candidates_[kept] = position, next_[kept++] = next;  // else its completion ends there
      }
    }
    candidates_.resize(kept);
    match_len_++;
    if (!kept) match_again();
  }

 private:
  // Whether the context before `position` sorts before a query, as Python compares bytes.
  bool is_before(int64_t position, const uint8_t* query, int query_len) const {
    const int key_len = MAX_CONTEXT * history_.token_bytes;
    const int order = std::memcmp(history_.key(position), query, std::min(key_len, query_len));
    return order < 0 || (order == 0 && key_len < query_len);
  }

  // The first place in low..high that is not before a query, from either end in steps that double: mostly it is near.
  int64_t first_from(int64_t low, int64_t high, const uint8_t* query, int query_len) const {
    int64_t step = 1;
    while (low + step <= high && is_before(history_.sorted[low + step - 1], query, query_len)) low += step, step *= 2;
    return bisect(query, query_len, low, std::min(high, low + step - 1));
  }
  int64_t last_from(int64_t low, int64_t high, const uint8_t* query, int query_len) const {
    int64_t step = 1;
    while (high - step >= low && !is_before(history_.sorted[high - step], query, query_len)) high -= step, step *= 2;
    return bisect(query, query_len, std::max(low, high - step + 1), high);
  }

  int64_t bisect(const uint8_t* query, int query_len, int64_t low, int64_t high) const {
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (is_before(history_.sorted[middle], query, query_len)) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  void match_again() {
    candidates_.clear();
    match_len_ = 0;
    matched_ = -1;
    const int width = history_.token_bytes;
    uint8_t query[(MAX_CONTEXT + 1) * 4];
    int query_len = 0;
    for (auto local = locals_.rbegin(); local != locals_.rend() && *local && query_len < MAX_CONTEXT * width; ++local)
      for (int byte = width - 1; byte >= 0; byte--) query[query_len++] = *local >> 8 * byte;
    if (!query_len) return;
    const uint32_t newest = locals_.back();
    int64_t low = history_.bounds[newest], high = history_.bounds[newest + 1];
    if (low == high) return;
    const int64_t near = near_ >= 0 ? history_.rank[near_] : -1;
    int64_t place;
    if (near < low || near >= high) place = bisect(query, query_len, low, high);
    else if (is_before(history_.sorted[near], query, query_len)) place = first_from(near + 1, high, query, query_len);
    else place = last_from(low, near, query, query_len);
    int length = 0;
    for (int64_t neighbour : {place - 1, place})
      if (low <= neighbour && neighbour < high) {
        const uint8_t* key = history_.key(history_.sorted[neighbour]);
        int same = 0;
        while (same < query_len && !std::memcmp(key + same, query + same, width)) same += width;
        if (same / width > length) length = same / width, matched_ = history_.sorted[neighbour];
      }
    if (length > 1) {
      low = last_from(low, place, query, length * width);
      std::memset(query + length * width, 0xff, width);
      high = first_from(place, high, query, (length + 1) * width);
    }
    newest_in(low, high);
    read_next();
    match_len_ = length;
  }

  int32_t newest_with(uint32_t local) const {
    int32_t newest = -1;
    for (size_t idx = 0; idx < candidates_.size(); idx++)
      if (next_[idx] == local) newest = std::max(newest, candidates_[idx]);
    return newest;
  }

  // The largest positions at the sorted places low..high-1. Of very many they are met soon by whoever walks back
  // through the text, unless all of them are old; of fewer, halving says from where on they are the right number.
  void newest_in(int64_t low, int64_t high) {
    const int64_t num = high - low, text_len = history_.text_len;
    if (num > MAX_CANDIDATES && num * num > 16 * text_len && walk_back(low, num)) return;
    const int32_t* all = history_.sorted + low;
    int64_t least = 0, beyond = num > MAX_CANDIDATES ? text_len : 0;  // too many from here on, too few from there on
    while (beyond > least) {
      const int32_t middle = (least + beyond) / 2;
      int32_t num_from = 0;
      for (int64_t idx = 0; idx < num; idx++) num_from += all[idx] >= middle;
      if (num_from == MAX_CANDIDATES) least = beyond = middle;
      else if (num_from > MAX_CANDIDATES) least = middle;
      else beyond = middle;
    }
    candidates_.clear();
    for (int64_t idx = 0; idx < num; idx++)
      if (all[idx] >= least) candidates_.push_back(all[idx]);
  }

  bool walk_back(int64_t low, int64_t num) {
    const int64_t last = std::max<int64_t>(0, history_.text_len - 4 * MAX_CANDIDATES * history_.text_len / num);
    for (int64_t end = history_.text_len; end > last;) {
      const int64_t start = std::max<int64_t>(0, end - BLOCK);
      uint32_t num_hits = 0;
      for (int64_t at = start; at < end; at++) num_hits += (uint32_t)(history_.rank[at] - (int32_t)low) < (uint32_t)num;
      for (int64_t at = end - 1; num_hits && at >= start; at--) {
        if ((uint32_t)(history_.rank[at] - (int32_t)low) >= (uint32_t)num) continue;
        num_hits--;
        candidates_.push_back(at);
        if (candidates_.size() == MAX_CANDIDATES) return true;
      }
      end = start;
    }
    return false;
  }

  void read_next() {
    for (size_t idx = 0; idx < candidates_.size(); idx++) next_[idx] = history_.at(candidates_[idx]);
  }

  static constexpr int64_t BLOCK = 64;

  const History& history_;
  std::vector<uint32_t> locals_;  // of the output, then of the draft; 0: not in the table
  int64_t num_known_ = 0;         // of them, of the output
  std::vector<int32_t> candidates_;  // the newest, in any order
  uint32_t next_[MAX_CANDIDATES];    // what each of them has, never the end of a completion
  int64_t match_len_ = 0;
  int32_t matched_ = -1;  // a position whose context agrees as far back as any
  int32_t near_ = -1;     // the one that was so when the latest draft began, moved on by the output: a place to search from
};

}  // namespace drafts
