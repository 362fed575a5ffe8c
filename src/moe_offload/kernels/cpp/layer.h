// The entry points of the kernels' files; see api.h for shapes. They throw std::bad_alloc.
#pragma once

#include "api.h"
#include "kernels.h"

namespace cpux {

void run_layer(const Kernels& kernels, const cpux_layer& layer, const cpux_tokens& tokens,
               int threads, float* out);
void run_first(const Kernels& kernels, const cpux_layer& layer, const cpux_tokens& tokens,
               int threads, float* first);
void run_second(const Kernels& kernels, const cpux_layer& layer, const cpux_tokens& tokens,
                int threads, const float* middle, float* out);
void run_activate(const Kernels& kernels, const cpux_layer& layer, const void* block,
                  const uint16_t* first, int64_t n, int threads, uint16_t* middle);
void run_add(const Kernels& kernels, const cpux_layer& layer, const void* block, const uint16_t* y,
             const int64_t* token, const float* weight, int64_t n, int threads, float* out);
void run_linear(const Kernels& kernels, const cpux_matrix& matrix, const void* x, bool is_bf16,
                int64_t n_tokens, int threads, void* y);
void run_attention(const Kernels& kernels, const cpux_attention& attention, int threads, void* out);
void run_norm(const cpux_norm& norm, const void* x, bool is_bf16, int64_t n_rows, void* y);
void run_router(const Kernels& kernels, const cpux_router& router, const void* x, int64_t n_tokens,
                int threads, void* logits, void* scores, int64_t* index);

}  // namespace cpux
