// RMSNorm of a few rows, as a model's own module rounds it. Serial: a row is 16 KiB at most. Every
// instruction set computes the same: fp32, the sum of squares in 16 chains that are added in fp64.
#include <cmath>
#include <cstring>

#include "elementwise.h"
#include "entry_points.h"
#include "scratch.h"

namespace cpux {

namespace {

// How y follows from h = x / sqrt(mean(x^2) + epsilon), which is fp32; round() is to y's type.
enum NormForm : int32_t {
  kRoundThenWeight = 0,  // round(weight * round(h)): Llama and most others
  kWeightThenRound = 1,  // round(weight * h)
  kOnePlusWeight = 2,    // round((1 + weight) * h): Gemma
};

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

// One row: x fp32 [width], y [width]; scratch [width].
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

}  // namespace

bool is_valid_norm(const cpux_norm& norm) {
  return norm.form >= kRoundThenWeight && norm.form <= kOnePlusWeight && norm.width > 0 &&
         norm.weight != nullptr;
}

void norm_rows(const cpux_norm& norm, const void* x, bool is_bf16, int64_t n_rows, float* scratch,
               void* y) {
  const int64_t row_bytes = norm.width * (is_bf16 ? 2 : 4);
  for (int64_t at = 0; at < n_rows * row_bytes; at += row_bytes) {
    to_float(static_cast<const char*>(x) + at, is_bf16, norm.width, scratch);
    norm_row(norm, is_bf16, scratch, scratch + norm.width, static_cast<char*>(y) + at);
  }
}

}  // namespace cpux

int cpux_rms_norm(int isa, int threads, const cpux_norm* norm, const void* x, int is_bf16,
                  int64_t n_rows, void* y) {
  const bool valid = cpux::is_valid_norm(*norm) && n_rows >= 0 &&
                     (n_rows == 0 || (x != nullptr && y != nullptr));
  return cpux::guarded(isa, threads, valid, [&](const cpux::Kernels&) {
    float* scratch = cpux::fresh_arena().take<float>(2 * norm->width);
    cpux::norm_rows(*norm, x, is_bf16 != 0, n_rows, scratch, y);
  });
}
