// AVX-512 plus BF16: vdpbf16ps multiplies bf16 pairs with fp32 accumulation (it takes subnormals as
// zero), so the GEMM reads weights as they are. Activations are rounded to bf16 there, as the model
// itself does; few tokens are bound by memory and keep the exact fp32 product.
#include "vectors_avx512.h"

namespace cpux {
namespace {

// bf16 as it is; fp8 times its scale, rounded.
void load_weights_bf16(const Matrix& m, int64_t row, int64_t k, int rows, int depth, int valid,
                       void* panel) {
  constexpr int kColumns = 512;
  uint16_t* out = static_cast<uint16_t*>(panel);
  for (int r = 0; r < rows; ++r, out += depth) {
    if (m.format == kFp8) {
      float values[kColumns];
      for (int i = 0; i < valid; i += kColumns) {
        const int n = valid - i < kColumns ? valid - i : kColumns;
        load_fp8_row<Float16>(m, row + r, k + i, n, values);
        to_bf16(values, n, out + i);
      }
    } else {
      memcpy(out, m.w + ((row + r) * m.cols + k) * 2, static_cast<size_t>(valid) * 2);
    }
    for (int i = valid; i < depth; ++i) out[i] = 0;
  }
}

struct Bf16Product {
  using Weight = uint32_t;  // two columns
  using Vector = __m512bh;
  static Vector load(const Weight* x) { return (__m512bh)_mm512_loadu_si512(x); }
  static Vector broadcast(const Weight* w) {
    return (__m512bh)_mm512_set1_epi32(static_cast<int>(*w));
  }
  static __m512 multiply_add(Vector w, Vector x, __m512 acc) {
    return _mm512_dpbf16_ps(acc, x, w);
  }
};

void multiply(const void* w_panel, int rows, int depth, const void* x_panel, int width,
              bool accumulate, const Ahead& ahead, float* c) {
  multiply_512<Bf16Product>(static_cast<const uint32_t*>(w_panel), rows, depth / 2,
                            static_cast<const uint32_t*>(x_panel), width, accumulate, ahead, c);
}

void multiply_narrow(const void* w_panel, int rows, int depth, const void* x, int64_t x_stride,
                     int width, bool accumulate, const Ahead& ahead, float* c) {
  narrow_tokens<Float16, Bf16Product>(static_cast<const uint32_t*>(w_panel), rows, depth / 2,
                                      static_cast<const uint32_t*>(x), x_stride / 2, width,
                                      accumulate, ahead, c);
}

Kernels with_bf16() {
  Kernels kernels = *avx512_vnni_kernels();
  kernels.name = "avx512_bf16";
  kernels.gemm_bf16 = {2, 2, 16, 64, load_weights_bf16, multiply, 8, multiply_narrow};
  return kernels;
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels = with_bf16();
  return &kernels;
}

}  // namespace cpux
