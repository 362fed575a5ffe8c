// AVX2 + FMA + F16C. int8 multiplies 16-bit pairs (vpmaddwd): the 8-bit product (vpmaddubsw)
// saturates at |q| = 127 twice. int4 does use it: 8 products of 15 * 127 * 2 stay below 2^15.
#include "vectors_avx2.h"

namespace cpux {
namespace {

struct Avx2Quant : Quant8 {
  template <int kFormat>
  struct Product;
};

template <>
struct Avx2Quant::Product<kInt8> {
  using Sum = __m256i;  // int32 per row
  static constexpr int kLines = 8;
  static constexpr int kValueBytes = 64;
  struct Weights {
    __m256i even, odd;  // int16: columns 0 and 2, columns 1 and 3
  };
  static Weights prepare(const uint8_t* p) {
    const __m256i w = load_line_256(p);
    return {_mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), _mm256_srai_epi16(w, 8)};
  }
  static Sum first(const int32_t*) { return _mm256_setzero_si256(); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const __m256i even = broadcast4_256(x + line * 8);
    const __m256i odd = broadcast4_256(x + line * 8 + 4);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(w[v].even, even));
      sum[v] = _mm256_add_epi32(sum[v], _mm256_madd_epi16(w[v].odd, odd));
      keep(sum[v]);
    }
  }
  static __m256i finish(Sum sum, const int32_t*) { return sum; }
};

template <>
struct Avx2Quant::Product<kInt4> {
  using Sum = __m256i;  // int16 per row, twice
  static constexpr int kLines = 4;
  static constexpr int kValueBytes = 32;
  struct Weights {
    __m256i low, high;
  };
  static Weights prepare(const uint8_t* p) {
    const __m256i mask = _mm256_set1_epi8(15);
    const __m256i w = load_line_256(p);
    return {_mm256_and_si256(w, mask), _mm256_and_si256(_mm256_srli_epi16(w, 4), mask)};
  }
  static Sum first(const int32_t*) { return _mm256_setzero_si256(); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const __m256i low = broadcast4_256(x + line * 4);
    const __m256i high = broadcast4_256(x + line * 4 + 16);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = _mm256_add_epi16(sum[v], _mm256_maddubs_epi16(w[v].low, low));
      sum[v] = _mm256_add_epi16(sum[v], _mm256_maddubs_epi16(w[v].high, high));
      keep(sum[v]);
    }
  }
  static __m256i finish(Sum sum, const int32_t* start) {
    return _mm256_add_epi32(_mm256_madd_epi16(sum, _mm256_set1_epi16(1)),
                            _mm256_set1_epi32(*start));
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

const Kernels kKernels = {
    "avx2",
    dot_rows<Float8>,
    mix_rows<Float8>,
    {4, 1, 8, 16, load_weights_fp32, multiply, 4, multiply_narrow},
    {},
    5,
    {{64, Avx2Quant::block_tokens}, {32, Avx2Quant::block_tokens}},
    quantize_group,
    quant_rows<Avx2Quant>,
    to_float,
    to_bf16,
    activate,
    exponentials,
    axpy,
    read_bytes<Float8>,
    fma_flops<Float8>,
};

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

}  // namespace cpux
