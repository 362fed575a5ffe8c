// A softmax router for a few tokens: logits, the k most probable experts, their weights.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "elementwise.h"
#include "entry_points.h"
#include "scratch.h"

namespace cpux {

namespace {

using Choice = std::pair<float, int64_t>;  // probability, expert

// NaN counts as the largest, as torch.topk has it.
bool ahead(const Choice& a, const Choice& b) {
  return (std::isnan(a.first) && !std::isnan(b.first)) || a.first > b.first;
}

// In place; NaN and infinities spread as they do in torch.
void softmax(float* x, int64_t n) {
  float top = -INFINITY;
  for (int64_t i = 0; i < n; ++i) top = x[i] > top || std::isnan(x[i]) ? x[i] : top;
  float sum = 0.0f;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - top);
    sum += x[i];
  }
  for (int64_t i = 0; i < n; ++i) x[i] /= sum;
}

// The k first, in order. Where probabilities are equal, the choice is the same as torch.topk's on
// the CPU: both leave it to the standard library's algorithms.
void choose(Choice* choices, int64_t n, int64_t k) {
  if (k * 64 <= n) {
    std::partial_sort(choices, choices + k, choices + n, ahead);
  } else {
    std::nth_element(choices, choices + k - 1, choices + n, ahead);
    std::sort(choices, choices + k - 1, ahead);
  }
}

bool is_valid(const cpux_router& router) {
  return is_valid_matrix(router.matrix) && router.top_k > 0 && router.top_k <= router.matrix.rows;
}

}  // namespace

}  // namespace cpux

int cpux_route(int isa, int threads, const cpux_router* router, const void* x, int64_t n_tokens,
               void* logits, void* scores, int64_t* index) {
  using namespace cpux;
  const bool is_bf16 = router->is_bf16 != 0;
  const int64_t n_experts = router->matrix.rows, k = router->top_k;
  const bool all = x != nullptr && logits != nullptr && scores != nullptr && index != nullptr;
  const bool valid = is_valid(*router) && n_tokens >= 0 && (n_tokens == 0 || all);
  return guarded(isa, threads, valid, [&](const Kernels& kernels) {
    run_linear(kernels, threads, router->matrix, x, is_bf16, n_tokens, logits);
    Arena& arena = fresh_arena();
    float* row = arena.take<float>(n_experts);
    float* best = arena.take<float>(k);
    Choice* choices = arena.take<Choice>(n_experts);
    for (int64_t t = 0; t < n_tokens; ++t) {
      to_float(static_cast<char*>(logits) + t * n_experts * (is_bf16 ? 2 : 4), is_bf16, n_experts,
               row);
      softmax(row, n_experts);
      for (int64_t e = 0; e < n_experts; ++e) choices[e] = {row[e], e};
      choose(choices, n_experts, k);
      float sum = 0.0f;
      for (int64_t i = 0; i < k; ++i) sum += best[i] = choices[i].first;
      for (int64_t i = 0; i < k; ++i) {
        if (router->normalise != 0) best[i] /= sum;
        index[t * k + i] = choices[i].second;
      }
      if (router->scores_are_bf16 != 0)
        to_bf16(best, k, static_cast<uint16_t*>(scores) + t * k);
      else
        memcpy(static_cast<float*>(scores) + t * k, best, static_cast<size_t>(k) * sizeof(float));
    }
  });
}
