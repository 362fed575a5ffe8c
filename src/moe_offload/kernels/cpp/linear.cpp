// One matrix for T tokens: the experts' product with a single pass and no activation.
#include <algorithm>
#include <cstring>

#include "entry_points.h"
#include "product.h"
#include "team.h"

namespace cpux {

namespace {

constexpr int64_t kSerialTokens = 4;
constexpr int64_t kChunkBytes = 64 << 20;

// n tokens, few enough for the scratch of one chunk.
class Chunk {
 public:
  Chunk(const Kernels& kernels, int threads, const cpux_matrix& matrix, const void* x,
        bool is_bf16, int64_t n);
  void run(void* y);

 private:
  void convert_token(int64_t t);
  void pack(int64_t panel);
  void tile(int64_t index, const Scratch& s, void* y);

  const Kernels& kernels_;
  const int threads_;
  const Matrix matrix_;
  const char* x_in_;
  const bool is_bf16_;
  const int64_t n_;
  Arena& arena_;
  const Activations x_;
  const bool panels_;
  const int64_t tile_;
  float* rows_;  // fp32 [n, cols]
  Scratch* scratch_;
};

Chunk::Chunk(const Kernels& kernels, int threads, const cpux_matrix& matrix, const void* x,
             bool is_bf16, int64_t n)
    : kernels_(kernels),
      threads_(threads),
      matrix_{matrix.weight_format, matrix.rows, matrix.cols,
              static_cast<const uint8_t*>(matrix.w),
              {reinterpret_cast<const uint8_t*>(matrix.scale), nullptr, kHalfScale, kNoOffset,
               kGroup, 1},
              matrix.bias},
      x_in_(static_cast<const char*>(x)),
      is_bf16_(is_bf16),
      n_(n),
      arena_(fresh_arena()),
      x_(allocate(kernels, choose_form(kernels, matrix.weight_format, n, !is_bf16),
                  matrix.weight_format, n, matrix.cols, arena_)),
      panels_(is_panels(x_.form)),
      tile_(panels_ ? kPanelTile : kDotTile),
      rows_(arena_.take<float>(n * matrix.cols)),
      scratch_(allocate_scratch(threads, n, tile_, arena_)) {}

void Chunk::convert_token(int64_t t) {
  float* row = rows_ + t * matrix_.cols;
  kernels_.to_float(x_in_ + t * matrix_.cols * (is_bf16_ ? 2 : 4), is_bf16_, matrix_.cols, row);
  if (x_.form == Form::kDot) x_.rows[t] = row;
  if (x_.form == Form::kQuantised) quantise(kernels_, x_, t, 0, matrix_.cols, row);
}

void Chunk::pack(int64_t panel) {
  const Panel p = panel_of(kernels_, x_, panel);
  const float* rows[kMaxPanelTokens];
  for (int64_t t = 0; t < p.tokens; ++t) rows[t] = rows_ + (p.first + t) * matrix_.cols;
  pack_panel(kernels_, x_, panel, rows);
}

void Chunk::tile(int64_t index, const Scratch& s, void* y) {
  const int64_t r0 = index * tile_;
  const int64_t r1 = std::min(r0 + tile_, matrix_.rows);
  const int offset = product(kernels_, matrix_, x_, r0, r1, s.c, s);
  for_each_token(kernels_, x_, r1 - r0, offset, s, [&](int64_t t, const float* value) {
    const int64_t at = t * matrix_.rows + r0;
    if (is_bf16_)
      kernels_.to_bf16(value, r1 - r0, static_cast<uint16_t*>(y) + at);
    else
      memcpy(static_cast<float*>(y) + at, value, static_cast<size_t>(r1 - r0) * sizeof(float));
  });
}

void Chunk::run(void* y) {
  const bool serial = n_ <= kSerialTokens && !panels_;  // a barrier costs more
  if (serial)
    for (int64_t t = 0; t < n_; ++t) convert_token(t);
  Team team(threads_);
  team.run([&](int thread) {
    if (!serial) {
      team.share(0, n_, [&](int64_t t) { convert_token(t); });
      team.share(1, panels_ ? n_panels(kernels_, x_) : 0, [&](int64_t p) { pack(p); });
    }
    team.share(serial ? 0 : 2, (matrix_.rows + tile_ - 1) / tile_,
               [&](int64_t i) { tile(i, scratch_[thread], y); });
  });
}

}  // namespace

bool is_valid_matrix(const cpux_matrix& matrix) {
  return matrix.weight_format >= kFp32 && matrix.weight_format <= kInt4 && matrix.rows > 0 &&
         matrix.cols > 0 && matrix.w != nullptr &&
         has_scales(matrix.weight_format) == (matrix.scale != nullptr);
}

void run_linear(const Kernels& kernels, int threads, const cpux_matrix& matrix, const void* x,
                bool is_bf16, int64_t n_tokens, void* y) {
  const int64_t step = std::max<int64_t>(kMaxPanelTokens, kChunkBytes / (8 * matrix.cols));
  const int64_t element = is_bf16 ? 2 : 4;
  for (int64_t t = 0; t < n_tokens; t += step)
    Chunk(kernels, threads, matrix, static_cast<const char*>(x) + t * matrix.cols * element,
          is_bf16, std::min(step, n_tokens - t))
        .run(static_cast<char*>(y) + t * matrix.rows * element);
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
