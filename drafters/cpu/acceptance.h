// How often guesses are right: the formulas of drafters/acceptance.py over counts [right, seen] by level.
//
// Counts of an adapter lie in Python's arrays, shared by its sequences; a sequence's own lie with it. Every sum has the
// order that it has in Python, so that both give the same bits.
#pragma once

#include <cstdint>

namespace drafts {

constexpr double PRIOR_WEIGHT = 8.0, SHARED_WEIGHT = 4.0, SHARED_DECAY = 0.999, SEQUENCE_DECAY = 0.98;
constexpr double POSITION_PRIOR = 0.8;
constexpr int MAX_POSITIONS = 64;

inline double rate(const double* own, const double* shared, double prior) {
  const double adapters = (shared[0] + prior * PRIOR_WEIGHT) / (shared[1] + PRIOR_WEIGHT);
  return (own[0] + adapters * SHARED_WEIGHT) / (own[1] + SHARED_WEIGHT);
}

inline double position_rate(const double* positions, int position) {
  const double* count = positions + 2 * (position < MAX_POSITIONS ? position : MAX_POSITIONS - 1);
  return (count[0] + POSITION_PRIOR * PRIOR_WEIGHT) / (count[1] + PRIOR_WEIGHT);
}

inline void observe(double* count, double decay, bool is_right) {
  count[0] = count[0] * decay + (is_right ? 1.0 : 0.0);
  count[1] = count[1] * decay + 1.0;
}

constexpr int MATCH_LIMITS[] = {2, 4, 8, 16};

inline int match_level(int64_t match_len) {
  int level = 0;
  for (int limit : MATCH_LIMITS) level += match_len > limit;
  return level;
}

}  // namespace drafts
