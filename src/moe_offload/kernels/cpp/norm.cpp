// RMSNorm of a few rows, as a model's own module rounds it. Serial: a row is 16 KiB at most.
#include "norm.h"

#include <cmath>
#include <cstring>

#include "elementwise.h"

namespace cpux {

namespace {

constexpr int kLanes = 16;  // chains of the sum: one order on every machine

float mean_square(const float* x, int64_t n) {
  float total[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) total[lane] += x[i + lane] * x[i + lane];
  for (int lane = 0; i + lane < n; ++lane) total[lane] += x[i + lane] * x[i + lane];
  double sum = 0.0;
  for (const float value : total) sum += value;
  return static_cast<float>(sum / static_cast<double>(n));
}

inline float rounded(float value) { return float_of_bf16(bf16_of_float(value)); }

}  // namespace

void norm_row(const cpux_norm& norm, bool is_bf16, const float* x, float* scratch, void* y) {
  const int64_t n = norm.width;
  const float scale = 1.0f / std::sqrt(mean_square(x, n) + norm.epsilon);
  const float offset = norm.form == kOnePlusWeight ? 1.0f : 0.0f;
  if (norm.weight_is_bf16 != 0) {
    to_float(norm.weight, true, n, scratch);
  } else {
    memcpy(scratch, norm.weight, static_cast<size_t>(n) * sizeof(float));
  }
  if (norm.form == kRoundThenWeight && is_bf16) {
    for (int64_t i = 0; i < n; ++i) scratch[i] *= rounded(x[i] * scale);
  } else {
    for (int64_t i = 0; i < n; ++i) scratch[i] = (x[i] * scale) * (offset + scratch[i]);
  }
  if (is_bf16) {
    to_bf16(scratch, n, static_cast<uint16_t*>(y));
  } else {
    memcpy(y, scratch, static_cast<size_t>(n) * sizeof(float));
  }
}

void run_norm(const cpux_norm& norm, const void* x, bool is_bf16, int64_t n_rows, void* y) {
  Arena& arena = fresh_arena();
  float* row = arena.take<float>(norm.width);
  float* scratch = arena.take<float>(norm.width);
  const int64_t row_bytes = norm.width * (is_bf16 ? 2 : 4);
  for (int64_t r = 0; r < n_rows; ++r) {
    to_float(static_cast<const char*>(x) + r * row_bytes, is_bf16, norm.width, row);
    norm_row(norm, is_bf16, row, scratch, static_cast<char*>(y) + r * row_bytes);
  }
}

}  // namespace cpux
