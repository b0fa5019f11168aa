// Follows a sequence's output through its adapter's task history: HistoryCursor and TaskHistory.match in Python.
//
// The table is Python's, immutable; whoever made the sequence keeps it alive.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace drafts {

constexpr int MAX_CONTEXT = 24, MAX_CANDIDATES = 64, PARTITION_LIMIT = 4096;
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

  // Stand at the end of the last `num` tokens of the output, at least MAX_CONTEXT of them where there are so many.
  void begin(const int32_t* newest, int64_t num) {
    recent_.assign(newest, newest + num);
    if (num) match_again();
    else candidates_.assign(history_.starts, history_.starts + history_.num_starts), match_len_ = 0;
  }

  // The token that most candidates have, the newest one's of equals; false if there is none.
  bool peek(int64_t& token, int64_t& match_len, int& num_votes, int& num_candidates) const {
    if (candidates_.empty()) return false;
    uint32_t cast[MAX_CANDIDATES];
    int votes[MAX_CANDIDATES], num = 0, best = 0;
    for (int32_t position : candidates_) {
      const uint32_t local = history_.at(position);
      int idx = 0;
      while (idx < num && cast[idx] != local) idx++;
      if (idx == num) cast[num] = local, votes[num++] = 0;
      votes[idx]++;
    }
    for (int idx = 1; idx < num; idx++)
      if (votes[idx] > votes[best]) best = idx;
    token = history_.ids[cast[best] - 1];
    match_len = match_len_, num_votes = votes[best], num_candidates = candidates_.size();
    return true;
  }

  void follow(int64_t token) {
    recent_.push_back(token);
    const uint32_t local = history_.local(token);
    size_t kept = 0;
    if (local)
      for (int32_t position : candidates_)
        if (history_.at(position) == local && history_.at(position + 1)) candidates_[kept++] = position + 1;
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
    const int width = history_.token_bytes;
    uint8_t query[(MAX_CONTEXT + 1) * 4];
    int query_len = 0;
    uint32_t newest = 0;
    for (int num = 0; num < MAX_CONTEXT && num < (int)recent_.size(); num++) {
      const uint32_t local = history_.local(recent_[recent_.size() - 1 - num]);
      if (!local) break;
      if (!num) newest = local;
      for (int byte = width - 1; byte >= 0; byte--) query[query_len++] = local >> 8 * byte;
    }
    if (!query_len) return;
    int64_t low = history_.bounds[newest], high = history_.bounds[newest + 1];
    if (low == high) return;
    const int64_t place = bisect(query, query_len, low, high);
    int length = 0;
    for (int64_t neighbour : {place - 1, place})
      if (low <= neighbour && neighbour < high) {
        const uint8_t* key = history_.key(history_.sorted[neighbour]);
        int same = 0;
        while (same < query_len && !std::memcmp(key + same, query + same, width)) same += width;
        length = std::max(length, same / width);
      }
    if (length > 1) {
      low = bisect(query, length * width, low, place);
      std::memset(query + length * width, 0xff, width);
      high = bisect(query, (length + 1) * width, place, high);
    }
    newest_in(low, high);
    match_len_ = length;
  }

  // The largest positions at the sorted places low..high-1, largest first.
  void newest_in(int64_t low, int64_t high) {
    auto& found = candidates_;
    const auto larger = std::greater<int32_t>();
    if (high - low > PARTITION_LIMIT) {
      for (int64_t at = history_.text_len - 1; at >= 0 && found.size() < MAX_CANDIDATES; at--)
        if (history_.rank[at] >= low && history_.rank[at] < high) found.push_back(at);
      return;
    }
    for (int64_t place = high - 1; place >= low; place--) {  // of equal contexts the newest are the last
      const int32_t position = history_.sorted[place];
      if (found.size() < MAX_CANDIDATES) {
        found.push_back(position), std::push_heap(found.begin(), found.end(), larger);
      } else if (position > found[0]) {
        std::pop_heap(found.begin(), found.end(), larger);
        found.back() = position, std::push_heap(found.begin(), found.end(), larger);
      }
    }
    std::sort(found.begin(), found.end(), larger);
  }

  const History& history_;
  std::vector<int64_t> recent_;
  std::vector<int32_t> candidates_;  // newest first
  int64_t match_len_ = 0;
};

}  // namespace drafts
