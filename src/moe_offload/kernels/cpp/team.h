// The threads of one call: how they share out items, such as tiles of a matrix, and wait for each
// other. A stage's items may run in any order; the next stage starts when all of them are done.
#pragma once

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <cstdint>

namespace cpux {

class Team {
 public:
  explicit Team(int threads) : threads_(threads) {}

  // Runs work(thread) on every thread; it may not throw.
  template <class F>
  void run(F work) {
#pragma omp parallel num_threads(threads_)
    work(omp_get_thread_num());
  }

  // Runs work(item) for items [0, n) of a stage, each of them on whichever thread takes it. Every
  // thread passes the stages in order: 0, 1, ...
  template <class F>
  void share(int stage, int64_t n, F work) {
    if (stage > 0) wait();
    // Items are taken in runs, long at first and single at the end: what one item prefetches beyond
    // its own weights is the next one's, and no thread is late by more than an item.
    int64_t* counter = &next_[stage];
    int64_t first = __atomic_load_n(counter, __ATOMIC_RELAXED);
    while (first < n) {
      const int64_t count = std::max<int64_t>(1, (n - first) / (4 * threads_));
      if (!__atomic_compare_exchange_n(counter, &first, first + count, true, __ATOMIC_RELAXED,
                                       __ATOMIC_RELAXED))
        continue;  // `first` is what another thread left
      for (int64_t item = first; item < first + count; ++item) work(item);
      first = __atomic_load_n(counter, __ATOMIC_RELAXED);
    }
  }

 private:
  static constexpr int kStages = 4;
  static constexpr int kSpins = 2000;

  // Where other programs are busy, a thread that is waited for may not be running: the others spin
  // for some microseconds, a stage's usual end, then offer their CPU. Beside OpenMP's barrier a call
  // took 0.70 to 0.82 of the time with 16 runnable threads on 2 CPUs, 0.97 to 0.99 of it alone.
  void wait() {
    const int round = __atomic_load_n(&round_, __ATOMIC_RELAXED);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == omp_get_num_threads()) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
      return;
    }
    int spins = 0;
    while (__atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round) {
      if (spins < kSpins) {
        ++spins;
        pause();
      } else {
        sched_yield();
      }
    }
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  const int threads_;
  int64_t next_[kStages] = {};
  // Of waits: threads that have come, and how many waits are over; each in a cache line of its own.
  alignas(64) int arrived_ = 0;
  alignas(64) int round_ = 0;
};

// One stage alone.
template <class F>
void share_items(int threads, int64_t n, F work) {
  Team team(threads);
  team.run([&](int) { team.share(0, n, work); });
}

}  // namespace cpux
