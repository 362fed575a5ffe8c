// The steps around an expert's two products where the caller multiplies in bf16 (torch's oneDNN):
// activation and weighted sum, in fp32 between the bf16 values that products take and give.
#include <omp.h>

#include <algorithm>

#include "layer.h"
#include "share.h"

namespace cpux {

namespace {

constexpr int64_t kColumns = 512;  // of one step: its fp32 values stay in the first-level cache

const float* bias_of(const uint8_t* block, int64_t offset) {
  return offset < 0 ? nullptr : reinterpret_cast<const float*>(block + offset);
}

// value[0..n) = bf16 row + bias
void load_row(const Kernels& kernels, const uint16_t* row, const float* bias, int64_t n,
              float* value) {
  kernels.to_float(row, true, n, value);
  if (bias != nullptr) kernels.axpy(1.0f, bias, n, value);
}

}  // namespace

void run_activate(const Kernels& kernels, const cpux_layer& layer, const void* block,
                  const uint16_t* first, int64_t n, int threads, uint16_t* middle) {
  const int64_t width = layer.intermediate_size;
  const bool has_gate = layer.has_gate != 0;
  const int64_t first_width = has_gate ? 2 * width : width;
  const float* bias = bias_of(static_cast<const uint8_t*>(block), layer.gate_up_bias);
  const int64_t steps = (width + kColumns - 1) / kColumns;
  int64_t next = 0;
#pragma omp parallel num_threads(threads)
  share_items(&next, n * steps, threads, [&](int64_t item) {
    const int64_t row = item / steps, c = item % steps * kColumns;
    const int64_t count = std::min(kColumns, width - c);
    const uint16_t* source = first + row * first_width;
    float gate[kColumns], up[kColumns];
    load_row(kernels, source + c, bias == nullptr ? nullptr : bias + c, count, gate);
    if (has_gate)
      load_row(kernels, source + width + c, bias == nullptr ? nullptr : bias + width + c, count,
               up);
    kernels.activate(layer.activation, layer.alpha, layer.limit, gate, has_gate ? up : nullptr,
                     count, gate);
    kernels.to_bf16(gate, count, middle + row * width + c);
  });
}

void run_add(const Kernels& kernels, const cpux_layer& layer, const void* block, const uint16_t* y,
             const int64_t* token, const float* weight, int64_t n, int threads, float* out) {
  const int64_t width = layer.hidden_size;
  const float* bias = bias_of(static_cast<const uint8_t*>(block), layer.down_bias);
  const int64_t steps = (width + kColumns - 1) / kColumns;
  int64_t next = 0;
  // A step owns its columns of the output: tokens may repeat, and the order of sums is fixed.
#pragma omp parallel num_threads(threads)
  share_items(&next, steps, threads, [&](int64_t step) {
    const int64_t c = step * kColumns;
    const int64_t count = std::min(kColumns, width - c);
    float value[kColumns];
    for (int64_t i = 0; i < n; ++i) {
      load_row(kernels, y + i * width + c, bias == nullptr ? nullptr : bias + c, count, value);
      kernels.axpy(weight[i], value, count, out + token[i] * width + c);
    }
  });
}

}  // namespace cpux
