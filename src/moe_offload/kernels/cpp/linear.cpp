// One matrix for T tokens: the experts' product with a single pass and no activation.
#include <omp.h>

#include <algorithm>
#include <cstring>

#include "layer.h"
#include "product.h"
#include "share.h"

namespace cpux {

namespace {

constexpr int64_t kSerialTokens = 4;
constexpr int64_t kChunkBytes = 64 << 20;

class LinearChunk {
 public:
  LinearChunk(const Kernels& kernels, const cpux_matrix& matrix, const void* x, bool is_bf16,
              int64_t n_tokens, int threads, Arena& arena);
  void run(void* y);

 private:
  void convert_token(int64_t t);
  void pack(int64_t panel);
  void tile(int64_t index, int thread, void* y);

  const Kernels& kernels_;
  const Matrix matrix_;
  const char* x_in_;
  const bool is_bf16_;
  const int64_t n_;
  const int threads_;
  Activations x_;
  const bool panels_;
  const int64_t tile_, ld_;
  float* rows_;
  float** c_;
  float** row_;
  void** slice_;
};

LinearChunk::LinearChunk(const Kernels& kernels, const cpux_matrix& matrix, const void* x,
                         bool is_bf16, int64_t n_tokens, int threads, Arena& arena)
    : kernels_(kernels),
      matrix_{matrix.weight_format, matrix.rows, matrix.cols,
              static_cast<const uint8_t*>(matrix.w), matrix.scale, matrix.bias},
      x_in_(static_cast<const char*>(x)),
      is_bf16_(is_bf16),
      n_(n_tokens),
      threads_(threads),
      x_(allocate(kernels, choose_form(kernels, matrix.weight_format, n_tokens, !is_bf16),
                  matrix.weight_format, n_tokens, matrix.cols, arena)),
      panels_(x_.form == Form::kPanels || x_.form == Form::kBf16Panels),
      tile_(panels_ ? kPanelTile : kDotTile),
      ld_(round_up(tile_, kTileRows) + kTileRows),
      rows_(arena.take<float>(n_tokens * matrix.cols)),
      c_(arena.take<float*>(threads)),
      row_(arena.take<float*>(threads)),
      slice_(arena.take<void*>(threads)) {
  for (int i = 0; i < threads; ++i) {
    c_[i] = arena.take<float>(product_floats(n_tokens, tile_));
    row_[i] = arena.take<float>(ld_);
    slice_[i] = arena.take<uint8_t>(slice_bytes());
  }
}

void LinearChunk::convert_token(int64_t t) {
  float* row = rows_ + t * matrix_.cols;
  kernels_.to_float(x_in_ + t * matrix_.cols * (is_bf16_ ? 2 : 4), is_bf16_, matrix_.cols, row);
  if (x_.form == Form::kDot) x_.rows[t] = row;
  if (x_.form == Form::kQuantised) quantise(kernels_, x_, t, 0, matrix_.cols, row);
}

void LinearChunk::pack(int64_t panel) {
  const Panel p = panel_of(kernels_, x_, panel);
  const float* rows[kMaxPanelTokens];
  for (int64_t t = 0; t < p.tokens; ++t) rows[t] = rows_ + (p.first + t) * matrix_.cols;
  pack_panel(kernels_, x_, panel, rows);
}

void LinearChunk::tile(int64_t index, int thread, void* y) {
  const int64_t r0 = index * tile_;
  const int64_t r1 = std::min(r0 + tile_, matrix_.rows);
  const int offset = product(kernels_, matrix_, x_, r0, r1, c_[thread], ld_, slice_[thread]);
  for_each_token(kernels_, x_, r1 - r0, c_[thread] + offset, ld_, row_[thread],
                 [&](int64_t t, const float* value) {
                   const int64_t at = t * matrix_.rows + r0;
                   if (is_bf16_)
                     kernels_.to_bf16(value, r1 - r0, static_cast<uint16_t*>(y) + at);
                   else
                     memcpy(static_cast<float*>(y) + at, value,
                            static_cast<size_t>(r1 - r0) * sizeof(float));
                 });
}

void LinearChunk::run(void* y) {
  const int64_t n_panel_items = panels_ ? n_panels(kernels_, x_) : 0;
  const int64_t n_tiles = (matrix_.rows + tile_ - 1) / tile_;
  const bool serial = n_ <= kSerialTokens && !panels_;
  if (serial)
    for (int64_t t = 0; t < n_; ++t) convert_token(t);
  int64_t next_tile = 0;
#pragma omp parallel num_threads(threads_)
  {
    if (!serial) {
#pragma omp for schedule(dynamic)
      for (int64_t t = 0; t < n_; ++t) convert_token(t);
#pragma omp for schedule(dynamic)
      for (int64_t p = 0; p < n_panel_items; ++p) pack(p);
    }
    const int thread = omp_get_thread_num();
    share_items(&next_tile, n_tiles, threads_, [&](int64_t i) { tile(i, thread, y); });
  }
}

}  // namespace

void run_linear(const Kernels& kernels, const cpux_matrix& matrix, const void* x, bool is_bf16,
                int64_t n_tokens, int threads, void* y) {
  const int64_t step = std::max<int64_t>(kMaxPanelTokens, kChunkBytes / (8 * matrix.cols));
  const int64_t element = is_bf16 ? 2 : 4;
  for (int64_t t = 0; t < n_tokens; t += step) {
    LinearChunk chunk(kernels, matrix, static_cast<const char*>(x) + t * matrix.cols * element,
                      is_bf16, std::min(step, n_tokens - t), threads, fresh_arena());
    chunk.run(static_cast<char*>(y) + t * matrix.rows * element);
  }
}

}  // namespace cpux
