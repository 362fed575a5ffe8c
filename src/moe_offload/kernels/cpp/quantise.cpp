// A matrix to our own int8 and int4: tiles and scales as kernels.h says.
#include <cstring>

#include "entry_points.h"
#include "team.h"

namespace cpux {
namespace {

float widen(uint16_t bf16) {
  const uint32_t bits = static_cast<uint32_t>(bf16) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
float widen(float value) { return value; }

// x [32][16]: a tile's columns, zero beyond the matrix.
template <class T>
void load_tile(const cpux_weights& m, int64_t row, int64_t column, float* x) {
  const int rows = static_cast<int>(std::min<int64_t>(kTileRows, m.rows - row));
  const int columns = static_cast<int>(std::min<int64_t>(kGroup, m.cols - column));
  if (rows < kTileRows || columns < kGroup) memset(x, 0, kTileRows * kGroup * sizeof *x);
  const T* w = static_cast<const T*>(m.w) + row * m.row_stride + column * m.col_stride;
  for (int r = 0; r < rows; ++r)
    for (int c = 0; c < columns; ++c)
      x[c * kTileRows + r] = widen(w[r * m.row_stride + c * m.col_stride]);
}

}  // namespace
}  // namespace cpux

int cpux_quantise(int isa, int threads, const cpux_weights* m, int bits, uint8_t* packed,
                  uint16_t* scales) {
  using namespace cpux;
  const bool valid = (bits == 8 || bits == 4) && m->rows > 0 && m->cols > 0;
  bool is_too_large = false;
  const int code = guarded(isa, threads, valid, [&](const Kernels& k) {
    const int64_t groups = (m->cols + kGroup - 1) / kGroup;
    const int64_t tile_bytes = quant_group_bytes(bits == 8 ? kInt8 : kInt4);
    share_items(threads, (m->rows + kTileRows - 1) / kTileRows, [&](int64_t block) {
      alignas(64) float x[kGroup * kTileRows];
      for (int64_t g = 0; g < groups; ++g) {
        const auto load = m->is_bf16 ? load_tile<uint16_t> : load_tile<float>;
        load(*m, block * kTileRows, g * kGroup, x);
        const int64_t tile = block * groups + g;
        if (!k.quantise_tile(bits, x, packed + tile * tile_bytes, scales + tile * kTileRows))
          __atomic_store_n(&is_too_large, true, __ATOMIC_RELAXED);
      }
    });
  });
  return code == CPUX_OK && is_too_large ? CPUX_OUT_OF_RANGE : code;
}
