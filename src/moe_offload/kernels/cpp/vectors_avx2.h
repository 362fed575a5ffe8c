// AVX2 + FMA + F16C vectors for float_kernels.h and quant_kernels.h.
#pragma once

#include <immintrin.h>

#include "attention_kernels.h"
#include "float_kernels.h"
#include "quant_kernels.h"

namespace cpux {
namespace {

struct Float8 {
  using Type = __m256;
  static constexpr int lanes = 8;
  static constexpr int registers = 16;
  static Type zero() { return _mm256_setzero_ps(); }
  static Type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Type v) { _mm256_storeu_ps(p, v); }
  static Type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
  static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
  static float sum(Type v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  static void sum4(Type a, Type b, Type c, Type d, float* out) {
    const Type sums = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
  }
  static Type widen(const uint16_t* p) {
    const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
  }
  static Type mul(Type a, Type b) { return _mm256_mul_ps(a, b); }
  static Type max(Type a, Type b) { return _mm256_max_ps(a, b); }
  static Type times_power(Type a, Type b) {
    const __m256i exponent = _mm256_slli_epi32(_mm256_castps_si256(b), 23);
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(a), exponent));
  }
  static Type zero_below(Type x, Type least, Type a) {
    return _mm256_and_ps(_mm256_cmp_ps(x, least, _CMP_NLT_UQ), a);
  }
  // In fp32 e4m3 has the same bits, twenty places up, and 2^-120 of the value: its smallest numbers
  // are subnormal, which only a caller that turns them off loses. Two numbers share 32 bits, one of
  // each vector, as the upper halves of words; products move them down: they find more ports free
  // than shifts (Zen 3, by llvm-mca: 7.7 cycles for three rows, 9.3 with shifts).
  static void widen_fp8(const uint8_t* p, Type* out) {
    const __m256i apart = _mm256_setr_epi8(-1, 0, -1, 8, -1, 1, -1, 9, -1, 2, -1, 10, -1, 3, -1, 11,
                                           -1, 4, -1, 12, -1, 5, -1, 13, -1, 6, -1, 14, -1, 7, -1, 15);
    const __m256i mask = _mm256_set1_epi32(static_cast<int>(0x87f00000u));
    const __m256i bytes =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i both = _mm256_shuffle_epi8(bytes, apart);
    const __m256i low = _mm256_madd_epi16(both, _mm256_set1_epi32(1 << 12));
    const __m256i high = _mm256_madd_epi16(both, _mm256_set1_epi32(1 << 28));
    out[0] = _mm256_castsi256_ps(_mm256_and_si256(low, mask));
    out[1] = _mm256_castsi256_ps(_mm256_and_si256(high, mask));
  }
};

// What both AVX2 variants share; they differ in the integer product.
struct Quant8 {
  static constexpr int lanes = 8;
  static constexpr int block_tokens = 4;  // 2 vectors of rows x 4 tokens fill the 16 registers
  using Float = __m256;
  static Float zero_float() { return _mm256_setzero_ps(); }
  static Float load_float(const float* p) { return _mm256_loadu_ps(p); }
  static void store_float(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  static Float mul(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static Float to_float(__m256i v) { return _mm256_cvtepi32_ps(v); }
  static __m256i load_16(const uint8_t* p) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static __m256i load_8(const uint8_t* p) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  }
  static Float load_half(const uint8_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Float load_bf16(const uint8_t* p) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(load_16(p), 16));
  }
  static Float load_e8m0(const uint8_t* p) {  // 2^-127 is subnormal
    const __m256i bits = _mm256_slli_epi32(load_8(p), 23);
    return _mm256_castsi256_ps(_mm256_max_epu32(bits, _mm256_set1_epi32(1 << 22)));
  }
  static Float load_bytes(const uint8_t* p) { return to_float(load_8(p)); }
};

// The instructions of quant_kernels.h's products.
struct Int256 {
  using Type = __m256i;
  static Type zero() { return _mm256_setzero_si256(); }
  static Type load(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }
  static Type broadcast4(const uint8_t* p) {
    int32_t word;
    memcpy(&word, p, sizeof word);
    return _mm256_set1_epi32(word);
  }
  static Type broadcast8(char value) { return _mm256_set1_epi8(value); }
  static Type broadcast16(int16_t value) { return _mm256_set1_epi16(value); }
  static Type broadcast32(int32_t value) { return _mm256_set1_epi32(value); }
  static Type bit_and(Type a, Type b) { return _mm256_and_si256(a, b); }
  static Type bit_xor(Type a, Type b) { return _mm256_xor_si256(a, b); }
  static Type shift_left16(Type a) { return _mm256_slli_epi16(a, 8); }
  static Type shift_right_signed16(Type a) { return _mm256_srai_epi16(a, 8); }
  static Type shift_right4(Type a) { return _mm256_srli_epi16(a, 4); }
  static Type add16(Type a, Type b) { return _mm256_add_epi16(a, b); }
  static Type add32(Type a, Type b) { return _mm256_add_epi32(a, b); }
  static Type multiply_add16(Type a, Type b) { return _mm256_madd_epi16(a, b); }
  static Type multiply_add8(Type a, Type b) { return _mm256_maddubs_epi16(a, b); }
  static Type broadcast_table(const uint8_t* p) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
  }
  static Type look_up(Type table, Type index) { return _mm256_shuffle_epi8(table, index); }
};

}  // namespace
}  // namespace cpux
