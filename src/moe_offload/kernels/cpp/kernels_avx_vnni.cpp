// AVX2 plus AVX-VNNI: int8, int4 and mxfp4 by vpdpbusd (DotProduct8 of quant_kernels.h).
#include "vectors_avx2.h"

namespace cpux {
namespace {

struct DotInt : Int256 {
  static Type dot(Type sum, Type weights, Type x) { return _mm256_dpbusd_avx_epi32(sum, weights, x); }
};
using DotQuant = Quant<Quant8, DotProduct8<DotInt>, DotProduct4<DotInt, Nibbles<DotInt>>,
                       DotProduct4<DotInt, E2m1<DotInt>>>;

Kernels with_vnni() {
  Kernels kernels = *avx2_kernels();
  kernels.name = "avx_vnni";
  kernels.quant[0] = quant_format<DotQuant, kInt8>();
  kernels.quant[1] = quant_format<DotQuant, kInt4>();
  kernels.quant[2] = quant_format<DotQuant, kMxfp4>();
  kernels.quantize_group = quantize_group<DotQuant>;
  kernels.quant_rows = quant_rows<DotQuant>;
  return kernels;
}

}  // namespace

const Kernels* avx_vnni_kernels() {
  static const Kernels kernels = with_vnni();
  return &kernels;
}

}  // namespace cpux
