// A decoder layer's step up to its experts, in one call: between two layers' experts the caches
// hold weights, and each call from Python costs several times what it computes here.
#include <algorithm>
#include <cstring>

#include "elementwise.h"
#include "entry_points.h"

namespace cpux {

namespace {

// What outlives the parts' own memory.
Arena& step_arena() {
  static thread_local Arena arena;
  arena.reset();
  return arena;
}

class Step {
 public:
  Step(const Kernels& kernels, int threads, const cpux_attention_step& step, int64_t n_batch);
  void run(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* sum,
           uint16_t* normed);

 private:
  void project(const uint16_t* x);
  void place(uint16_t* heads, const cpux_norm* norm, int64_t n_heads, const uint16_t* cos,
             const uint16_t* sin);
  void append(const uint16_t* heads, const int64_t* strides, uint16_t* cache);
  void attend();
  void add(const uint16_t* x, uint16_t* sum);

  const Kernels& kernels_;
  const int threads_;
  const cpux_attention_step& step_;
  const int64_t n_batch_, width_;
  Arena& arena_;
  float* scratch_;                             // of a norm
  uint16_t *normed_, *query_, *key_, *value_;  // [B, width], [B, heads, D]
  uint16_t *attended_, *output_;               // [B, heads, D], [B, width]
};

Step::Step(const Kernels& kernels, int threads, const cpux_attention_step& step, int64_t n_batch)
    : kernels_(kernels),
      threads_(threads),
      step_(step),
      n_batch_(n_batch),
      width_(step.before->width),
      arena_(step_arena()) {
  const auto take = [&](int64_t columns) { return arena_.take<uint16_t>(n_batch * columns); };
  scratch_ = arena_.take<float>(2 * std::max(width_, step.query->rows));
  normed_ = take(width_);
  query_ = take(step.query->rows);
  key_ = take(step.key->rows);
  value_ = take(step.value->rows);
  attended_ = take(step.output->cols);
  output_ = take(width_);
}

void Step::project(const uint16_t* x) {
  const cpux_matrix* matrices[] = {step_.query, step_.key, step_.value};
  void* y[] = {query_, key_, value_};
  const int format = step_.query->weight_format;
  if (step_.key->weight_format == format && step_.value->weight_format == format) {
    run_linears(kernels_, threads_, matrices, 3, x, true, n_batch_, y);
    return;
  }
  for (int i = 0; i < 3; ++i)
    run_linear(kernels_, threads_, *matrices[i], x, true, n_batch_, y[i]);
}

// Norms and rotates heads in place.
void Step::place(uint16_t* heads, const cpux_norm* norm, int64_t n_heads, const uint16_t* cos,
                 const uint16_t* sin) {
  const int64_t n = n_batch_ * n_heads * step_.head_size;
  if (norm != nullptr) norm_rows(*norm, heads, true, n / norm->width, scratch_, heads);
  rotate_heads(heads, cos, sin, n_batch_, n_heads, step_.head_size, heads);
}

// Writes the new token behind the others.
void Step::append(const uint16_t* heads, const int64_t* strides, uint16_t* cache) {
  const int64_t size = step_.head_size;
  for (int64_t i = 0; i < n_batch_ * step_.n_kv_heads; ++i) {
    const int64_t sequence = i / step_.n_kv_heads, head = i % step_.n_kv_heads;
    uint16_t* rows = cache + sequence * strides[0] + head * strides[1];
    memcpy(rows + (step_.n_keys - 1) * size, heads + i * size,
           static_cast<size_t>(size) * sizeof(uint16_t));
  }
}

void Step::attend() {
  cpux_attention attention = {};
  attention.is_bf16 = 1;
  attention.n_batch = n_batch_;
  attention.n_heads = step_.n_heads;
  attention.n_kv_heads = step_.n_kv_heads;
  attention.n_queries = 1;
  attention.n_keys = step_.n_keys;
  attention.key_size = attention.value_size = step_.head_size;
  attention.scale = step_.scale;
  attention.query = query_;
  attention.keys = step_.keys;
  attention.values = step_.values;
  attention.query_strides[0] = step_.n_heads * step_.head_size;
  attention.query_strides[1] = attention.query_strides[2] = step_.head_size;
  std::copy(step_.key_strides, step_.key_strides + 2, attention.key_strides);
  std::copy(step_.value_strides, step_.value_strides + 2, attention.value_strides);
  attend_token(kernels_, threads_, attention, fresh_arena(), attended_);
}

// sum = x + output_, rounded once
void Step::add(const uint16_t* x, uint16_t* sum) {
  for (int64_t i = 0; i < n_batch_ * width_; ++i)
    sum[i] = bf16_of_float(float_of_bf16(x[i]) + float_of_bf16(output_[i]));
}

void Step::run(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, uint16_t* sum,
               uint16_t* normed) {
  norm_rows(*step_.before, x, true, n_batch_, scratch_, normed_);
  project(normed_);
  place(query_, step_.query_norm, step_.n_heads, cos, sin);
  place(key_, step_.key_norm, step_.n_kv_heads, cos, sin);
  append(key_, step_.key_strides, step_.keys);
  append(value_, step_.value_strides, step_.values);
  attend();
  run_linear(kernels_, threads_, *step_.output, attended_, true, n_batch_, output_);
  add(x, sum);
  norm_rows(*step_.after, sum, true, n_batch_, scratch_, normed);
}

bool is_valid_step(const cpux_attention_step& s) {
  for (const cpux_norm* norm : {s.before, s.after})
    if (norm == nullptr || !is_valid_norm(*norm)) return false;
  for (const cpux_matrix* matrix : {s.query, s.key, s.value, s.output})
    if (matrix == nullptr || !is_valid_matrix(*matrix) || matrix->bias != nullptr) return false;
  const int64_t width = s.before->width;
  const int64_t n_query = s.n_heads * s.head_size, n_key = s.n_kv_heads * s.head_size;
  const auto divides = [](const cpux_norm* norm, int64_t columns) {
    return norm == nullptr || (is_valid_norm(*norm) && columns % norm->width == 0);
  };
  return s.n_kv_heads > 0 && s.n_heads > 0 && s.n_heads % s.n_kv_heads == 0 && s.head_size > 0 &&
         s.head_size % 2 == 0 && s.after->width == width && s.query->rows == n_query &&
         s.key->rows == n_key && s.value->rows == n_key && s.output->rows == width &&
         s.query->cols == width && s.key->cols == width && s.value->cols == width &&
         s.output->cols == n_query && divides(s.query_norm, n_query) &&
         divides(s.key_norm, n_key) && s.keys != nullptr && s.values != nullptr && s.n_keys > 0;
}

}  // namespace

}  // namespace cpux

int cpux_attend_step(int isa, int threads, const cpux_attention_step* step,
                        const uint16_t* x, const uint16_t* cos, const uint16_t* sin,
                        int64_t n_batch, uint16_t* sum, uint16_t* normed) {
  const bool valid = cpux::is_valid_step(*step) && n_batch > 0 && x != nullptr &&
                     cos != nullptr && sin != nullptr && sum != nullptr && normed != nullptr;
  return cpux::guarded(isa, threads, valid, [&](const cpux::Kernels& kernels) {
    cpux::Step(kernels, threads, *step, n_batch).run(x, cos, sin, sum, normed);
  });
}
