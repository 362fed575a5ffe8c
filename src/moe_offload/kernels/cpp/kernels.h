// What one instruction set offers: a table of functions over small pieces of a matrix.
//
// Layout of weights: fp32, bf16 and fp8 (e4m3, finite) are row-major [rows, cols]. int8, int4 and
// mxfp4 are tiles of 16 rows by groups of 32 columns (RB = rows / 16, G = cols / 32, both rounded
// up; activations are zero where columns pad):
//   int8          [RB, G, 8, 16, 4]  row rb*16 + r, column g*32 + s*4 + j at [rb, g, s, r, j]
//   int4, mxfp4   [RB, G, 4, 16, 4]  low nibble of column g*32 + s*4 + j, high nibble of column + 16
// A level is q = u - 128 of int8 as a signed byte and u = q + 8 of int4; mxfp4 is E2M1.
// Scales: below. Accumulation: fp32, bf16 and fp8 weights in fp32. Tiles: exact int32 inside a group
// of 32, then fp32 over groups; mxfp4 for fp32 activations in fp32.
//
// Every function is safe on any alignment unless said otherwise, and thread-safe.
#pragma once

#include <cstddef>
#include <cstdint>

namespace cpux {

enum WeightFormat : int32_t { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3, kMxfp4 = 4, kFp8 = 5 };

// E8M0: 2^(byte - 127).
enum ScaleType : int32_t { kHalfScale = 0, kBf16Scale = 1, kFp32Scale = 2, kE8m0Scale = 3 };
// w = q * scale; (u - zero) * scale, zeros uint8; u * scale + minimum, minima float16.
enum OffsetType : int32_t { kNoOffset = 0, kZeroOffset = 1, kMinimumOffset = 2 };

enum ActivationKind : int32_t {
  kSilu = 0,
  kGelu = 1,
  kGeluTanh = 2,
  kRelu = 3,
  kRelu2 = 4,
  kClampedSwiglu = 5,
};

constexpr int kTileRows = 16;
constexpr int kGroup = 32;
constexpr int kMaxDotTokens = 4;      // tokens that one dot_rows call takes
constexpr int kMaxQuantTokens = 8;    // tokens that one quant_rows call may take
constexpr int kMaxPanelTokens = 64;   // tokens of the widest GEMM panel

constexpr bool is_tiled(int format) { return format >= kInt8 && format <= kMxfp4; }
constexpr bool has_scales(int format) { return format >= kInt8; }

// bytes of one row block's group of 32 columns
constexpr int64_t quant_group_bytes(int format) {
  return format == kInt8 ? kTileRows * kGroup : kTileRows * kGroup / 2;
}
// What an integer product adds to a level so that it has no sign.
constexpr int level_offset(int format) {
  return format == kInt8 ? 128 : format == kInt4 ? 8 : 12;
}
// What the activations of dot_fp8 (up to 2^67) are multiplied by: 2^60, so that no product is subnormal.
constexpr float kFp8Half = 1152921504606846976.0f;

constexpr int64_t scale_bytes(int type) {
  return type == kFp32Scale ? 4 : type == kE8m0Scale ? 1 : 2;
}

// The scales of a matrix: one for `group` columns and `rows` rows. In tiles [RB, S, 16], else
// [rows of the matrix / `rows`, S], S = cols / group, all rounded up; offsets are laid out alike.
struct Scales {
  const uint8_t* data;
  const uint8_t* offsets;  // null without
  int type, offset_type;
  int64_t group, rows;

  int64_t per_row(int64_t cols) const { return (cols + group - 1) / group; }
};

struct Matrix {
  int format;
  int64_t rows, cols;
  const uint8_t* w;
  Scales scales;
  const float* bias;  // [rows] or null
};

// The scales of one row block of tiles, from its group 0.
struct BlockScales {
  const uint8_t* data;
  const uint8_t* offsets;
  int type, offset_type;
  int64_t groups;  // that share one

  // int8 and int4 as we quantise them ourselves: read without asking.
  bool are_plain() const { return type == kHalfScale && offsets == nullptr && groups == 1; }
};

// Weights that come after those being multiplied, as they lie in the matrix: asked for meanwhile.
struct Ahead {
  const void* data;   // null: nothing
  int64_t row_bytes;  // from one row to the next
  int step_bytes;     // k_step weights of a row
};

// Where a product reads on after a row block of tiles, or after rows: weights, and tiles' scales, asked for
// as its own run out. Addresses, for they may lie past a matrix; `w` 0: nothing is asked for.
struct Next {
  uintptr_t w, scales;
};

// Register-blocked matrix product on small panels: c[r][t] (+)= sum_k w[r][k] * x[k][t].
// Vectors run along the tokens, so a weight is a broadcast and needs no transposition.
//   weight panel      [rows][depth]                        element type below
//   activation panel  [depth / k_step][width][k_step]      width: a multiple of `lanes`, <= panel_tokens
//   c                 fp32 [rows][width]
// A few tokens more than whole vectors make a narrow panel, [width][columns], whose vectors run along
// the columns: no lane is lost to padding.
struct Gemm {
  int element_bytes;  // 4: fp32; 2: bf16
  int k_step;         // columns that one instruction multiplies: 1 for fp32, 2 for bf16 pairs
  int lanes;          // tokens in one vector
  int panel_tokens;   // tokens of a full panel
  // Copies rows [row, row + rows) and columns [k, k + depth) of a matrix into a weight panel,
  // scaled and widened as needed; columns past `valid` become zero (valid <= depth).
  void (*load_weights)(const Matrix& m, int64_t row, int64_t k, int rows, int depth, int valid,
                       void* panel);
  void (*multiply)(const void* w_panel, int rows, int depth, const void* x_panel, int width,
                   bool accumulate, const Ahead& ahead, float* c);
  int narrow_tokens;  // tokens of the widest narrow panel, < lanes; 0: none
  // The same for a narrow panel; x_stride: elements from one token to the next.
  void (*multiply_narrow)(const void* w_panel, int rows, int depth, const void* x, int64_t x_stride,
                          int width, bool accumulate, const Ahead& ahead, float* c);
};

// Activations of products over tiles: int8 in groups of 32 with one fp32 scale, per token, and the
// sum of the group times minus level_offset, as the integer product may start from it: an int32, or
// one int16 for columns 0 and 1 of every four and one for 2 and 3.
struct QuantFormat {
  int value_bytes;   // bytes per group of 32: 32 (int8) or 64 (int16 pairs)
  int block_tokens;  // tokens that one quant_rows call takes, <= kMaxQuantTokens
};

struct Kernels {
  const char* name;

  // y[t*ldy + r] = sum_k w[r, k] * x[t][k], t < n_tokens <= kMaxDotTokens, r < rows.
  // `next`: the rows that are read next.
  void (*dot_rows)(const void* w, int format, int64_t cols, int rows, uintptr_t next,
                   const float* const* x, int n_tokens, float* y, int64_t ldy);

  // The same for rows [row, row + rows) of an fp8 matrix; x: the activations times kFp8Half.
  void (*dot_fp8)(const Matrix& m, int64_t row, int rows, uintptr_t next, const float* const* x,
                  int n_tokens, float* y, int64_t ldy);

  // Attention of one token for heads that share keys [n_keys, cols] or values; formats as in dot_rows.
  // `next`: what is read next, of as many bytes, asked for meanwhile; null: nothing.
  // y[h*ldy + k] = sum_d keys[k, d] * query[h*cols + d]
  void (*score_keys)(const void* keys, int format, int64_t cols, int n_keys, const void* next,
                     const float* query, int n_heads, float* y, int64_t ldy);
  // y[h*ldy + d] += sum_k weight[h*ldw + k] * values[k, d]
  void (*mix_values)(const void* values, int format, int64_t cols, int n_keys, const void* next,
                     const float* weight, int64_t ldw, int n_heads, float* y, int64_t ldy);

  Gemm gemm;              // fp32 panels, exact widening of bf16
  Gemm gemm_bf16;         // bf16 panels; element_bytes 0 where the instruction is missing
  int gemm_min_tokens;    // from this many tokens on, gemm beats dot_rows (measured)

  QuantFormat quant[3];   // int8, int4, mxfp4
  // One group of 32 values (`valid` of them present, the rest zero) to `values` (value_bytes of
  // `format`), *scale and *start. A group with a NaN or an infinity gets a NaN scale.
  void (*quantize_group)(const float* x, int valid, int format, void* values, float* scale,
                         int32_t* start);
  // One block of 16 rows, groups [g0, g1) of it, n_tokens <= block_tokens tokens:
  // y[t*ldy + r] (+)= sum over groups. values [G][n_tokens][value_bytes], scales and starts
  // [G][n_tokens]; w points to the row block's group 0.
  void (*quant_rows)(int format, const uint8_t* w, const BlockScales& w_scales, const Next& next,
                     int64_t g0, int64_t g1, const void* values, const float* scales, const int32_t* starts, int n_tokens,
                     bool accumulate, float* y, int64_t ldy);

  // dst[i] = src[i]; src is bf16 when `is_bf16`, else fp32.
  void (*to_float)(const void* src, bool is_bf16, int64_t n, float* dst);
  // dst[i] = src[i], to nearest even, NaN kept
  void (*to_bf16)(const float* src, int64_t n, uint16_t* dst);
  // out[i] = act(gate[i]) * up[i]; up is null for a gateless expert. out may be gate.
  void (*activate)(int kind, float alpha, float limit, const float* gate, const float* up,
                   int64_t n, float* out);
  // x[i] *= scale, then cap * tanh(x[i] / cap) where cap > 0; -infinity where mask[i] is 0 (mask or null)
  void (*adjust_scores)(float* x, int64_t n, float scale, float cap, const uint8_t* mask);
  // x[i] = e^(x[i] - top), 0 for -infinity; returns top = max(least, x[i]...), and the sum in *sum
  float (*exponentials)(float* x, int64_t n, float least, float* sum);
  // out[i] += weight * y[i]
  void (*axpy)(float weight, const float* y, int64_t n, float* out);

  // x [32][16], columns of a tile, to int8, int4 or mxfp4: its packed bytes and 16 scales, float16 or
  // E8M0; false where a weight is out of range.
  bool (*quantise_tile)(int format, const float* x, uint8_t* packed, void* scales);

  // What the machine can do with this instruction set, for benchmarks and calibration.
  uint64_t (*read_bytes)(const void* data, int64_t bytes);  // a checksum, so the loads stay
  double (*fma_flops)(int64_t iterations, float* sink);     // flops done by one thread
};

// The variants. Each table, and the code that builds it, may run only where the CPU has the
// instructions. The x86-64 ones exist in an x86-64 build alone.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace cpux
