// How the threads of a parallel region share out items, such as tiles of a matrix.
#pragma once

#include <algorithm>
#include <cstdint>

namespace cpux {

// Runs work(item) for the items [0, n) that this thread takes from `counter`, which starts at 0 and
// is shared. Items are taken in runs, long at first and single at the end: what one item prefetches
// beyond its own weights is the next one's, and no thread is late by more than an item.
template <class F>
void share_items(int64_t* counter, int64_t n, int threads, F work) {
  int64_t first = __atomic_load_n(counter, __ATOMIC_RELAXED);
  while (first < n) {
    const int64_t count = std::max<int64_t>(1, (n - first) / (4 * threads));
    if (!__atomic_compare_exchange_n(counter, &first, first + count, true, __ATOMIC_RELAXED,
                                     __ATOMIC_RELAXED))
      continue;  // `first` is what another thread left
    for (int64_t item = first; item < first + count; ++item) work(item);
    first = __atomic_load_n(counter, __ATOMIC_RELAXED);
  }
}

}  // namespace cpux
