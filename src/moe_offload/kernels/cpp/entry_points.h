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

// cpux_attend for several tokens of each sequence; throws std::bad_alloc. prompt_attention.cpp
void attend_prompt(const Kernels& kernels, int threads, const cpux_attention& attention,
                   Arena& arena, void* out);

}  // namespace cpux
