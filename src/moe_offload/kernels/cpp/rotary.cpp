// Rotary position embedding of one token's heads, rounded as torch's operations on bf16 round it:
// each product, then their sum. Serial: 32 heads of 128 are 8 KiB.
#include "elementwise.h"
#include "entry_points.h"

namespace cpux {

namespace {

inline float rounded(float value) { return float_of_bf16(bf16_of_float(value)); }

// y = x cos + rotate_half(x) sin of one head: halves (x1, x2) are rotated to (-x2, x1).
void rotate_head(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t width,
                 uint16_t* y) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = float_of_bf16(x[i]);
    const float b = float_of_bf16(x[half + i]);
    y[i] = bf16_of_float(rounded(a * float_of_bf16(cos[i])) -
                         rounded(b * float_of_bf16(sin[i])));
    y[half + i] = bf16_of_float(rounded(b * float_of_bf16(cos[half + i])) +
                                rounded(a * float_of_bf16(sin[half + i])));
  }
}

}  // namespace

void rotate_heads(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t n_batch,
                  int64_t n_heads, int64_t width, uint16_t* y) {
  for (int64_t head = 0; head < n_batch * n_heads; ++head) {
    const int64_t angles = head / n_heads * width;
    rotate_head(x + head * width, cos + angles, sin + angles, width, y + head * width);
  }
}

}  // namespace cpux

int cpux_rotate(int isa, int threads, const uint16_t* x, const uint16_t* cos, const uint16_t* sin,
                int64_t n_batch, int64_t n_heads, int64_t width, uint16_t* y) {
  const bool valid = n_batch >= 0 && n_heads >= 0 && width > 0 && width % 2 == 0 &&
                     x != nullptr && cos != nullptr && sin != nullptr && y != nullptr;
  return cpux::guarded(isa, threads, valid, [&](const cpux::Kernels&) {
    cpux::rotate_heads(x, cos, sin, n_batch, n_heads, width, y);
  });
}
