// The reference: plain loops, one product at a time, that every other variant is tested against.
#include "quant_kernels.h"

namespace cpux {
namespace {

void dot_rows(const void* w, int format, int64_t cols, int rows, const float* const* x,
              int n_tokens, float* y, int64_t ldy) {
  for (int r = 0; r < rows; ++r) {
    for (int t = 0; t < n_tokens; ++t) {
      float sum = 0.0f;
      for (int64_t k = 0; k < cols; ++k) {
        const float weight = format == kBf16
                                 ? float_of_bf16(static_cast<const uint16_t*>(w)[r * cols + k])
                                 : static_cast<const float*>(w)[r * cols + k];
        sum += weight * x[t][k];
      }
      y[t * ldy + r] = sum;
    }
  }
}

void mix_rows(const void* w, int format, int64_t cols, int rows, const float* const* weight,
              int n_tokens, float* y, int64_t ldy) {
  for (int t = 0; t < n_tokens; ++t)
    for (int r = 0; r < rows; ++r)
      for (int64_t c = 0; c < cols; ++c)
        y[t * ldy + c] += weight[t][r] *
                          (format == kBf16
                               ? float_of_bf16(static_cast<const uint16_t*>(w)[r * cols + c])
                               : static_cast<const float*>(w)[r * cols + c]);
}

float float_of_half(uint16_t half) {
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

int level(const uint8_t* group, int format, int row, int column) {
  if (format == kInt8)
    return static_cast<int8_t>(group[(column / 4 * kTileRows + row) * 4 + column % 4]);
  const int byte = group[(column % 16 / 4 * kTileRows + row) * 4 + column % 4];
  return (column < 16 ? byte & 15 : byte >> 4) - 8;
}

void quant_rows(int format, const uint8_t* w, const uint16_t* w_scale, int64_t g0, int64_t g1,
                const void* values, const float* scales, const int32_t*, int n_tokens,
                bool accumulate, float* y, int64_t ldy) {
  const int8_t* x = static_cast<const int8_t*>(values);
  for (int t = 0; t < n_tokens; ++t) {
    for (int r = 0; r < kTileRows; ++r) {
      float total = accumulate ? y[t * ldy + r] : 0.0f;
      for (int64_t g = g0; g < g1; ++g) {
        const uint8_t* group = w + g * quant_group_bytes(format);
        int32_t sum = 0;
        for (int k = 0; k < kGroup; ++k)
          sum += level(group, format, r, k) * x[(g * n_tokens + t) * kGroup + k];
        total += static_cast<float>(sum) *
                 (float_of_half(w_scale[g * kTileRows + r]) * scales[g * n_tokens + t]);
      }
      y[t * ldy + r] = total;
    }
  }
}

void quantize_group(const float* x, int valid, int, void* values, float* scale, int32_t* start) {
  quantize_bytes(x, valid, 0, values, scale, start);
}

uint64_t read_bytes(const void* data, int64_t bytes) {
  const uint8_t* p = static_cast<const uint8_t*>(data);
  uint64_t sum = 0;
  for (int64_t i = 0; i + 8 <= bytes; i += 8) {
    uint64_t word;
    memcpy(&word, p + i, sizeof word);
    sum += word;
  }
  return sum;
}

double fma_flops(int64_t iterations, float* sink) {
  float acc[8] = {1, 1, 1, 1, 1, 1, 1, 1};
  for (int64_t i = 0; i < iterations; ++i)
    for (float& a : acc) a = a * 0.999999f + 0.999999f;
  for (const float a : acc) *sink += a;
  return 16.0 * static_cast<double>(iterations);
}

const Kernels kKernels = {
    "scalar",
    dot_rows,
    mix_rows,
    {},
    {},
    0,
    {{32, kMaxQuantTokens}, {32, kMaxQuantTokens}},
    quantize_group,
    quant_rows,
    to_float,
    to_bf16,
    activate,
    exponentials,
    axpy,
    read_bytes,
    fma_flops,
};

}  // namespace

const Kernels* scalar_kernels() { return &kKernels; }

}  // namespace cpux
