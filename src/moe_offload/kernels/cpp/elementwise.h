// Loops over contiguous floats that the compiler vectorises for each instruction set.
//
// Everything here has internal linkage on purpose: each instruction set compiles its own copy, and
// a copy merged across translation units would run AVX-512 code on a machine that has none.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace cpux {
namespace {

inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float float_of_bf16(uint16_t half) {
  return float_of_bits(static_cast<uint32_t>(half) << 16);
}

// Exact.
inline float float_of_half(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t fraction = half & 1023u;
  if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 5.9604644775390625e-8f;
    return sign != 0 ? -magnitude : magnitude;
  }
  if (exponent == 31) return float_of_bits(sign | 0x7f800000u | (fraction << 13));
  return float_of_bits(sign | ((exponent + 112u) << 23) | (fraction << 13));
}

// e4m3, finite: float16's bits seven places up, and 2^-8 of the value.
inline float float_of_fp8(uint8_t byte) {
  return 256.0f * float_of_half(static_cast<uint16_t>((byte & 0x80u) << 8 | (byte & 0x7fu) << 7));
}

inline float float_of_e8m0(uint8_t exponent) {
  return float_of_bits(exponent == 0 ? 1u << 22 : static_cast<uint32_t>(exponent) << 23);
}

// Number `at` of scales of a ScaleType.
inline float scale_value(const uint8_t* data, int type, int64_t at) {
  if (type == kE8m0Scale) return float_of_e8m0(data[at]);
  if (type == kFp32Scale) return reinterpret_cast<const float*>(data)[at];
  const uint16_t bits = reinterpret_cast<const uint16_t*>(data)[at];
  return type == kHalfScale ? float_of_half(bits) : float_of_bf16(bits);
}

// The scale of a row and column of an fp8 matrix.
inline float fp8_scale(const Matrix& m, int64_t row, int64_t column) {
  const Scales& s = m.scales;
  return scale_value(s.data, s.type, row / s.rows * s.per_row(m.cols) + column / s.group);
}

// The level of a row and column of one group of a tile: q, of mxfp4 twice the number.
inline int tile_level(const uint8_t* group, int format, int row, int column) {
  if (format == kInt8)
    return static_cast<int8_t>(group[(column / 4 * kTileRows + row) * 4 + column % 4]);
  const int byte = group[(column % 16 / 4 * kTileRows + row) * 4 + column % 4];
  const int code = column < 16 ? byte & 15 : byte >> 4;
  if (format == kInt4) return code - 8;
  constexpr int kHalves[8] = {0, 1, 2, 3, 4, 6, 8, 12};
  return code < 8 ? kHalves[code] : -kHalves[code - 8];
}

// Weight panel of fp32 of an mxfp4 matrix; arguments as in Gemm::load_weights.
inline void load_mxfp4(const Matrix& m, int64_t row, int64_t k, int rows, int depth, int valid,
                       float* out) {
  const int64_t groups = (m.cols + kGroup - 1) / kGroup;
  for (int r = 0; r < rows; ++r, out += depth) {
    const int64_t block = (row + r) / kTileRows;
    const int lane = static_cast<int>((row + r) % kTileRows);
    for (int i = 0; i < depth; ++i) {
      const int64_t at = block * groups + (k + i) / kGroup;
      const uint8_t* group = m.w + at * quant_group_bytes(kMxfp4);
      const float half = 0.5f * float_of_e8m0(m.scales.data[at * kTileRows + lane]);
      const int column = static_cast<int>((k + i) % kGroup);
      out[i] = i < valid ? static_cast<float>(tile_level(group, kMxfp4, lane, column)) * half : 0.0f;
    }
  }
}

// Round to nearest, ties to even; a NaN stays a (quiet) NaN.
inline uint16_t bf16_of_float(float value) {
  const uint32_t bits = bits_of_float(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

// e^x to 2 ulp for x in [-87, 88], e^-87 below; infinity above, so that a quotient by it vanishes
// however large its numerator. NaN stays NaN. x = n ln2 + r, degree-6 in r.
inline float exp_clamped(float x) {
  const bool overflows = x > 88.0f;
  x = overflows ? 88.0f : x;
  x = x < -87.0f ? -87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer lands in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.3888889e-3f;
  p = p * r + 8.3333333e-3f;
  p = p * r + 4.1666667e-2f;
  p = p * r + 0.16666667f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const float value = p * float_of_bits((bits_of_float(shifted) - 0x4b400000u + 127u) << 23);
  return overflows ? INFINITY : value;
}

inline float sigmoid_times(float x, float slope) { return x / (1.0f + exp_clamped(-slope * x)); }

template <class Gate>
inline void activate_each(const float* gate, const float* up, int64_t n, float* out, Gate act) {
  if (up != nullptr) {
    for (int64_t i = 0; i < n; ++i) out[i] = act(gate[i]) * up[i];
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = act(gate[i]);
  }
}

inline void activate(int kind, float alpha, float limit, const float* gate, const float* up,
                     int64_t n, float* out) {
  switch (kind) {
    case kSilu:
      activate_each(gate, up, n, out, [](float x) { return sigmoid_times(x, 1.0f); });
      break;
    case kGelu:
      activate_each(gate, up, n, out,
                    [](float x) { return 0.5f * x * (1.0f + erff(x * 0.70710678f)); });
      break;
    case kGeluTanh:  // 1 + tanh(u) = 2 sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3)
      activate_each(gate, up, n, out, [](float x) {
        return sigmoid_times(x, 1.5957691f * (1.0f + 0.044715f * x * x));
      });
      break;
    case kRelu:
      activate_each(gate, up, n, out, [](float x) { return x < 0.0f ? 0.0f : x; });
      break;
    case kRelu2:
      activate_each(gate, up, n, out, [](float x) { return x < 0.0f ? 0.0f : x * x; });
      break;
    case kClampedSwiglu:
      for (int64_t i = 0; i < n; ++i) {
        const float g = gate[i] > limit ? limit : gate[i];
        float u = up[i] > limit ? limit : up[i];
        u = u < -limit ? -limit : u;
        out[i] = (u + 1.0f) * sigmoid_times(g, alpha);
      }
      break;
  }
}

// Scores of a query: x[i] *= scale, then cap * tanh(x[i] / cap) where cap > 0, and -infinity where
// mask[i] is 0, if there is a mask.
inline void adjust_scores(float* x, int64_t n, float scale, float cap, const uint8_t* mask) {
  for (int64_t i = 0; i < n; ++i) x[i] *= scale;
  if (cap > 0.0f)  // tanh(u) = 1 - 2 / (e^2u + 1)
    for (int64_t i = 0; i < n; ++i) x[i] = cap - 2.0f * cap / (exp_clamped(2.0f / cap * x[i]) + 1.0f);
  if (mask != nullptr)
    for (int64_t i = 0; i < n; ++i) x[i] = mask[i] == 0 ? -INFINITY : x[i];
}

inline void to_float(const void* src, bool is_bf16, int64_t n, float* dst) {
  if (is_bf16) {
    const uint16_t* half = static_cast<const uint16_t*>(src);
    for (int64_t i = 0; i < n; ++i) dst[i] = float_of_bf16(half[i]);
  } else {
    memcpy(dst, src, static_cast<size_t>(n) * sizeof(float));
  }
}

inline void to_bf16(const float* src, int64_t n, uint16_t* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = bf16_of_float(src[i]);
}

inline void axpy(float weight, const float* y, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] += weight * y[i];
}

}  // namespace
}  // namespace cpux
