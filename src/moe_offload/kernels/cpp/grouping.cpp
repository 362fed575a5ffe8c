#include "grouping.h"

#include <algorithm>

namespace cpux {

namespace {

bool on_cpu(const cpux_tokens& tokens, int64_t expert) {
  return expert >= 0 && expert < tokens.n_experts && tokens.on_cpu[expert] != 0;
}

}  // namespace

Grouping group_pairs(const cpux_tokens& tokens, int64_t t0, int64_t t1, Arena& arena) {
  const int64_t top_k = tokens.top_k;
  int64_t* end = arena.take<int64_t>(tokens.n_experts);  // counts, then where each expert's go
  std::fill(end, end + tokens.n_experts, 0);
  Grouping groups{};
  for (int64_t p = t0 * top_k; p < t1 * top_k; ++p) {
    const int64_t expert = tokens.index[p];
    if (!on_cpu(tokens, expert)) continue;
    groups.n_experts += end[expert]++ == 0;
    ++groups.n_pairs;
  }
  Pair* pairs = arena.take<Pair>(groups.n_pairs);
  groups.experts = arena.take<Expert>(groups.n_experts);
  int64_t first = 0;
  Expert* next = groups.experts;
  for (int64_t e = 0; e < tokens.n_experts; ++e) {
    const int64_t n = end[e];
    end[e] = first;
    if (n == 0) continue;
    *next++ = {reinterpret_cast<const uint8_t*>(tokens.blocks[e]), n, pairs + first, first, {}, {}};
    groups.most_pairs = std::max(groups.most_pairs, n);
    first += n;
  }
  for (int64_t p = t0 * top_k; p < t1 * top_k; ++p) {
    const int64_t expert = tokens.index[p];
    if (on_cpu(tokens, expert)) pairs[end[expert]++] = {p / top_k, tokens.weight[p]};
  }
  return groups;
}

}  // namespace cpux

int64_t cpux_count_pairs(const cpux_tokens* tokens) {
  int64_t n = 0;
  for (int64_t p = 0; p < tokens->n_tokens * tokens->top_k; ++p)
    n += cpux::on_cpu(*tokens, tokens->index[p]);
  return n;
}
