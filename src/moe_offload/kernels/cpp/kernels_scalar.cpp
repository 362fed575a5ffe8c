// The reference: plain loops, one product at a time, that every other variant is tested against.
#include "attention_kernels.h"
#include "quant_kernels.h"
#include "scale_search.h"

namespace cpux {
namespace {

void dot_rows(const void* w, int format, int64_t cols, int rows, uintptr_t, const float* const* x,
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

// What a vector of one number is, as far as `exponentials` needs it.
struct Float1 {
  using Type = float;
  static constexpr int lanes = 1;
  static Type zero() { return 0.0f; }
  static Type load(const float* p) { return *p; }
  static void store(float* p, Type v) { *p = v; }
  static Type broadcast(const float* p) { return *p; }
  static Type fma(Type a, Type b, Type c) { return a * b + c; }
  static Type add(Type a, Type b) { return a + b; }
  static Type max(Type a, Type b) { return a > b ? a : b; }
  static Type times_power(Type a, Type b) {
    return float_of_bits(bits_of_float(a) + (bits_of_float(b) << 23));
  }
  static Type zero_below(Type x, Type least, Type a) { return x < least ? 0.0f : a; }
};

float element(const void* data, int format, int64_t at) {
  return format == kBf16 ? float_of_bf16(static_cast<const uint16_t*>(data)[at])
                         : static_cast<const float*>(data)[at];
}

void score_keys(const void* keys, int format, int64_t cols, int n_keys, const void*,
                const float* query, int n_heads, float* y, int64_t ldy) {
  for (int h = 0; h < n_heads; ++h)
    for (int k = 0; k < n_keys; ++k) {
      float sum = 0.0f;
      for (int64_t d = 0; d < cols; ++d)
        sum += element(keys, format, k * cols + d) * query[h * cols + d];
      y[h * ldy + k] = sum;
    }
}

void mix_values(const void* values, int format, int64_t cols, int n_keys, const void*,
                const float* weight, int64_t ldw, int n_heads, float* y, int64_t ldy) {
  for (int h = 0; h < n_heads; ++h)
    for (int k = 0; k < n_keys; ++k)
      for (int64_t d = 0; d < cols; ++d)
        y[h * ldy + d] += weight[h * ldw + k] * element(values, format, k * cols + d);
}

void dot_fp8(const Matrix& m, int64_t row, int rows, uintptr_t, const float* const* x, int n_tokens, float* y,
             int64_t ldy) {
  for (int r = 0; r < rows; ++r) {
    const uint8_t* w = m.w + (row + r) * m.cols;
    for (int t = 0; t < n_tokens; ++t) {
      float sum = 0.0f;
      for (int64_t k = 0; k < m.cols; ++k)
        sum += float_of_fp8(w[k]) * fp8_scale(m, row + r, k) * (x[t][k] * (1.0f / kFp8Half));
      y[t * ldy + r] = sum;
    }
  }
}

// The products of mxfp4 with fp32 activations; the others do without panels here.
void load_weights(const Matrix& m, int64_t row, int64_t k, int rows, int depth, int valid,
                  void* panel) {
  load_mxfp4(m, row, k, rows, depth, valid, static_cast<float*>(panel));
}

void multiply(const void* w_panel, int rows, int depth, const void* x_panel, int width,
              bool accumulate, const Ahead&, float* c) {
  const float* w = static_cast<const float*>(w_panel);
  const float* x = static_cast<const float*>(x_panel);
  for (int r = 0; r < rows; ++r)
    for (int t = 0; t < width; ++t) {
      float sum = accumulate ? c[r * width + t] : 0.0f;
      for (int k = 0; k < depth; ++k) sum += w[r * depth + k] * x[k * width + t];
      c[r * width + t] = sum;
    }
}

void quant_rows(int format, const uint8_t* w, const BlockScales& w_scales, const Next&, int64_t g0,
                int64_t g1, const void* values, const float* scales, const int32_t* starts, int n_tokens,
                bool accumulate, float* y, int64_t ldy) {
  const int8_t* x = static_cast<const int8_t*>(values);
  const float own = static_cast<float>(level_offset(format));
  for (int t = 0; t < n_tokens; ++t) {
    for (int r = 0; r < kTileRows; ++r) {
      float total = accumulate ? y[t * ldy + r] : 0.0f;
      for (int64_t g = g0; g < g1; ++g) {
        const uint8_t* group = w + g * quant_group_bytes(format);
        int32_t sum = 0;
        for (int k = 0; k < kGroup; ++k)
          sum += tile_level(group, format, r, k) * x[(g * n_tokens + t) * kGroup + k];
        const int64_t at = g / w_scales.groups * kTileRows + r;
        const float scale = scale_value(w_scales.data, w_scales.type, at);
        const float x_scale = scales[g * n_tokens + t];
        total += static_cast<float>(sum) * (scale * x_scale);
        if (w_scales.offsets == nullptr) continue;
        const float x_sum = static_cast<float>(starts[g * n_tokens + t]) * (-1.0f / own) * x_scale;
        const float offset =
            w_scales.offset_type == kZeroOffset
                ? (own - static_cast<float>(w_scales.offsets[at])) * scale
                : own * scale + scale_value(w_scales.offsets, kHalfScale, at);
        total += offset * x_sum;
      }
      y[t * ldy + r] = total;
    }
  }
}

void quantize_group(const float* x, int valid, int format, void* values, float* scale,
                    int32_t* start) {
  quantize_bytes(x, valid, level_offset(format), values, scale, start);
  if (format == kMxfp4) *scale *= 0.5f;  // its levels are twice the numbers
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

// What every CPU has: SSE2, NEON.
struct Lanes4 {
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));
  static Float larger(Float a, Float b) { return a > b ? a : b; }
  static Float smaller(Float a, Float b) { return a < b ? a : b; }
};

const Kernels kKernels = {
    "scalar",
    dot_rows,
    dot_fp8,
    score_keys,
    mix_values,
    {4, 1, 8, 16, load_weights, multiply, 0, nullptr},
    {},
    0,
    {{32, kMaxQuantTokens}, {32, kMaxQuantTokens}, {32, kMaxQuantTokens}},
    quantize_group,
    quant_rows,
    to_float,
    to_bf16,
    activate,
    adjust_scores,
    exponentials<Float1>,
    axpy,
    quantise_tile<Lanes4>,
    read_bytes,
    fma_flops,
};

}  // namespace

const Kernels* scalar_kernels() { return &kKernels; }

}  // namespace cpux
