// Matrices for T tokens: the experts' product with a single pass and no activation.
#include <algorithm>
#include <cstring>

#include "entry_points.h"
#include "product.h"
#include "team.h"

namespace cpux {

namespace {

constexpr int64_t kSerialTokens = 4;
constexpr int64_t kChunkBytes = 64 << 20;

// n tokens, few enough for the scratch of one chunk, through matrices of one format and width.
class Chunk {
 public:
  Chunk(const Kernels& kernels, int threads, const cpux_matrix* const* matrices, int n_matrices,
        const void* x, bool is_bf16, int64_t n);
  void run(void* const* y);

 private:
  void convert_token(int64_t t);
  void pack(int64_t panel);
  int64_t n_tiles(int matrix) const { return (matrices_[matrix].rows + tile_ - 1) / tile_; }
  void tile(const Matrix& matrix, int64_t index, const Scratch& s, void* y);

  const Kernels& kernels_;
  const int threads_;
  const int n_matrices_;
  const int64_t cols_;
  const char* x_in_;
  const bool is_bf16_;
  const int64_t n_;
  Arena& arena_;
  Matrix* matrices_;
  const Activations x_;
  const bool panels_;
  const int64_t tile_;
  float* rows_;  // fp32 [n, cols]
  Scratch* scratch_;
};

Matrix readable(const cpux_matrix& matrix) {
  return {matrix.weight_format, matrix.rows, matrix.cols, static_cast<const uint8_t*>(matrix.w),
          {reinterpret_cast<const uint8_t*>(matrix.scale), nullptr, kHalfScale, kNoOffset, kGroup, 1},
          matrix.bias};
}

Chunk::Chunk(const Kernels& kernels, int threads, const cpux_matrix* const* matrices,
             int n_matrices, const void* x, bool is_bf16, int64_t n)
    : kernels_(kernels),
      threads_(threads),
      n_matrices_(n_matrices),
      cols_(matrices[0]->cols),
      x_in_(static_cast<const char*>(x)),
      is_bf16_(is_bf16),
      n_(n),
      arena_(fresh_arena()),
      matrices_(arena_.take<Matrix>(n_matrices)),
      x_(allocate(kernels, choose_form(kernels, matrices[0]->weight_format, n, !is_bf16),
                  matrices[0]->weight_format, n, cols_, arena_)),
      panels_(is_panels(x_.form)),
      tile_(panels_ ? kPanelTile : kDotTile),
      rows_(arena_.take<float>(n * cols_)),
      scratch_(allocate_scratch(threads, n, tile_, arena_)) {
  for (int i = 0; i < n_matrices; ++i) matrices_[i] = readable(*matrices[i]);
}

void Chunk::convert_token(int64_t t) {
  float* row = rows_ + t * cols_;
  kernels_.to_float(x_in_ + t * cols_ * (is_bf16_ ? 2 : 4), is_bf16_, cols_, row);
  if (x_.form == Form::kDot) x_.rows[t] = row;
  if (x_.form == Form::kQuantised) quantise(kernels_, x_, t, 0, cols_, row);
}

void Chunk::pack(int64_t panel) {
  const Panel p = panel_of(kernels_, x_, panel);
  const float* rows[kMaxPanelTokens];
  for (int64_t t = 0; t < p.tokens; ++t) rows[t] = rows_ + (p.first + t) * cols_;
  pack_panel(kernels_, x_, panel, rows);
}

void Chunk::tile(const Matrix& matrix, int64_t index, const Scratch& s, void* y) {
  const int64_t r0 = index * tile_;
  const int64_t r1 = std::min(r0 + tile_, matrix.rows);
  const int offset = product(kernels_, matrix, x_, r0, r1, s.c, s);
  for_each_token(kernels_, x_, r1 - r0, offset, s, [&](int64_t t, const float* value) {
    const int64_t at = t * matrix.rows + r0;
    if (is_bf16_)
      kernels_.to_bf16(value, r1 - r0, static_cast<uint16_t*>(y) + at);
    else
      memcpy(static_cast<float*>(y) + at, value, static_cast<size_t>(r1 - r0) * sizeof(float));
  });
}

void Chunk::run(void* const* y) {
  const bool serial = n_ <= kSerialTokens && !panels_;  // a barrier costs more
  if (serial)
    for (int64_t t = 0; t < n_; ++t) convert_token(t);
  int64_t all_tiles = 0;
  for (int i = 0; i < n_matrices_; ++i) all_tiles += n_tiles(i);
  Team team(threads_);
  team.run([&](int thread) {
    if (!serial) {
      team.share(0, n_, [&](int64_t t) { convert_token(t); });
      team.share(1, panels_ ? n_panels(kernels_, x_) : 0, [&](int64_t p) { pack(p); });
    }
    team.share(serial ? 0 : 2, all_tiles, [&](int64_t index) {
      int i = 0;
      for (; index >= n_tiles(i); ++i) index -= n_tiles(i);
      tile(matrices_[i], index, scratch_[thread], y[i]);
    });
  });
}

}  // namespace

bool is_valid_matrix(const cpux_matrix& matrix) {
  return matrix.weight_format >= kFp32 && matrix.weight_format <= kInt4 && matrix.rows > 0 &&
         matrix.cols > 0 && matrix.w != nullptr &&
         has_scales(matrix.weight_format) == (matrix.scale != nullptr);
}

void run_linears(const Kernels& kernels, int threads, const cpux_matrix* const* matrices,
                 int n_matrices, const void* x, bool is_bf16, int64_t n_tokens, void* const* y) {
  const int64_t cols = matrices[0]->cols;
  const int64_t step = std::max<int64_t>(kMaxPanelTokens, kChunkBytes / (8 * cols));
  const int64_t element = is_bf16 ? 2 : 4;
  for (int64_t t = 0; t < n_tokens; t += step) {
    void* at[kMostMatrices];
    for (int i = 0; i < n_matrices; ++i)
      at[i] = static_cast<char*>(y[i]) + t * matrices[i]->rows * element;
    Chunk(kernels, threads, matrices, n_matrices, static_cast<const char*>(x) + t * cols * element,
          is_bf16, std::min(step, n_tokens - t))
        .run(at);
  }
}

void run_linear(const Kernels& kernels, int threads, const cpux_matrix& matrix, const void* x,
                bool is_bf16, int64_t n_tokens, void* y) {
  const cpux_matrix* matrices[] = {&matrix};
  run_linears(kernels, threads, matrices, 1, x, is_bf16, n_tokens, &y);
}

}  // namespace cpux

int cpux_linear(int isa, int threads, const cpux_matrix* matrix, const void* x, int is_bf16,
                int64_t n_tokens, void* y) {
  const bool valid = cpux::is_valid_matrix(*matrix) && n_tokens >= 0 &&
                     (n_tokens == 0 || (x != nullptr && y != nullptr));
  return cpux::guarded(isa, threads, valid, [&](const cpux::Kernels& kernels) {
    cpux::run_linear(kernels, threads, *matrix, x, is_bf16 != 0, n_tokens, y);
  });
}
