// What every function of api.h goes through, and those that call each other.
#pragma once

#include <new>

#include "api.h"
#include "kernels.h"
#include "scratch.h"

namespace cpux {

// More than any machine has cores for; GCC's runtime dies of tens of thousands.
constexpr int kMostThreads = 1024;

// null when this build or this CPU does not have the instruction set
const Kernels* kernels_of(int isa);

// work(kernels) for arguments that are `valid`, with exceptions kept inside; a code of api.h.
template <class F>
int guarded(int isa, int threads, bool valid, F work) {
  const Kernels* kernels = kernels_of(isa);
  if (kernels == nullptr) return CPUX_UNKNOWN_ISA;
  if (!valid || threads < 1 || threads > kMostThreads) return CPUX_BAD_ARGUMENT;
  try {
    work(*kernels);
  } catch (const std::bad_alloc&) {
    return CPUX_NO_MEMORY;
  }
  return CPUX_OK;
}

// Whether a matrix can be read as it is described; linear.cpp.
bool is_valid_matrix(const cpux_matrix& matrix);
// cpux_linear for arguments that are valid; throws std::bad_alloc.
void run_linear(const Kernels& kernels, int threads, const cpux_matrix& matrix, const void* x,
                bool is_bf16, int64_t n_tokens, void* y);

// The same for several matrices of one format and width, at most kMostMatrices, in one pass over x.
constexpr int kMostMatrices = 3;
void run_linears(const Kernels& kernels, int threads, const cpux_matrix* const* matrices,
                 int n_matrices, const void* x, bool is_bf16, int64_t n_tokens, void* const* y);

// Whether a norm can be computed as it is described; norm.cpp.
bool is_valid_norm(const cpux_norm& norm);
// cpux_rms_norm for arguments that are valid; `scratch` fp32 [2 width].
void norm_rows(const cpux_norm& norm, const void* x, bool is_bf16, int64_t n_rows, float* scratch,
               void* y);
// cpux_rotate for arguments that are valid; rotary.cpp.
void rotate_heads(const uint16_t* x, const uint16_t* cos, const uint16_t* sin, int64_t n_batch,
                  int64_t n_heads, int64_t width, uint16_t* y);

// cpux_attend for one token of each sequence; throws std::bad_alloc. attention.cpp
void attend_token(const Kernels& kernels, int threads, const cpux_attention& attention,
                  Arena& arena, void* out);
// cpux_attend for several tokens of each sequence; throws std::bad_alloc. prompt_attention.cpp
void attend_prompt(const Kernels& kernels, int threads, const cpux_attention& attention,
                   Arena& arena, void* out);

}  // namespace cpux
