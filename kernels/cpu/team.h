// A team of threads that runs one function together, with barriers and shared task counters inside it.
//
// Not OpenMP: a step has hundreds of barriers, and a static schedule waits for whichever core another process took. Here
// tasks are taken from a counter, and who waits at a barrier yields after a short spin. Between steps the threads
// look for work for some milliseconds, yielding, and then sleep. One team a process; calls are made from one thread at a time.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define CPU_RELAX() _mm_pause()
#else
#define CPU_RELAX() std::this_thread::yield()
#endif

class Team {
 public:
  explicit Team(int num_threads) : size_(num_threads) {
    for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
  }
  ~Team() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_ = true;
      run_.store(run_.load() + 1);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
  }
  int size() const { return size_; }

  // Runs fn(thread index) on every thread of the team and returns when all are done.
  template <class F>
  void run(F& fn) {
    call_ = [](void* f, int idx) { (*static_cast<F*>(f))(idx); };
    argument_ = &fn;
    next_.store(0, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      run_.store(run_.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    }
    if (size_ > 1) wake_.notify_all();
    fn(0);
    barrier();
  }

  // Inside run: all threads wait for each other; the task counter starts again at 0.
  void barrier() {
    if (size_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    unsigned epoch = epoch_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
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
  void work(int idx) {
    unsigned seen = 0;
    for (;;) {
      // To wake a sleeping thread takes up to milliseconds on a virtual machine, a step's Python about one.
      const auto patience = std::chrono::steady_clock::now() + std::chrono::milliseconds(3);
      while (run_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < patience) {
        for (int spin = 0; spin < 64 && run_.load(std::memory_order_acquire) == seen; spin++) CPU_RELAX();
        if (run_.load(std::memory_order_acquire) == seen) std::this_thread::yield();
      }
      if (run_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return run_.load(std::memory_order_acquire) != seen; });
      }
      seen++;
      if (stop_) return;
      call_(argument_, idx);
      barrier();
    }
  }

  int size_;
  void (*call_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  std::vector<std::thread> threads_;
  std::mutex mutex_;
  std::condition_variable wake_;
  bool stop_ = false;
  alignas(64) std::atomic<unsigned> run_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<unsigned> epoch_{0};
  alignas(64) std::atomic<int> next_{0};
};
