// The C ABI: chooses the kernels, keeps exceptions inside, and measures the machine.
#include "api.h"

#include <omp.h>
#include <sched.h>

#include <algorithm>
#include <new>

#include "layer.h"
#include "plan.h"

namespace {

using cpux::Kernels;

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels* (*kernels)();
};

bool always() { return true; }

#define CPUX_HAS(feature) (__builtin_cpu_supports(feature) != 0)
#ifdef CPUX_AVX2
bool has_avx2() { return CPUX_HAS("avx2") && CPUX_HAS("fma") && CPUX_HAS("f16c"); }
#endif
#ifdef CPUX_AVX_VNNI
bool has_avx_vnni() { return has_avx2() && CPUX_HAS("avxvnni"); }
#endif
#ifdef CPUX_AVX512
bool has_avx512() {
  return has_avx2() && CPUX_HAS("avx512f") && CPUX_HAS("avx512bw") && CPUX_HAS("avx512vl") &&
         CPUX_HAS("avx512dq");
}
#endif
#ifdef CPUX_AVX512_VNNI
bool has_avx512_vnni() { return has_avx512() && CPUX_HAS("avx512vnni"); }
#endif
#ifdef CPUX_AVX512_BF16
bool has_avx512_bf16() { return has_avx512_vnni() && CPUX_HAS("avx512bf16"); }
#endif

// Slowest first; the last supported one is the default. kernel_build.py defines what it compiled.
const Isa kIsas[] = {
    {"scalar", always, cpux::scalar_kernels},
#ifdef CPUX_AVX2
    {"avx2", has_avx2, cpux::avx2_kernels},
#endif
#ifdef CPUX_AVX_VNNI
    {"avx_vnni", has_avx_vnni, cpux::avx_vnni_kernels},
#endif
#ifdef CPUX_AVX512
    {"avx512", has_avx512, cpux::avx512_kernels},
#endif
#ifdef CPUX_AVX512_VNNI
    {"avx512_vnni", has_avx512_vnni, cpux::avx512_vnni_kernels},
#endif
#ifdef CPUX_AVX512_BF16
    {"avx512_bf16", has_avx512_bf16, cpux::avx512_bf16_kernels},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

// null when this CPU cannot run it
const Kernels* kernels_of(int isa) {
  if (isa < 0 || isa >= kIsaCount || !kIsas[isa].supported()) return nullptr;
  return kIsas[isa].kernels();
}

template <class F>
int guarded(int isa, F work) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return CPUX_UNKNOWN_ISA;
  try {
    work(*kernels);
  } catch (const std::bad_alloc&) {
    return CPUX_NO_MEMORY;
  }
  return CPUX_OK;
}

}  // namespace

int cpux_run(const cpux_layer* layer, const cpux_tokens* tokens, int isa, int threads, float* out) {
  return guarded(isa, [&](const Kernels& k) { run_layer(k, *layer, *tokens, threads, out); });
}

int64_t cpux_count_pairs(const cpux_tokens* tokens) { return cpux::count_pairs(*tokens); }

int cpux_first(const cpux_layer* layer, const cpux_tokens* tokens, int isa, int threads,
               float* first) {
  return guarded(isa, [&](const Kernels& k) { run_first(k, *layer, *tokens, threads, first); });
}

int cpux_second(const cpux_layer* layer, const cpux_tokens* tokens, int isa, int threads,
                const float* middle, float* out) {
  return guarded(
      isa, [&](const Kernels& k) { run_second(k, *layer, *tokens, threads, middle, out); });
}

int cpux_activate(const cpux_layer* layer, const void* block, const void* first, int64_t n, int isa,
                  int threads, void* middle) {
  return guarded(isa, [&](const Kernels& k) {
    run_activate(k, *layer, block, static_cast<const uint16_t*>(first), n, threads,
                 static_cast<uint16_t*>(middle));
  });
}

int cpux_add(const cpux_layer* layer, const void* block, const void* y, const int64_t* token,
             const float* weight, int64_t n, int isa, int threads, float* out) {
  return guarded(isa, [&](const Kernels& k) {
    run_add(k, *layer, block, static_cast<const uint16_t*>(y), token, weight, n, threads, out);
  });
}

int cpux_linear(const cpux_matrix* matrix, const void* x, int is_bf16, int64_t n_tokens, int isa,
                int threads, void* y) {
  return guarded(isa, [&](const Kernels& k) {
    run_linear(k, *matrix, x, is_bf16 != 0, n_tokens, threads, y);
  });
}

int cpux_attend(const cpux_attention* attention, int isa, int threads, void* out) {
  return guarded(isa, [&](const Kernels& k) { run_attention(k, *attention, threads, out); });
}

int cpux_rms_norm(const cpux_norm* norm, const void* x, int is_bf16, int64_t n_rows, void* y) {
  return guarded(0, [&](const Kernels&) { cpux::run_norm(*norm, x, is_bf16 != 0, n_rows, y); });
}

int cpux_route(const cpux_router* router, const void* x, int64_t n_tokens, int isa, int threads,
               void* logits, void* scores, int64_t* index) {
  return guarded(isa, [&](const Kernels& k) {
    cpux::run_router(k, *router, x, n_tokens, threads, logits, scores, index);
  });
}

int cpux_n_isas(void) { return kIsaCount; }

const char* cpux_isa_name(int isa) { return kIsas[isa].name; }

int cpux_isa_supported(int isa) { return kernels_of(isa) != nullptr; }

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

double cpux_read_seconds(const void* data, int64_t bytes, int isa, int threads) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return -1.0;
  constexpr int64_t kChunk = 256 << 10;
  int64_t next = 0;
  uint64_t checksum = 0;
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : checksum)
  for (;;) {
    const int64_t at = __atomic_fetch_add(&next, kChunk, __ATOMIC_RELAXED);
    if (at >= bytes) break;
    checksum += kernels->read_bytes(static_cast<const char*>(data) + at, std::min(kChunk, bytes - at));
  }
  const double seconds = omp_get_wtime() - start;
  asm volatile("" : : "r"(checksum));
  return seconds;
}

double cpux_fma_flops_per_s(int isa, int threads, double seconds) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return -1.0;
  double flops = 0.0;
  const double start = omp_get_wtime();
#pragma omp parallel num_threads(threads) reduction(+ : flops)
  {
    float sink = 0.0f;
    while (omp_get_wtime() - start < seconds) flops += kernels->fma_flops(1 << 16, &sink);
    asm volatile("" : : "x"(sink));
  }
  return flops / (omp_get_wtime() - start);
}
