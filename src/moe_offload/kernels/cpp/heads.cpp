// What attention multiplies, for one new token per sequence: projections, norms of heads, rotary
// positions. Every intermediate value is rounded where a model's own operations round it.
#include <algorithm>

#include "elementwise.h"
#include "entry_points.h"
#include "norm.h"
#include "scratch.h"

namespace cpux {

namespace {

inline float rounded(float value, bool is_bf16) {
  return is_bf16 ? float_of_bf16(bf16_of_float(value)) : value;
}

// y = x cos + rotate_half(x) sin over the first `n` of a head, in place.
void rotate(float* x, const float* cos, const float* sin, int64_t n, bool is_bf16) {
  const int64_t half = n / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    x[i] = rounded(rounded(a * cos[i], is_bf16) + rounded(-b * sin[i], is_bf16), is_bf16);
    x[half + i] = rounded(
        rounded(b * cos[half + i], is_bf16) + rounded(a * sin[half + i], is_bf16), is_bf16);
  }
}

class Heads {
 public:
  Heads(const cpux_heads& a, Arena& arena);
  // x [B, heads * size] after its projection -> y at strides, normed and rotated
  void finish(const void* x, int64_t n_heads, int64_t size, const cpux_norm* norm, bool rotates,
              void* y, const int64_t* strides);

 private:
  const cpux_heads& a_;
  const bool is_bf16_;
  const int64_t element_;
  float* row_;     // [heads * size], the widest
  float* normed_;  // the same as the model's type
  float* scratch_;
  float *cos_, *sin_;
};

Heads::Heads(const cpux_heads& a, Arena& arena)
    : a_(a), is_bf16_(a.is_bf16 != 0), element_(is_bf16_ ? 2 : 4) {
  const int64_t widest = std::max(a.n_heads * a.key_size,
                                  a.n_kv_heads * std::max(a.key_size, a.value_size));
  row_ = arena.take<float>(widest);
  normed_ = arena.take<float>(widest);
  scratch_ = arena.take<float>(widest);
  cos_ = arena.take<float>(a.rotary_size);
  sin_ = arena.take<float>(a.rotary_size);
}

void Heads::finish(const void* x, int64_t n_heads, int64_t size, const cpux_norm* norm,
                   bool rotates, void* y, const int64_t* strides) {
  const int64_t width = n_heads * size;
  for (int64_t t = 0; t < a_.n_batch; ++t) {
    to_float(static_cast<const char*>(x) + t * width * element_, is_bf16_, width, row_);
    if (norm != nullptr) {
      char* normed = reinterpret_cast<char*>(normed_);
      for (int64_t i = 0; i < width; i += norm->width)
        norm_row(*norm, is_bf16_, row_ + i, scratch_, normed + i * element_);
      to_float(normed, is_bf16_, width, row_);
    }
    if (rotates) {
      const int64_t at = t * a_.rotary_stride * element_;
      to_float(static_cast<const char*>(a_.cos) + at, is_bf16_, a_.rotary_size, cos_);
      to_float(static_cast<const char*>(a_.sin) + at, is_bf16_, a_.rotary_size, sin_);
      for (int64_t h = 0; h < n_heads; ++h)
        rotate(row_ + h * size, cos_, sin_, a_.rotary_size, is_bf16_);
    }
    for (int64_t h = 0; h < n_heads; ++h) {
      const int64_t to = t * strides[0] + h * strides[1];
      if (is_bf16_)
        to_bf16(row_ + h * size, size, static_cast<uint16_t*>(y) + to);
      else
        std::copy(row_ + h * size, row_ + (h + 1) * size, static_cast<float*>(y) + to);
    }
  }
}

bool is_valid(const cpux_heads& a) {
  return a.n_batch >= 0 && a.n_heads > 0 && a.n_kv_heads > 0 && a.key_size > 0 &&
         a.value_size > 0 && a.rotary_size >= 0 && a.rotary_size <= a.key_size &&
         a.q != nullptr && a.k != nullptr && a.v != nullptr && is_valid_matrix(*a.q) &&
         is_valid_matrix(*a.k) && is_valid_matrix(*a.v) && a.q->rows == a.n_heads * a.key_size &&
         a.k->rows == a.n_kv_heads * a.key_size && a.v->rows == a.n_kv_heads * a.value_size &&
         (a.q_norm == nullptr || is_valid_norm(*a.q_norm)) &&
         (a.k_norm == nullptr || is_valid_norm(*a.k_norm));
}

}  // namespace

}  // namespace cpux

int cpux_project(int isa, int threads, const cpux_heads* heads, const void* x, void* projected) {
  using namespace cpux;
  const cpux_heads& a = *heads;
  return guarded(isa, threads, is_valid(a), [&](const Kernels& kernels) {
    const bool is_bf16 = a.is_bf16 != 0;
    const int64_t element = is_bf16 ? 2 : 4;
    char* q = static_cast<char*>(projected);
    char* k = q + a.n_batch * a.n_heads * a.key_size * element;
    char* v = k + a.n_batch * a.n_kv_heads * a.key_size * element;
    run_linear(kernels, threads, *a.q, x, is_bf16, a.n_batch, q);
    run_linear(kernels, threads, *a.k, x, is_bf16, a.n_batch, k);
    run_linear(kernels, threads, *a.v, x, is_bf16, a.n_batch, v);
    Heads rows(a, fresh_arena());
    const int64_t query_strides[2] = {a.n_heads * a.key_size, a.key_size};
    rows.finish(q, a.n_heads, a.key_size, a.q_norm, true, q, query_strides);
    rows.finish(k, a.n_kv_heads, a.key_size, a.k_norm, true, a.key, a.key_strides);
    rows.finish(v, a.n_kv_heads, a.value_size, nullptr, false, a.value, a.value_strides);
  });
}
