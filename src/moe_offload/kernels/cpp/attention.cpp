// Attention of one new token per sequence over the keys and values as the cache holds them.
//
// The keys of a sequence and head are cut into chunks, so that a long context is shared by all
// threads: each chunk computes its scores, their exponentials and its part of the weighted sum of
// values for all heads that share the keys, block by block while a block stays in the first-level
// cache. A second pass adds the chunks in order, so the result has the same bits whichever thread
// took which chunk. Sums are fp32.
#include <algorithm>
#include <cmath>

#include "entry_points.h"
#include "team.h"

namespace cpux {

namespace {

constexpr int64_t kChunkKeys = 256;
constexpr int64_t kBlockKeys = 64;  // 16 KiB of 128 bf16: all heads read them from the first level

class Attention {
 public:
  Attention(const Kernels& kernels, int threads, const cpux_attention& a, Arena& arena);
  void run(void* out);

 private:
  void chunk(int64_t item, float* scores);
  void combine(int64_t row, float* sum, void* out);

  const Kernels& kernels_;
  const cpux_attention& a_;
  const int threads_;
  const int64_t group_, n_chunks_, n_rows_;  // heads that share keys; chunks of keys; B * heads
  float* query_;    // [B, heads, Dk]
  float* largest_;  // [B * heads, chunks]
  float* total_;    // [B * heads, chunks]
  float* partial_;  // [B * heads, chunks, Dv]
  float** scores_;  // per thread [group, kChunkKeys]
  float** sum_;     // per thread [Dv]
};

Attention::Attention(const Kernels& kernels, int threads, const cpux_attention& a, Arena& arena)
    : kernels_(kernels),
      a_(a),
      threads_(threads),
      group_(a.n_heads / a.n_kv_heads),
      n_chunks_((a.n_keys + kChunkKeys - 1) / kChunkKeys),
      n_rows_(a.n_batch * a.n_heads),
      query_(arena.take<float>(n_rows_ * a.key_size)),
      largest_(arena.take<float>(n_rows_ * n_chunks_)),
      total_(arena.take<float>(n_rows_ * n_chunks_)),
      partial_(arena.take<float>(n_rows_ * n_chunks_ * a.value_size)),
      scores_(arena.take<float*>(threads)),
      sum_(arena.take<float*>(threads)) {
  for (int i = 0; i < threads; ++i) {
    scores_[i] = arena.take<float>(group_ * kChunkKeys);
    sum_[i] = arena.take<float>(a.value_size);
  }
  const int64_t element = a.is_bf16 != 0 ? 2 : 4;
  for (int64_t row = 0; row < n_rows_; ++row) {
    const int64_t at = row / a.n_heads * a.query_strides[0] + row % a.n_heads * a.query_strides[1];
    kernels.to_float(static_cast<const char*>(a.query) + at * element, a.is_bf16 != 0, a.key_size,
                     query_ + row * a.key_size);
  }
}

// One chunk of the keys of one sequence and key head, for every head of its group.
void Attention::chunk(int64_t item, float* scores) {
  const int64_t at = item % n_chunks_;
  const int64_t kv_head = item / n_chunks_ % a_.n_kv_heads;
  const int64_t batch = item / n_chunks_ / a_.n_kv_heads;
  const int64_t first = at * kChunkKeys;
  const int64_t n_keys = std::min(kChunkKeys, a_.n_keys - first);
  const int format = a_.is_bf16 != 0 ? kBf16 : kFp32;
  const int64_t element = a_.is_bf16 != 0 ? 2 : 4;
  const char* keys = static_cast<const char*>(a_.keys) +
                     (batch * a_.key_strides[0] + kv_head * a_.key_strides[1] +
                      first * a_.key_size) * element;
  const char* values = static_cast<const char*>(a_.values) +
                       (batch * a_.value_strides[0] + kv_head * a_.value_strides[1] +
                        first * a_.value_size) * element;
  const uint8_t* mask =
      a_.mask == nullptr ? nullptr : a_.mask + batch * a_.mask_strides[0] + first;
  const int n_heads = static_cast<int>(group_);
  const int64_t first_row = batch * a_.n_heads + kv_head * group_;
  const auto block = [&](int64_t k) { return static_cast<int>(std::min(kBlockKeys, n_keys - k)); };
  const char* after = at + 1 < n_chunks_ ? keys + n_keys * a_.key_size * element : nullptr;
  for (int64_t k = 0; k < n_keys; k += kBlockKeys) {
    const char* block_keys = keys + k * a_.key_size * element;
    const char* next = block_keys + block(k) * a_.key_size * element;
    kernels_.score_keys(block_keys, format, a_.key_size, block(k),
                        k + kBlockKeys < n_keys ? next : values, query_ + first_row * a_.key_size,
                        n_heads, scores + k, kChunkKeys);
  }
  float* partial = partial_ + (first_row * n_chunks_ + at) * a_.value_size;
  const int64_t stride = n_chunks_ * a_.value_size;
  for (int64_t h = 0; h < group_; ++h) {
    float* x = scores + h * kChunkKeys;
    kernels_.adjust_scores(x, n_keys, a_.scale, a_.softcap, mask);
    const int64_t row = (first_row + h) * n_chunks_ + at;
    largest_[row] = kernels_.exponentials(x, n_keys, -INFINITY, total_ + row);
    std::fill(partial + h * stride, partial + h * stride + a_.value_size, 0.0f);
  }
  for (int64_t k = 0; k < n_keys; k += kBlockKeys) {
    const char* block_values = values + k * a_.value_size * element;
    const char* next = block_values + block(k) * a_.value_size * element;
    kernels_.mix_values(block_values, format, a_.value_size, block(k),
                        k + kBlockKeys < n_keys ? next : after, scores + k, kChunkKeys, n_heads,
                        partial, stride);
  }
}

// Adds the chunks of one sequence and head.
void Attention::combine(int64_t row, float* sum, void* out) {
  const float* largest = largest_ + row * n_chunks_;
  const float* total = total_ + row * n_chunks_;
  const float* partial = partial_ + row * n_chunks_ * a_.value_size;
  const float sink = a_.sinks == nullptr ? -INFINITY : a_.sinks[row % a_.n_heads];
  float top = sink;
  for (int64_t c = 0; c < n_chunks_; ++c) top = largest[c] > top ? largest[c] : top;
  std::fill(sum, sum + a_.value_size, 0.0f);
  float denominator = a_.sinks == nullptr ? 0.0f : expf(sink - top);
  for (int64_t c = 0; c < n_chunks_; ++c) {
    if (total[c] == 0.0f) continue;  // every key left out; a NaN is not skipped
    const float factor = largest[c] == top ? 1.0f : expf(largest[c] - top);
    denominator += factor * total[c];
    kernels_.axpy(factor, partial + c * a_.value_size, a_.value_size, sum);
  }
  const float scale = denominator == 0.0f ? 0.0f : 1.0f / denominator;
  for (int64_t i = 0; i < a_.value_size; ++i) sum[i] *= scale;
  if (a_.is_bf16 != 0)
    kernels_.to_bf16(sum, a_.value_size, static_cast<uint16_t*>(out) + row * a_.value_size);
  else
    std::copy(sum, sum + a_.value_size, static_cast<float*>(out) + row * a_.value_size);
}

void Attention::run(void* out) {
  Team team(threads_);
  team.run([&](int thread) {
    team.share(0, a_.n_batch * a_.n_kv_heads * n_chunks_,
               [&](int64_t item) { chunk(item, scores_[thread]); });
    team.share(1, n_rows_, [&](int64_t row) { combine(row, sum_[thread], out); });
  });
}

bool is_valid(const cpux_attention& a) {
  return a.n_batch >= 0 && a.n_heads > 0 && a.n_kv_heads > 0 && a.n_heads % a.n_kv_heads == 0 &&
         a.n_queries >= 0 && a.n_keys >= 0 && a.key_size > 0 && a.value_size > 0 &&
         (a.mask != nullptr || a.n_queries <= a.n_keys || a.n_queries == 1) &&
         (a.n_batch * a.n_queries == 0 || a.query != nullptr) &&
         (a.n_batch == 0 || a.n_keys == 0 || (a.keys != nullptr && a.values != nullptr));
}

}  // namespace

void attend_token(const Kernels& kernels, int threads, const cpux_attention& attention,
                  Arena& arena, void* out) {
  Attention(kernels, threads, attention, arena).run(out);
}

}  // namespace cpux

int cpux_attend(int isa, int threads, const cpux_attention* attention, void* out) {
  const cpux_attention& a = *attention;
  const bool valid = cpux::is_valid(a) && (a.n_batch * a.n_queries == 0 || out != nullptr);
  return cpux::guarded(isa, threads, valid, [&](const cpux::Kernels& kernels) {
    if (a.n_queries == 1)
      cpux::attend_token(kernels, threads, a, cpux::fresh_arena(), out);
    else
      cpux::attend_prompt(kernels, threads, a, cpux::fresh_arena(), out);
  });
}
