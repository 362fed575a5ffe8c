// AVX2 plus AVX-VNNI: four byte products per lane in one instruction (vpdpbusd). The weight is the
// unsigned operand: int8 as q + 128 (a flipped sign bit), int4 as stored, q + 8; the sum starts from
// minus the offset times the sum of the activations.
#include "vectors_avx2.h"

namespace cpux {
namespace {

struct AvxVnniQuant : Quant8 {
  template <int kFormat>
  struct Product;
};

template <>
struct AvxVnniQuant::Product<kInt8> {
  using Sum = __m256i;
  using Weights = __m256i;
  static constexpr int kLines = 8;
  static constexpr int kValueBytes = 32;
  static Weights prepare(const uint8_t* p) {
    return _mm256_xor_si256(load_line_256(p), _mm256_set1_epi8(-128));
  }
  static Sum first(const int32_t* start) { return _mm256_set1_epi32(*start); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const __m256i values = broadcast4_256(x + line * 4);
    for (int v = 0; v < kVectors; ++v) sum[v] = _mm256_dpbusd_avx_epi32(sum[v], w[v], values);
  }
  static __m256i finish(Sum sum, const int32_t*) { return sum; }
};

template <>
struct AvxVnniQuant::Product<kInt4> {
  using Sum = __m256i;
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
  static Sum first(const int32_t* start) { return _mm256_set1_epi32(*start); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const __m256i low = broadcast4_256(x + line * 4);
    const __m256i high = broadcast4_256(x + line * 4 + 16);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = _mm256_dpbusd_avx_epi32(sum[v], w[v].low, low);
      sum[v] = _mm256_dpbusd_avx_epi32(sum[v], w[v].high, high);
    }
  }
  static __m256i finish(Sum sum, const int32_t*) { return sum; }
};

void quantize_group(const float* x, int valid, int format, void* values, float* scale,
                    int32_t* start) {
  quantize_bytes(x, valid, format == kInt8 ? 128 : 8, values, scale, start);
}

Kernels with_vnni() {
  Kernels kernels = *avx2_kernels();
  kernels.name = "avx_vnni";
  kernels.quant[0] = kernels.quant[1] = {32, AvxVnniQuant::block_tokens};
  kernels.quantize_group = quantize_group;
  kernels.quant_rows = quant_rows<AvxVnniQuant>;
  return kernels;
}

}  // namespace

const Kernels* avx_vnni_kernels() {
  static const Kernels kernels = with_vnni();
  return &kernels;
}

}  // namespace cpux
