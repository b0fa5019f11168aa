// A team of threads that runs one function together, with barriers and shared task counters inside it.
//
// Not OpenMP: a step has hundreds of barriers, and a static schedule waits for whichever core another process took.
// Here tasks are taken from a counter, who waits at a barrier yields after a short spin, and threads whose cores are
// taken are left out for a while (crowding.h). Between runs the threads look for work for some milliseconds, yielding,
// and then sleep. One team a process; calls are made from one thread at a time.
#pragma once

#include <time.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "crowding.h"

#if defined(__x86_64__)
#include <immintrin.h>
#define CPU_RELAX() _mm_pause()
#else
#define CPU_RELAX() std::this_thread::yield()
#endif

class Team {
 public:
  explicit Team(int num_threads) : size_(num_threads), crowding_(num_threads) {
    for (int i = 1; i < num_threads; i++) helpers_.push_back(std::make_unique<Helper>());
    for (int i = 1; i < num_threads; i++) helpers_[i - 1]->thread = std::thread([this, i] { work(i); });
  }
  ~Team() {
    stop_ = true;
    begin(size_);
    for (auto& helper : helpers_) helper->thread.join();
  }
  int size() const { return size_; }
  int active() const { return crowding_.active(); }

  // Runs fn(thread index) on the threads that take part and returns when all are done.
  template <class F>
  void run(F& fn) {
    call_ = [](void* f, int idx) { (*static_cast<F*>(f))(idx); };
    argument_ = &fn;
    if (size_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      fn(0);
      return;
    }
    const double lost_before_s = lost_s_;
    begun_s_ = now_s(CLOCK_MONOTONIC);
    begin(crowding_.active());
    take_part(0, begun_s_);
    crowding_.add(now_s(CLOCK_MONOTONIC) - begun_s_, lost_s_ - lost_before_s);
  }

  // Inside run: all threads wait for each other; the task counter starts again at 0.
  void barrier() {
    if (active_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    unsigned epoch = epoch_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == active_) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      epoch_.store(epoch + 1, std::memory_order_release);
      return;
    }
    for (int spin = 0; epoch_.load(std::memory_order_acquire) == epoch; spin++) {
      if (spin < 4000) CPU_RELAX();
      else std::this_thread::yield();
    }
  }

  // Inside run: the next index below num_tasks that no thread has taken since the last barrier, or -1.
  int next(int num_tasks) {
    int idx = next_.fetch_add(1, std::memory_order_relaxed);
    return idx < num_tasks ? idx : -1;
  }

 private:
  struct alignas(64) Helper {
    std::thread thread;
    std::condition_variable wake;
    std::atomic<unsigned> run{0};  // counts those that it takes part in
  };

  static double now_s(clockid_t clock) {
    timespec time;
    clock_gettime(clock, &time);
    return time.tv_sec + 1e-9 * time.tv_nsec;
  }

  void take_part(int idx, double begun_s) {
    const double cpu_s = now_s(CLOCK_THREAD_CPUTIME_ID);
    call_(argument_, idx);
    barrier();
    const double lost_s = now_s(CLOCK_MONOTONIC) - begun_s - (now_s(CLOCK_THREAD_CPUTIME_ID) - cpu_s);
    for (double sum = lost_s_; !lost_s_.compare_exchange_weak(sum, sum + lost_s);) {
    }
  }

  void begin(int num_threads) {
    next_.store(0, std::memory_order_relaxed);
    active_ = num_threads;
    for (int i = 1; i < num_threads; i++) {
      Helper& helper = *helpers_[i - 1];
      {
        std::lock_guard<std::mutex> lock(mutex_);
        helper.run.store(helper.run.load(std::memory_order_relaxed) + 1, std::memory_order_release);
      }
      helper.wake.notify_one();
    }
  }

  void work(int idx) {
    Helper& helper = *helpers_[idx - 1];
    for (unsigned seen = 0;;) {
      auto idle = [&] { return helper.run.load(std::memory_order_acquire) == seen; };
      // To wake a sleeping thread takes up to milliseconds on a virtual machine, a step's Python about one.
      const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(3);
      while (idle() && std::chrono::steady_clock::now() < patience) {
        for (int spin = 0; spin < 64 && idle(); spin++) CPU_RELAX();
        if (idle()) std::this_thread::yield();
      }
      const bool sleeps = idle();
      if (sleeps) {
        std::unique_lock<std::mutex> lock(mutex_);
        helper.wake.wait(lock, [&] { return !idle(); });
      }
      seen++;
      if (stop_) return;
      // Who was awake and comes late had no core; how long waking takes says nothing of others.
      take_part(idx, sleeps ? now_s(CLOCK_MONOTONIC) : begun_s_);
    }
  }

  const int size_;
  int active_ = 1;  // threads of this run
  Crowding crowding_;
  void (*call_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  double begun_s_ = 0;
  std::vector<std::unique_ptr<Helper>> helpers_;
  std::mutex mutex_;
  bool stop_ = false;
  std::atomic<double> lost_s_{0};  // that threads were without a core, in all runs
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> epoch_{0};
  alignas(64) std::atomic<int> next_{0};
};
