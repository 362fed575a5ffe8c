// AVX-512 (F, BW, VL, DQ) vectors for float_kernels.h and quant_kernels.h.
#pragma once

#include <immintrin.h>

#include "float_kernels.h"
#include "quant_kernels.h"
#include "vectors_avx2.h"

namespace cpux {
namespace {

struct Float16 {
  using Type = __m512;
  static constexpr int lanes = 16;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  static Type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Type v) { return _mm512_reduce_add_ps(v); }
  static Type widen(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
};

// What the AVX-512 variants share; they differ in the integer product.
struct Quant16 {
  static constexpr int lanes = 16;
  static constexpr int block_tokens = 8;  // integer and fp32 sums of 8 tokens fit 32 registers
  using Float = __m512;
  static Float zero_float() { return _mm512_setzero_ps(); }
  static Float load_float(const float* p) { return _mm512_loadu_ps(p); }
  static void store_float(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Float mul(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static Float to_float(__m512i v) { return _mm512_cvtepi32_ps(v); }
  static Float load_scales(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
};

inline __m512i load_line_512(const uint8_t* p) { return _mm512_loadu_si512(p); }

inline __m512i broadcast4_512(const uint8_t* p) {
  int32_t word;
  memcpy(&word, p, sizeof word);
  return _mm512_set1_epi32(word);
}

}  // namespace
}  // namespace cpux
