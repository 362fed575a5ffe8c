// zlib's CRC-32 by carry-less multiplication: V. Gopal et al., "Fast CRC Computation for Generic
// Polynomials Using PCLMULQDQ Instruction", Intel, 2009; the bits of a byte are reversed, as there.

#include <cstdint>
#include <cstring>

#include "api.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace {

// x^(n + 32) and x^(n - 32) modulo the polynomial: they move 128 bits by n bits.
const int64_t kBy512[2] = {0x154442bd4, 0x1c6e41596};
const int64_t kBy128[2] = {0x1751997d0, 0x0ccaa009e};

__attribute__((target("pclmul"))) inline __m128i moved(__m128i bits, __m128i by, __m128i onto) {
  const __m128i low = _mm_clmulepi64_si128(bits, by, 0x00);
  const __m128i high = _mm_clmulepi64_si128(bits, by, 0x11);
  return _mm_xor_si128(_mm_xor_si128(low, high), onto);
}

// n_bytes: a multiple of 64, and not 0.
__attribute__((target("pclmul"))) uint32_t crc32(const uint8_t* data, int64_t n_bytes) {
  const auto load = [](const void* from) {
    return _mm_loadu_si128(static_cast<const __m128i*>(from));
  };
  const __m128i by_512 = load(kBy512), by_128 = load(kBy128);
  __m128i sum[4];
  for (int i = 0; i < 4; ++i) sum[i] = load(data + 16 * i);
  sum[0] = _mm_xor_si128(sum[0], _mm_cvtsi32_si128(-1));
  for (const uint8_t* end = data + n_bytes; (data += 64) < end;) {
    for (int i = 0; i < 4; ++i) sum[i] = moved(sum[i], by_512, load(data + 16 * i));
  }
  for (int i = 1; i < 4; ++i) sum[i] = moved(sum[i - 1], by_128, sum[i]);
  uint8_t rest[16];
  std::memcpy(rest, &sum[3], sizeof rest);
  uint32_t crc = 0;
  for (const uint8_t byte : rest) {
    crc ^= byte;
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xEDB88320u : 0u);
  }
  return ~crc;
}

}  // namespace
#endif

int cpux_crc32(const void* data, int64_t bytes, uint32_t* crc) {
  if (bytes <= 0 || bytes % 64 != 0) return CPUX_BAD_ARGUMENT;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("pclmul")) {
    *crc = crc32(static_cast<const uint8_t*>(data), bytes);
    return CPUX_OK;
  }
#else
  (void)data, (void)crc;
#endif
  return CPUX_UNKNOWN_ISA;
}
