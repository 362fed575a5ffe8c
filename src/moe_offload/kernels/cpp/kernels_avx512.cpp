// AVX-512 F, BW, VL, DQ: the AVX2 kernels twice as wide, except for few tokens on fp32 and bf16
// weights; the same integer products.
#include "vectors_avx512.h"

namespace cpux {
namespace {

struct Avx512Quant : Quant16 {
  template <int kFormat>
  struct Product;
};

template <>
struct Avx512Quant::Product<kInt8> {
  using Sum = __m512i;  // int32 per row
  static constexpr int kLines = 8;
  static constexpr int kValueBytes = 64;
  struct Weights {
    __m512i even, odd;  // int16: columns 0 and 2, columns 1 and 3
  };
  static Weights prepare(const uint8_t* p) {
    const __m512i w = load_line_512(p);
    return {_mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_srai_epi16(w, 8)};
  }
  static Sum first(const int32_t*) { return _mm512_setzero_si512(); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const __m512i even = broadcast4_512(x + line * 8);
    const __m512i odd = broadcast4_512(x + line * 8 + 4);
    sum[0] = _mm512_add_epi32(sum[0], _mm512_madd_epi16(w[0].even, even));
    sum[0] = _mm512_add_epi32(sum[0], _mm512_madd_epi16(w[0].odd, odd));
    keep(sum[0]);
  }
  static __m512i finish(Sum sum, const int32_t*) { return sum; }
};

template <>
struct Avx512Quant::Product<kInt4> {
  using Sum = __m512i;  // int16 per row, twice
  static constexpr int kLines = 4;
  static constexpr int kValueBytes = 32;
  struct Weights {
    __m512i low, high;
  };
  static Weights prepare(const uint8_t* p) {
    const __m512i mask = _mm512_set1_epi8(15);
    const __m512i w = load_line_512(p);
    return {_mm512_and_si512(w, mask), _mm512_and_si512(_mm512_srli_epi16(w, 4), mask)};
  }
  static Sum first(const int32_t*) { return _mm512_setzero_si512(); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const __m512i low = broadcast4_512(x + line * 4);
    const __m512i high = broadcast4_512(x + line * 4 + 16);
    sum[0] = _mm512_add_epi16(sum[0], _mm512_maddubs_epi16(w[0].low, low));
    sum[0] = _mm512_add_epi16(sum[0], _mm512_maddubs_epi16(w[0].high, high));
    keep(sum[0]);
  }
  static __m512i finish(Sum sum, const int32_t* start) {
    return _mm512_add_epi32(_mm512_madd_epi16(sum, _mm512_set1_epi16(1)),
                            _mm512_set1_epi32(*start));
  }
};

void quantize_group(const float* x, int valid, int format, void* values, float* scale,
                    int32_t* start) {
  if (format == kInt8)
    quantize_pairs(x, valid, values, scale, start);
  else
    quantize_bytes(x, valid, 8, values, scale, start);
}

void multiply(const void* w_panel, int rows, int depth, const void* x_panel, int width,
              bool accumulate, const Ahead& ahead, float* c) {
  using P = Fp32Product::Of<Float16>;
  const float* w = static_cast<const float*>(w_panel);
  const float* x = static_cast<const float*>(x_panel);
  switch (width) {
    case 16: return multiply_rows<Float16, P, 1, 12>(w, rows, depth, x, accumulate, ahead, c);
    case 32: return multiply_rows<Float16, P, 2, 12>(w, rows, depth, x, accumulate, ahead, c);
    case 48: return multiply_rows<Float16, P, 3, 8>(w, rows, depth, x, accumulate, ahead, c);
    default: return multiply_rows<Float16, P, 4, 6>(w, rows, depth, x, accumulate, ahead, c);
  }
}

void multiply_narrow(const void* w_panel, int rows, int depth, const void* x, int64_t x_stride,
                     int width, bool accumulate, const Ahead& ahead, float* c) {
  narrow_tokens<Float16, Fp32Product::Of<Float16>>(static_cast<const float*>(w_panel), rows, depth,
                                                   static_cast<const float*>(x), x_stride, width,
                                                   accumulate, ahead, c);
}

const Kernels kKernels = {
    "avx512",
    dot_rows<Float8>,  // as fast as memory, and faster than 16 lanes (Zen 4, 4 tokens: 1.2x)
    mix_rows<Float8>,
    {4, 1, 16, 64, load_weights_fp32, multiply, 8, multiply_narrow},
    {},
    5,
    {{64, Avx512Quant::block_tokens}, {32, Avx512Quant::block_tokens}},
    quantize_group,
    quant_rows<Avx512Quant>,
    to_float,
    to_bf16,
    activate,
    exponentials,
    axpy,
    read_bytes<Float16>,
    fma_flops<Float16>,
};

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

}  // namespace cpux
