// The C ABI that library.py declares: raw pointers, no torch headers, one build for every torch.
//
// Functions that take an instruction set and a number of threads return 0, or one of the codes
// below; what a code says about sizes, formats and null pointers is checked, what a pointer points
// to is not. They are thread-safe: each calling thread keeps its own scratch memory, and a pool of
// threads of its own. Arrays are contiguous, in C order.
#pragma once

#include <cstdint>

#define CPUX_EXPORT extern "C" __attribute__((visibility("default")))

enum {
  CPUX_OK = 0,
  CPUX_NO_MEMORY = 1,
  CPUX_UNKNOWN_ISA = 2,
  CPUX_BAD_ARGUMENT = 3,
  CPUX_OUT_OF_RANGE = 4
};

// One layer's experts; field offsets are in bytes from a block's start, -1 where there is none.
struct cpux_layer {
  int32_t weight_format;  // WeightFormat of kernels.h
  int32_t activation;     // ActivationKind of kernels.h
  int32_t has_gate;
  float alpha, limit;  // of the clamped activation
  int64_t hidden_size, intermediate_size;
  int64_t gate_up, gate_up_scale, gate_up_offset, gate_up_bias;
  int64_t down, down_scale, down_offset, down_bias;
  int32_t scale_type, offset_type;  // ScaleType and OffsetType of kernels.h
  int64_t scale_group, scale_rows;  // columns (0: all of them) and rows that share a scale
};

// T tokens and what the router chose for them.
struct cpux_tokens {
  const void* hidden;      // [T, H], bf16 or fp32
  int32_t hidden_is_bf16;
  int64_t n_tokens, top_k, n_experts;
  const int64_t* index;    // [T, K]; a value outside 0..E-1 is skipped
  const float* weight;     // [T, K]
  const int64_t* blocks;   // [E] addresses
  const uint8_t* on_cpu;   // [E]; an expert with 0 is skipped
};

// out [T, H] fp32 = sum over the pairs (t, k) on the CPU of weight * expert(hidden). The same
// bits for the same arguments and instruction set.
CPUX_EXPORT int cpux_run(int isa, int threads, const cpux_layer* layer, const cpux_tokens* tokens,
                         float* out);

// The two passes apart, for an activation that is computed by the caller. Pairs are ordered by
// expert, then token, then position; n_pairs = cpux_count_pairs().
CPUX_EXPORT int64_t cpux_count_pairs(const cpux_tokens* tokens);
// first [n_pairs, R] fp32 = gate_up @ hidden + bias
CPUX_EXPORT int cpux_first(int isa, int threads, const cpux_layer* layer,
                           const cpux_tokens* tokens, float* first);
// out [T, H] = weighted sum of down @ middle + bias; middle [n_pairs, I] fp32
CPUX_EXPORT int cpux_second(int isa, int threads, const cpux_layer* layer,
                            const cpux_tokens* tokens, const float* middle, float* out);

// The steps around one expert's products, for a caller that multiplies in bf16 itself (uint16_t is
// bf16); n tokens of the expert whose block is given. Biases and activation are in fp32.
// middle [n, I] bf16 = activation of first + bias; first [n, R] bf16 = gate_up @ hidden
CPUX_EXPORT int cpux_activate(int isa, int threads, const cpux_layer* layer, const void* block,
                              const uint16_t* first, int64_t n, uint16_t* middle);
// out [T, H] fp32: row token[i] += weight[i] * (y[i] + bias); y [n, H] bf16 = down @ middle
CPUX_EXPORT int cpux_add(int isa, int threads, const cpux_layer* layer, const void* block,
                         const uint16_t* y, const int64_t* token, const float* weight, int64_t n,
                         float* out);

// One matrix: y [T, rows] = x [T, cols] @ w^T + bias, x and y both bf16 or both fp32; bias fp32
// [rows] or null; scale null for fp32 and bf16 weights.
struct cpux_matrix {
  int32_t weight_format;
  int64_t rows, cols;
  const void* w;
  const uint16_t* scale;
  const float* bias;
};
CPUX_EXPORT int cpux_linear(int isa, int threads, const cpux_matrix* matrix, const void* x,
                            int is_bf16, int64_t n_tokens, void* y);

// W [rows, cols], bf16 or fp32, strides in elements, to int8, int4 or mxfp4 (WeightFormat): packed
// [RB, G, 8 or 4, 16, 4] and scales [RB, G, 16], float16 or E8M0. The same bytes on every instruction
// set. CPUX_OUT_OF_RANGE for a weight that is no number or too large for a scale.
struct cpux_weights {
  const void* w;
  int32_t is_bf16;
  int64_t rows, cols, row_stride, col_stride;
};
CPUX_EXPORT int cpux_quantise(int isa, int threads, const cpux_weights* weights, int format,
                              uint8_t* packed, void* scales);
// Levels without a sign [rows, cols], strides in bytes, to the same tiles of 8 or 4 bits, padded with
// level 0.
CPUX_EXPORT int cpux_pack(int isa, int threads, const uint8_t* levels, int64_t rows, int64_t cols,
                          int64_t row_stride, int64_t col_stride, int bits, uint8_t* packed);

// Attention of the last T of a sequence's S tokens: out [B, T, heads, Dv] = softmax(scale q k^T) v over
// the keys. Heads share keys in groups of heads / kv_heads; query, keys, values and out are all bf16 or
// all fp32, sums fp32. A token that sees no key gets zeros. Strides count elements. The same bits for
// the same arguments and instruction set.
struct cpux_attention {
  int32_t is_bf16;
  int64_t n_batch, n_heads, n_kv_heads, n_queries, n_keys, key_size, value_size;
  float scale;
  float softcap;        // scores become softcap * tanh(score / softcap); 0: they do not
  const float* sinks;   // [heads] scores of a key without a value, which every token sees; or null
  const void* query;    // [B, heads, T, Dk]; strides of sequence, head and token
  const void* keys;     // [B, kv_heads, S, Dk], rows contiguous; strides of sequence and head
  const void* values;   // [B, kv_heads, S, Dv], the same
  int64_t query_strides[3], key_strides[2], value_strides[2];
  const uint8_t* mask;  // [B, T, S], rows contiguous, 1: seen, 0: left out; strides of sequence and token
  int64_t mask_strides[2];  // null: token t sees the keys up to S - T + t
};
CPUX_EXPORT int cpux_attend(int isa, int threads, const cpux_attention* attention, void* out);

// RMSNorm of [n_rows, width]: x and y both bf16 or both fp32. Computed by the calling thread.
struct cpux_norm {
  int32_t form;  // NormForm of norm.cpp
  int32_t weight_is_bf16;  // else fp32
  float epsilon;
  int64_t width;
  const void* weight;  // [width]
};
CPUX_EXPORT int cpux_rms_norm(int isa, int threads, const cpux_norm* norm, const void* x,
                              int is_bf16, int64_t n_rows, void* y);

// Rotary embedding of one token per sequence, all bf16: y = x cos + rotate_half(x) sin, each product
// rounded; x and y [B, heads, width], cos and sin [B, width]. Computed by the calling thread.
CPUX_EXPORT int cpux_rotate(int isa, int threads, const uint16_t* x, const uint16_t* cos,
                            const uint16_t* sin, int64_t n_batch, int64_t n_heads, int64_t width,
                            uint16_t* y);

// A decoder layer's step up to its experts, for one new token of each sequence, all bf16:
//   sum = x + output(attention of the norm of x), normed = `after` of sum; both [B, width of x].
// Queries and keys are normed where there are norms, then rotated; keys and values of the new token
// are written behind those before it. What the functions above give one by one, bit for bit.
struct cpux_attention_step {
  const cpux_norm *before, *query_norm, *key_norm, *after;      // query_norm and key_norm or null
  const cpux_matrix *query, *key, *value, *output;              // without biases
  int64_t n_heads, n_kv_heads, head_size;
  float scale;
  uint16_t* keys;    // [B, kv_heads, S, D], rows contiguous; strides of sequence and head
  uint16_t* values;  // the same
  int64_t key_strides[2], value_strides[2];
  int64_t n_keys;    // S, the new token's with them
};
CPUX_EXPORT int cpux_attend_step(int isa, int threads, const cpux_attention_step* step,
                                    const uint16_t* x, const uint16_t* cos, const uint16_t* sin,
                                    int64_t n_batch, uint16_t* sum, uint16_t* normed);

// A router: logits [T, E] = x @ w^T + bias in x's type, the k largest of their softmax in order, and
// with `normalise` divided by their sum. scores [T, k], index [T, k].
struct cpux_router {
  cpux_matrix matrix;  // [E, H]
  int32_t is_bf16;     // x and logits; else fp32
  int32_t scores_are_bf16;
  int32_t normalise;
  int64_t top_k;
};
CPUX_EXPORT int cpux_route(int isa, int threads, const cpux_router* router, const void* x,
                           int64_t n_tokens, void* logits, void* scores, int64_t* index);

// Instruction sets of this build, from scalar (0) upwards.
CPUX_EXPORT int cpux_n_isas(void);
CPUX_EXPORT const char* cpux_isa_name(int isa);
CPUX_EXPORT int cpux_isa_supported(int isa);

// Restricts worker threads to cpus[i], one each, and the calling thread to all of `cpus`.
CPUX_EXPORT int cpux_pin_threads(const int32_t* cpus, int n_cpus);

// zlib's CRC-32 of 64 bytes or a multiple of it; CPUX_UNKNOWN_ISA where the CPU does not multiply
// without carries, for zlib is as fast there.
CPUX_EXPORT int cpux_crc32(const void* data, int64_t bytes, uint32_t* crc);

// What the machine can do: seconds to read `bytes` from `data` once, in chunks that the threads
// take as they come; flop/s of independent multiply-adds in registers, never 0.
CPUX_EXPORT int cpux_read(int isa, int threads, const void* data, int64_t bytes, double* seconds);
CPUX_EXPORT int cpux_multiply_add(int isa, int threads, double seconds, double* flops_per_s);
