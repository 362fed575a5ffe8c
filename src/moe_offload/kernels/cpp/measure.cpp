// What the machine can do, for calibration and benchmarks; and on which CPUs the threads stay.
#include <omp.h>
#include <sched.h>

#include <algorithm>

#include "entry_points.h"
#include "team.h"

int cpux_pin_threads(const int32_t* cpus, int n_cpus) {
  int failed = 0;
#pragma omp parallel num_threads(n_cpus) reduction(+ : failed)
  {
    cpu_set_t set;
    CPU_ZERO(&set);
    const int thread = omp_get_thread_num();
    for (int i = 0; i < n_cpus; ++i)
      if (thread == 0 || thread == i) CPU_SET(cpus[i], &set);
    failed += sched_setaffinity(0, sizeof set, &set) != 0;
  }
  return failed;
}

int cpux_read(int isa, int threads, const void* data, int64_t bytes, double* seconds) {
  return cpux::guarded(isa, threads, data != nullptr && bytes > 0, [&](const cpux::Kernels& k) {
    constexpr int64_t kChunk = 256 << 10;
    uint64_t checksum = 0;
    const double start = omp_get_wtime();
    cpux::share_items(threads, (bytes + kChunk - 1) / kChunk, [&](int64_t chunk) {
      const int64_t at = chunk * kChunk;
      const uint64_t sum =
          k.read_bytes(static_cast<const char*>(data) + at, std::min(kChunk, bytes - at));
      __atomic_fetch_add(&checksum, sum, __ATOMIC_RELAXED);
    });
    *seconds = omp_get_wtime() - start;
  });
}

int cpux_multiply_add(int isa, int threads, double seconds, double* flops_per_s) {
  return cpux::guarded(isa, threads, true, [&](const cpux::Kernels& k) {
    double flops = 0.0;
    const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : flops)
    {
      float sink = 0.0f;
      // At least once: on a busy machine a thread may first run when the time is over.
      do {
        flops += k.fma_flops(1 << 16, &sink);
      } while (omp_get_wtime() - start < seconds);
      asm volatile("" : : "r"(&sink) : "memory");
    }
    *flops_per_s = flops / (omp_get_wtime() - start);
  });
}
