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
  static constexpr int registers = 32;
  static Type zero() { return _mm512_setzero_ps(); }
  static Type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Type v) { _mm512_storeu_ps(p, v); }
  static Type broadcast(const float* p) { return _mm512_set1_ps(*p); }
  static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
  static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(Type v) { return _mm512_reduce_add_ps(v); }
  static void sum4(Type a, Type b, Type c, Type d, float* out) {
    // halves of a and b, and of c and d; then quarters of each in a quarter of its own
    const Type ab = add(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const Type cd = add(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    Type sums = add(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
    sums = add(sums, _mm512_permute_ps(sums, 0x4e));
    sums = add(sums, _mm512_permute_ps(sums, 0xb1));
    const __m512i firsts = _mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0);
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, sums)));
  }
  static Type widen(const uint16_t* p) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
  }
  static Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
  static Type max(Type a, Type b) { return _mm512_max_ps(a, b); }
  static Type times_power(Type a, Type b) {
    const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(b), 23);
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(a), exponent));
  }
  static Type zero_below(Type x, Type least, Type a) {
    return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, least, _CMP_NLT_UQ), a);
  }
  static void widen_fp8(const uint8_t* p, Type* out) {  // as Float8, by shifts
    const __m512i mask = _mm512_set1_epi32(static_cast<int>(0x87f00000u));
    for (int i = 0; i < 2; ++i) {
      const __m512i w =
          _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i * lanes)));
      out[i] = _mm512_castsi512_ps(_mm512_and_si512(_mm512_slli_epi32(w, 20), mask));
    }
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
  static __m512i load_16(const uint8_t* p) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static __m512i load_8(const uint8_t* p) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Float load_half(const uint8_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static Float load_bf16(const uint8_t* p) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(load_16(p), 16));
  }
  static Float load_e8m0(const uint8_t* p) {  // 2^-127 is subnormal
    const __m512i bits = _mm512_slli_epi32(load_8(p), 23);
    return _mm512_castsi512_ps(_mm512_max_epu32(bits, _mm512_set1_epi32(1 << 22)));
  }
  static Float load_bytes(const uint8_t* p) { return to_float(load_8(p)); }
};

struct Int512 {
  using Type = __m512i;
  static Type zero() { return _mm512_setzero_si512(); }
  static Type load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Type broadcast4(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return _mm512_set1_epi32(word);
  }
  static Type broadcast8(char value) { return _mm512_set1_epi8(value); }
  static Type broadcast16(int16_t value) { return _mm512_set1_epi16(value); }
  static Type broadcast32(int32_t value) { return _mm512_set1_epi32(value); }
  static Type bit_and(Type a, Type b) { return _mm512_and_si512(a, b); }
  static Type bit_xor(Type a, Type b) { return _mm512_xor_si512(a, b); }
  static Type shift_left16(Type a) { return _mm512_slli_epi16(a, 8); }
  static Type shift_right_signed16(Type a) { return _mm512_srai_epi16(a, 8); }
  static Type shift_right4(Type a) { return _mm512_srli_epi16(a, 4); }
  static Type add16(Type a, Type b) { return _mm512_add_epi16(a, b); }
  static Type add32(Type a, Type b) { return _mm512_add_epi32(a, b); }
  static Type multiply_add16(Type a, Type b) { return _mm512_madd_epi16(a, b); }
  static Type multiply_add8(Type a, Type b) { return _mm512_maddubs_epi16(a, b); }
  static Type broadcast_table(const uint8_t* p) {
    return _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Type look_up(Type table, Type index) { return _mm512_shuffle_epi8(table, index); }
};

// A full or narrow panel of a Gemm with 16 lanes; P is the product, `steps` its columns.
template <class P>
inline void multiply_512(const typename P::Weight* w, int rows, int steps,
                         const typename P::Weight* x, int width, bool accumulate,
                         const Ahead& ahead, float* c) {
  switch (width) {
    case 16: return multiply_rows<Float16, P, 1, 12>(w, rows, steps, x, accumulate, ahead, c);
    case 32: return multiply_rows<Float16, P, 2, 12>(w, rows, steps, x, accumulate, ahead, c);
    case 48: return multiply_rows<Float16, P, 3, 8>(w, rows, steps, x, accumulate, ahead, c);
    default: return multiply_rows<Float16, P, 4, 6>(w, rows, steps, x, accumulate, ahead, c);
  }
}

}  // namespace
}  // namespace cpux
