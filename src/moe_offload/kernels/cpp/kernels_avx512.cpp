// AVX-512 F, BW, VL, DQ: the AVX2 kernels twice as wide, except for few tokens on fp32 and bf16
// weights; the same integer products.
#include "scale_search.h"
#include "vectors_avx512.h"

namespace cpux {
namespace {

using Avx512Quant =
    Quant<Quant16, PairProduct8<Int512>, ByteProduct4<Int512, Nibbles<Int512>>,
          ByteProduct4<Int512, E2m1<Int512>>>;

void multiply(const void* w_panel, int rows, int depth, const void* x_panel, int width,
              bool accumulate, const Ahead& ahead, float* c) {
  multiply_512<Fp32Product::Of<Float16>>(static_cast<const float*>(w_panel), rows, depth,
                                         static_cast<const float*>(x_panel), width, accumulate,
                                         ahead, c);
}

void multiply_narrow(const void* w_panel, int rows, int depth, const void* x, int64_t x_stride,
                     int width, bool accumulate, const Ahead& ahead, float* c) {
  narrow_tokens<Float16, Fp32Product::Of<Float16>>(static_cast<const float*>(w_panel), rows, depth,
                                                   static_cast<const float*>(x), x_stride, width,
                                                   accumulate, ahead, c);
}

struct Lanes16 {
  using Float = __m512;
  typedef int32_t Int __attribute__((vector_size(64)));
  static Float larger(Float a, Float b) { return _mm512_max_ps(a, b); }
  static Float smaller(Float a, Float b) { return _mm512_min_ps(a, b); }
};

const Kernels kKernels = {
    "avx512",
    dot_rows<Float8>,  // as fast as memory, and faster than 16 lanes (Zen 4, 4 tokens: 1.2x)
    dot_fp8<Float16>,
    score_keys<Float16>,
    mix_values<Float16>,
    {4, 1, 16, 64, load_weights_fp32<Float16>, multiply, 8, multiply_narrow},
    {},
    5,
    {quant_format<Avx512Quant, kInt8>(), quant_format<Avx512Quant, kInt4>(),
     quant_format<Avx512Quant, kMxfp4>()},
    quantize_group<Avx512Quant>,
    quant_rows<Avx512Quant>,
    to_float,
    to_bf16,
    activate,
    adjust_scores,
    exponentials<Float16>,
    axpy,
    quantise_tile<Lanes16>,
    read_bytes<Float16>,
    fma_flops<Float16>,
};

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

}  // namespace cpux
