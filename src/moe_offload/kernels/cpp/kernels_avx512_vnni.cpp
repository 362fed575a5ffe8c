// AVX-512 plus VNNI: see kernels_avx_vnni.cpp for the unsigned operand.
#include "vectors_avx512.h"

namespace cpux {
namespace {

struct Avx512VnniQuant : Quant16 {
  template <int kFormat>
  struct Product;
};

template <>
struct Avx512VnniQuant::Product<kInt8> {
  using Sum = __m512i;
  using Weights = __m512i;
  static constexpr int kLines = 8;
  static constexpr int kValueBytes = 32;
  static Weights prepare(const uint8_t* p) {
    return _mm512_xor_si512(load_line_512(p), _mm512_set1_epi8(-128));
  }
  static Sum first(const int32_t* start) { return _mm512_set1_epi32(*start); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    sum[0] = _mm512_dpbusd_epi32(sum[0], w[0], broadcast4_512(x + line * 4));
  }
  static __m512i finish(Sum sum, const int32_t*) { return sum; }
};

template <>
struct Avx512VnniQuant::Product<kInt4> {
  using Sum = __m512i;
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
  static Sum first(const int32_t* start) { return _mm512_set1_epi32(*start); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    sum[0] = _mm512_dpbusd_epi32(sum[0], w[0].low, broadcast4_512(x + line * 4));
    sum[0] = _mm512_dpbusd_epi32(sum[0], w[0].high, broadcast4_512(x + line * 4 + 16));
  }
  static __m512i finish(Sum sum, const int32_t*) { return sum; }
};

void quantize_group(const float* x, int valid, int format, void* values, float* scale,
                    int32_t* start) {
  quantize_bytes(x, valid, format == kInt8 ? 128 : 8, values, scale, start);
}

Kernels with_vnni() {
  Kernels kernels = *avx512_kernels();
  kernels.name = "avx512_vnni";
  kernels.quant[0] = kernels.quant[1] = {32, Avx512VnniQuant::block_tokens};
  kernels.quantize_group = quantize_group;
  kernels.quant_rows = quant_rows<Avx512VnniQuant>;
  return kernels;
}

}  // namespace

const Kernels* avx512_vnni_kernels() {
  static const Kernels kernels = with_vnni();
  return &kernels;
}

}  // namespace cpux
