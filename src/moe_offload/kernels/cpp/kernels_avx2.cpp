// AVX2 + FMA + F16C.
#include "scale_search.h"
#include "vectors_avx2.h"

namespace cpux {
namespace {

using Avx2Quant =
    Quant<Quant8, PairProduct8<Int256>, ByteProduct4<Int256, Nibbles<Int256>>,
          ByteProduct4<Int256, E2m1<Int256>>>;

void multiply(const void* w_panel, int rows, int depth, const void* x_panel, int width,
              bool accumulate, const Ahead& ahead, float* c) {
  using P = Fp32Product::Of<Float8>;
  const float* w = static_cast<const float*>(w_panel);
  const float* x = static_cast<const float*>(x_panel);
  if (width == 16)
    multiply_rows<Float8, P, 2, 6>(w, rows, depth, x, accumulate, ahead, c);
  else
    multiply_rows<Float8, P, 1, 12>(w, rows, depth, x, accumulate, ahead, c);
}

void multiply_narrow(const void* w_panel, int rows, int depth, const void* x, int64_t x_stride,
                     int width, bool accumulate, const Ahead& ahead, float* c) {
  narrow_tokens<Float8, Fp32Product::Of<Float8>>(static_cast<const float*>(w_panel), rows, depth,
                                                 static_cast<const float*>(x), x_stride, width,
                                                 accumulate, ahead, c);
}

struct Lanes8 {
  using Float = __m256;
  typedef int32_t Int __attribute__((vector_size(32)));
  static Float larger(Float a, Float b) { return _mm256_max_ps(a, b); }
  static Float smaller(Float a, Float b) { return _mm256_min_ps(a, b); }
};

const Kernels kKernels = {
    "avx2",
    dot_rows<Float8>,
    dot_fp8<Float8>,
    score_keys<Float8>,
    mix_values<Float8>,
    {4, 1, 8, 16, load_weights_fp32<Float8>, multiply, 4, multiply_narrow},
    {},
    17,
    {quant_format<Avx2Quant, kInt8>(), quant_format<Avx2Quant, kInt4>(),
     quant_format<Avx2Quant, kMxfp4>()},
    quantize_group<Avx2Quant>,
    quant_rows<Avx2Quant>,
    to_float,
    to_bf16,
    activate,
    adjust_scores,
    exponentials<Float8>,
    axpy,
    quantise_tile<Lanes8>,
    read_bytes<Float8>,
    fma_flops<Float8>,
};

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

}  // namespace cpux
