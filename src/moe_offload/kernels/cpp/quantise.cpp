// A matrix to packed tiles, rounded or as it is quantised already: tiles and scales as kernels.h says.
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

// `bytes` [16][32] of a tile, one level each, to its words.
void pack_tile(const uint8_t* levels, int bits, uint8_t* packed) {
  for (int r = 0; r < kTileRows; ++r) {
    uint32_t words[kGroup / 4];
    memcpy(words, levels + r * kGroup, sizeof words);
    for (int step = 0; step < bits; ++step) {
      const uint32_t word = bits == 8 ? words[step] ^ 0x80808080u : words[step] | words[step + 4] << 4;
      memcpy(packed + (step * kTileRows + r) * 4, &word, sizeof word);
    }
  }
}

}  // namespace
}  // namespace cpux

int cpux_quantise(int isa, int threads, const cpux_weights* m, int format, uint8_t* packed,
                  void* scales) {
  using namespace cpux;
  const bool valid = is_tiled(format) && m->rows > 0 && m->cols > 0;
  bool is_too_large = false;
  const int code = guarded(isa, threads, valid, [&](const Kernels& k) {
    const int64_t groups = (m->cols + kGroup - 1) / kGroup;
    const int64_t tile_bytes = quant_group_bytes(format);
    const int64_t tile_scales = kTileRows * scale_bytes(format == kMxfp4 ? kE8m0Scale : kHalfScale);
    share_items(threads, (m->rows + kTileRows - 1) / kTileRows, [&](int64_t block) {
      alignas(64) float x[kGroup * kTileRows];
      for (int64_t g = 0; g < groups; ++g) {
        const auto load = m->is_bf16 ? load_tile<uint16_t> : load_tile<float>;
        load(*m, block * kTileRows, g * kGroup, x);
        const int64_t tile = block * groups + g;
        if (!k.quantise_tile(format, x, packed + tile * tile_bytes,
                             static_cast<uint8_t*>(scales) + tile * tile_scales))
          __atomic_store_n(&is_too_large, true, __ATOMIC_RELAXED);
      }
    });
  });
  return code == CPUX_OK && is_too_large ? CPUX_OUT_OF_RANGE : code;
}

int cpux_pack(int isa, int threads, const uint8_t* levels, int64_t rows, int64_t cols,
              int64_t row_stride, int64_t col_stride, int bits, uint8_t* packed) {
  using namespace cpux;
  const bool valid = (bits == 8 || bits == 4) && rows > 0 && cols > 0;
  return guarded(isa, threads, valid, [&](const Kernels&) {
    const int64_t groups = (cols + kGroup - 1) / kGroup;
    share_items(threads, (rows + kTileRows - 1) / kTileRows, [&](int64_t block) {
      uint8_t tile[kTileRows * kGroup];
      const int n_rows = static_cast<int>(std::min<int64_t>(kTileRows, rows - block * kTileRows));
      for (int64_t g = 0; g < groups; ++g) {
        const int n_cols = static_cast<int>(std::min<int64_t>(kGroup, cols - g * kGroup));
        const uint8_t* from = levels + block * kTileRows * row_stride + g * kGroup * col_stride;
        if (n_rows < kTileRows || n_cols < kGroup) memset(tile, 0, sizeof tile);
        for (int r = 0; r < n_rows; ++r, from += row_stride) {
          if (col_stride == 1 && n_cols == kGroup)
            memcpy(tile + r * kGroup, from, kGroup);
          else
            for (int c = 0; c < n_cols; ++c) tile[r * kGroup + c] = from[c * col_stride];
        }
        pack_tile(tile, bits, packed + (block * groups + g) * kTileRows * kGroup * bits / 8);
      }
    });
  });
}
