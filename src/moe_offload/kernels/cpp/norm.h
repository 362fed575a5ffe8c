// RMSNorm, one row at a time.
#pragma once

#include "api.h"

namespace cpux {

// How y follows from h = x / sqrt(mean(x^2) + epsilon), which is fp32; round() is to y's type.
enum NormForm : int32_t {
  kRoundThenWeight = 0,  // round(weight * round(h)): Llama and most others
  kWeightThenRound = 1,  // round(weight * h)
  kOnePlusWeight = 2,    // round((1 + weight) * h): Gemma
};

// Whether a norm can be computed as it is described.
bool is_valid_norm(const cpux_norm& norm);

// One row: x fp32 [width], y [width]; scratch [width], may not be x. y may lie over x when fp32.
void norm_row(const cpux_norm& norm, bool is_bf16, const float* x, float* scratch, void* y);

}  // namespace cpux
