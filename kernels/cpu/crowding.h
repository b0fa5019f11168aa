// How many threads of a team take part, when other processes want the cores too.
//
// A thread that lost its core in the middle of a task holds up all that wait at the next barrier. Where one of two
// cores is taken, a step of one row on two threads takes 2.3 to 2.9 times as long as on a quiet machine, and on one
// thread 1.6 times. So the time is measured that threads were without a core; where that is too much, fewer go on, and
// after a while all are tried again. Owns no threads and no clock; who takes part changes no result.
#pragma once

#include <algorithm>

class Crowding {
 public:
  explicit Crowding(int num_threads) : size_(num_threads), active_(num_threads) {}
  int active() const { return active_; }

  // A run of `active()` threads took wall_s, of which they were without a core for lost_s together.
  void add(double wall_s, double lost_s) {
    wall_s_ += wall_s;
    lost_s_ += lost_s;
    pause_left_s_ -= wall_s;
    if (wall_s_ >= window_s_) {
      const double lost_cores = lost_s_ / wall_s_;
      const bool all = active_ == size_;
      begin_window(WINDOW_S);
      if (lost_cores > LOST_CORES && active_ > 1) {
        if (all) pause_s_ = std::min(2 * pause_s_, MAX_PAUSE_S);
        pause_left_s_ = pause_s_;
        active_ = std::max(1, active_ - (int)(lost_cores + 1 - LOST_CORES));
      } else if (all) {
        pause_s_ = std::max(pause_s_ / 2, MIN_PAUSE_S);
      }
    }
    if (active_ < size_ && pause_left_s_ <= 0) {
      active_ = size_;
      begin_window(++num_tries_ % 4 ? TRY_S : LONG_TRY_S);
    }
  }

 private:
  void begin_window(double window_s) { window_s_ = window_s, wall_s_ = lost_s_ = 0; }

  // Linux's scheduler gives cores for some 4 ms: a few slices that were lost by chance should not count. A try ends
  // sooner, as it costs; but now and then it is long, as a group of processes that left a core gets its share back in
  // some 50 ms.
  static constexpr double WINDOW_S = 0.05, TRY_S = 0.016, LONG_TRY_S = 0.1;
  // One thread of two takes 1.6 to 1.8 times as long as two, and two that lose 0.4 cores at least 1 / 0.6.
  static constexpr double LOST_CORES = 0.4;
  static constexpr double MIN_PAUSE_S = 0.025, MAX_PAUSE_S = 0.4;  // of runs, not of time between them

  int size_, active_, num_tries_ = 0;
  double window_s_ = WINDOW_S, wall_s_ = 0, lost_s_ = 0, pause_s_ = MIN_PAUSE_S, pause_left_s_ = 0;
};
