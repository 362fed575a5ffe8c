// Which tokens each CPU expert computes: the router's pairs, grouped.
#pragma once

#include "api.h"
#include "product.h"

namespace cpux {

struct Pair {
  int64_t token;
  float weight;
};

struct Expert {
  const uint8_t* block;
  int64_t n_pairs;
  const Pair* pairs;   // by token, then position
  int64_t first_pair;  // among all experts
  Activations x;       // of its tokens
  Activations middle;  // between its two matrices
};

struct Grouping {
  Expert* experts;
  int64_t n_experts, n_pairs, most_pairs;  // most_pairs: of one expert

  Expert* begin() const { return experts; }
  Expert* end() const { return experts + n_experts; }
};

// Pairs of tokens [t0, t1) whose expert is on the CPU, grouped by ascending expert.
Grouping group_pairs(const cpux_tokens& tokens, int64_t t0, int64_t t1, Arena& arena);

}  // namespace cpux
