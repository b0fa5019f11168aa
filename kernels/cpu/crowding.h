// How many threads of a team take part, when other processes want the cores too.
//
// A thread that lost its core in the middle of a task holds up all that wait at the next barrier. Where one of two cores is
// taken, a step of one row on two threads takes 2.3 to 2.7 times as long as on a quiet machine, and on one thread 1.6 times.
// So the time is measured that threads were without a core; where that is too much, fewer go on, and after a while all are
// tried again. Owns no threads and no clock; who takes part changes no result.
#pragma once

#include <algorithm>

class Crowding {
 public:
  explicit Crowding(int num_threads) : size_(num_threads), active_(num_threads) {}
  int active() const { return active_; }

  // A run of `active()` threads took wall_s, of which they were without a core for lost_s together.
  void add(double wall_s, double lost_s) {
    pause_left_s_ -= wall_s;
    wall_s_ += wall_s;
    lost_s_ += lost_s;
    if (wall_s_ >= WINDOW_S) {
      const double lost_cores = lost_s_ / wall_s_;
      wall_s_ = lost_s_ = 0;
      if (lost_cores > LOST_CORES && active_ > 1) {
        if (active_ == size_) pause_s_ = std::min(2 * pause_s_, MAX_PAUSE_S);
        pause_left_s_ = pause_s_;
        active_ = std::max(1, active_ - (int)(lost_cores + 1 - LOST_CORES));
      } else if (active_ == size_) {
        pause_s_ = std::max(pause_s_ / 2, MIN_PAUSE_S);
      }
    }
    if (active_ < size_ && pause_left_s_ <= 0) {
      active_ = size_;
      wall_s_ = lost_s_ = 0;
    }
  }

 private:
  static constexpr double WINDOW_S = 0.016;  // a few slices of Linux's scheduler: one that is lost by chance should not count
  // One thread of two takes 1.6 to 1.8 times as long as two, and two that lose 0.4 cores at least 1 / 0.6.
  static constexpr double LOST_CORES = 0.4;
  static constexpr double MIN_PAUSE_S = 0.025, MAX_PAUSE_S = 0.4;  // of runs, not of time between them

  int size_, active_;
  double wall_s_ = 0, lost_s_ = 0, pause_s_ = MIN_PAUSE_S, pause_left_s_ = 0;
};
