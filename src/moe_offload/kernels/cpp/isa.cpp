// The instruction sets of this build, and which of them this CPU has.
#include "entry_points.h"

namespace cpux {

namespace {

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

// Slowest first; the last supported one is the default. build.py defines what it compiled.
const Isa kIsas[] = {
    {"scalar", always, scalar_kernels},
#ifdef CPUX_AVX2
    {"avx2", has_avx2, avx2_kernels},
#endif
#ifdef CPUX_AVX_VNNI
    {"avx_vnni", has_avx_vnni, avx_vnni_kernels},
#endif
#ifdef CPUX_AVX512
    {"avx512", has_avx512, avx512_kernels},
#endif
#ifdef CPUX_AVX512_VNNI
    {"avx512_vnni", has_avx512_vnni, avx512_vnni_kernels},
#endif
#ifdef CPUX_AVX512_BF16
    {"avx512_bf16", has_avx512_bf16, avx512_bf16_kernels},
#endif
};
constexpr int kIsaCount = sizeof(kIsas) / sizeof(kIsas[0]);

}  // namespace

const Kernels* kernels_of(int isa) {
  if (isa < 0 || isa >= kIsaCount || !kIsas[isa].supported()) return nullptr;
  return kIsas[isa].kernels();
}

}  // namespace cpux

int cpux_n_isas(void) { return cpux::kIsaCount; }

const char* cpux_isa_name(int isa) { return cpux::kIsas[isa].name; }

int cpux_isa_supported(int isa) { return cpux::kernels_of(isa) != nullptr; }
