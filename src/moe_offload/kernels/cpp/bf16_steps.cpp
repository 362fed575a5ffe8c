// The steps around an expert's two products where the caller multiplies in bf16 (torch's oneDNN):
// activation and weighted sum, in fp32 between the bf16 values that products take and give.
#include <algorithm>

#include "entry_points.h"
#include "team.h"

namespace {

using cpux::Kernels;

constexpr int64_t kColumns = 512;  // of one step: its fp32 values stay in the first-level cache

// value[0..n) = bf16 row + bias, where there is one, both from column `from`
void load_row(const Kernels& kernels, const uint16_t* row, const float* bias, int64_t from,
              int64_t n, float* value) {
  kernels.to_float(row + from, true, n, value);
  if (bias != nullptr) kernels.axpy(1.0f, bias + from, n, value);
}

const float* bias_of(const void* block, int64_t offset) {
  if (offset < 0) return nullptr;
  return reinterpret_cast<const float*>(static_cast<const uint8_t*>(block) + offset);
}

bool is_valid(const cpux_layer& layer, const void* block, const void* from, int64_t n,
              const void* to) {
  return layer.hidden_size > 0 && layer.intermediate_size > 0 && block != nullptr && n >= 0 &&
         (n == 0 || (from != nullptr && to != nullptr));
}

}  // namespace

int cpux_activate(int isa, int threads, const cpux_layer* layer, const void* block,
                  const uint16_t* first, int64_t n, uint16_t* middle) {
  const int64_t width = layer->intermediate_size;
  const bool has_gate = layer->has_gate != 0;
  const float* bias = bias_of(block, layer->gate_up_bias);
  const int64_t steps = (width + kColumns - 1) / kColumns;
  const bool valid = is_valid(*layer, block, first, n, middle);
  return cpux::guarded(isa, threads, valid, [&](const Kernels& kernels) {
    cpux::share_items(threads, n * steps, [&](int64_t item) {
      const int64_t row = item / steps, c = item % steps * kColumns;
      const int64_t count = std::min(kColumns, width - c);
      const uint16_t* source = first + row * (has_gate ? 2 * width : width);
      float gate[kColumns], up[kColumns];
      load_row(kernels, source, bias, c, count, gate);
      if (has_gate) load_row(kernels, source, bias, width + c, count, up);
      kernels.activate(layer->activation, layer->alpha, layer->limit, gate,
                       has_gate ? up : nullptr, count, gate);
      kernels.to_bf16(gate, count, middle + row * width + c);
    });
  });
}

int cpux_add(int isa, int threads, const cpux_layer* layer, const void* block, const uint16_t* y,
             const int64_t* token, const float* weight, int64_t n, float* out) {
  const int64_t width = layer->hidden_size;
  const float* bias = bias_of(block, layer->down_bias);
  const bool valid = is_valid(*layer, block, y, n, out) &&
                     (n == 0 || (token != nullptr && weight != nullptr));
  return cpux::guarded(isa, threads, valid, [&](const Kernels& kernels) {
    // A step owns its columns of the output: tokens may repeat, and the order of sums is fixed.
    cpux::share_items(threads, (width + kColumns - 1) / kColumns, [&](int64_t step) {
      const int64_t c = step * kColumns;
      const int64_t count = std::min(kColumns, width - c);
      float value[kColumns];
      for (int64_t i = 0; i < n; ++i) {
        load_row(kernels, y + i * width, bias, c, count, value);
        kernels.axpy(weight[i], value, count, out + token[i] * width + c);
      }
    });
  });
}
