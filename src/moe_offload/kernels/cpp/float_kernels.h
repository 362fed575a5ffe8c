// Products of row-major fp32, bf16 and fp8 weights, over a vector type V; included once per
// instruction set (internal linkage: see elementwise.h).
//
// V: lanes, Type, zero, load, store, broadcast(const float*), fma(a, b, c) = a*b + c, sum,
//    widen(const uint16_t*): lanes bf16 values to fp32, mul, widen_fp8(const uint8_t*, Type[2]): twice
//    as many fp8 values, each times 2^-120.
#pragma once

#include "elementwise.h"

namespace cpux {
namespace {

template <class V>
inline typename V::Type load_weight(const float* w) {
  return V::load(w);
}
template <class V>
inline typename V::Type load_weight(const uint16_t* w) {
  return V::widen(w);
}
inline float scalar_weight(const float* w) { return *w; }
inline float scalar_weight(const uint16_t* w) { return float_of_bf16(*w); }

// How rows are read. Weights are prefetched into the second-level cache: in the first, they would
// push out the activations, which every row reads again (Zen 4, AVX2: 26 against 34 GB/s).
//   one token, activations in half of the first level: one row after another, 6 KiB ahead
//   one token, longer rows: two rows at a time, so that a load of x serves both
//   more tokens: four or three rows at a time, as many as 16 registers hold sums and weights of; a
//   weight is widened once for all tokens of a call, a token's vector loaded once for all rows
// Several rows at a time prefetch whole rows, as many of their steps ahead as 6 KiB take. Distances that are
// multiples of 4 KiB fall on the cache sets in use and are slower. The last rows ask for what is read next.
constexpr int64_t kStreamAheadBytes = 6144;
constexpr int64_t kResidentBytes = 16384;
constexpr int kSecondLevel = 2;  // of __builtin_prefetch

// What a product reads: `rows` rows at w, then those at `next`.
struct Stream {
  uintptr_t w;
  int64_t row_bytes, rows;
  uintptr_t next;

  uintptr_t row(int64_t index) const {
    return index < rows ? w + index * row_bytes : next + (index - rows) * row_bytes;
  }
};

// What rows [first, first + kRows) of a stream ask for meanwhile. As integers: a prefetch may point past
// the matrix, C++ pointers may not.
template <int kRows>
class RowsAhead {
 public:
  RowsAhead(const Stream& stream, int64_t first) {
    const int64_t step = kRows * stream.row_bytes;
    const int64_t steps = (kStreamAheadBytes + (kRows > 1 ? step - 1 : 0)) / step;
    const int64_t shift = kRows > 1 ? 0 : kStreamAheadBytes % step;
    for (int r = 0; r < kRows; ++r) start_[r] = stream.row(first + steps * kRows + r) + shift;
    turn_ = stream.row_bytes - shift;
    then_ = stream.row(first + steps + 1) - turn_;
  }
  void ask(int r, int64_t byte) const {
    const uintptr_t from = kRows == 1 && byte >= turn_ ? then_ : start_[r];
    __builtin_prefetch(reinterpret_cast<const void*>(from + byte), 0, kSecondLevel);
  }

 private:
  uintptr_t start_[kRows], then_;
  int64_t turn_;
};

template <class V, class W, int kRows, int kTokens>
inline void dot_block(const W* w, int64_t cols, const RowsAhead<kRows>& ahead,
                      const float* const* x, float* y, int64_t ldy) {
  constexpr int kUnroll = 4;
  constexpr int kSets = kTokens == 1 ? 4 : 1;  // independent chains of additions
  constexpr int kLineElements = 64 / static_cast<int>(sizeof(W));
  typename V::Type acc[kSets][kRows][kTokens];
  for (int s = 0; s < kSets; ++s)
    for (int r = 0; r < kRows; ++r)
      for (int t = 0; t < kTokens; ++t) acc[s][r][t] = V::zero();
  int64_t k = 0;
  for (; k + kUnroll * V::lanes <= cols; k += kUnroll * V::lanes) {
    for (int r = 0; r < kRows; ++r)
      for (int line = 0; line < kUnroll * V::lanes; line += kLineElements)
        ahead.ask(r, (k + line) * static_cast<int64_t>(sizeof(W)));
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = k + u * V::lanes;
      typename V::Type wv[kRows];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) wv[r] = load_weight<V>(w + r * cols + at);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) {
        const typename V::Type xv = V::load(x[t] + at);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r)
          acc[u % kSets][r][t] = V::fma(wv[r], xv, acc[u % kSets][r][t]);
      }
    }
  }
  for (; k + V::lanes <= cols; k += V::lanes)
    for (int r = 0; r < kRows; ++r) {
      const typename V::Type wv = load_weight<V>(w + r * cols + k);
      for (int t = 0; t < kTokens; ++t)
        acc[0][r][t] = V::fma(wv, V::load(x[t] + k), acc[0][r][t]);
    }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) {
      typename V::Type total = acc[0][r][t];
      for (int s = 1; s < kSets; ++s) total = V::add(total, acc[s][r][t]);
      float sum = V::sum(total);
      for (int64_t tail = k; tail < cols; ++tail)
        sum += scalar_weight(w + r * cols + tail) * x[t][tail];
      y[t * ldy + r] = sum;
    }
}

template <class V, class W, int kRows, int kTokens>
inline void dot_tokens(const W* w, int64_t cols, int from, int rows, uintptr_t next,
                       const float* const* x, float* y, int64_t ldy) {
  const Stream stream{reinterpret_cast<uintptr_t>(w), cols * static_cast<int64_t>(sizeof(W)), rows,
                      next};
  int r = from;
  for (; r + kRows <= rows; r += kRows)
    dot_block<V, W, kRows, kTokens>(w + r * cols, cols, RowsAhead<kRows>(stream, r), x, y + r, ldy);
  if constexpr (kRows > 1) dot_tokens<V, W, 1, kTokens>(w, cols, r, rows, next, x, y, ldy);
}

template <class V, class W>
inline void dot_rows_of(const W* w, int64_t cols, int rows, uintptr_t next, const float* const* x,
                        int n_tokens, float* y, int64_t ldy) {
  switch (n_tokens) {
    case 1:
      if (cols * static_cast<int64_t>(sizeof(float)) <= kResidentBytes)
        return dot_tokens<V, W, 1, 1>(w, cols, 0, rows, next, x, y, ldy);
      return dot_tokens<V, W, 2, 1>(w, cols, 0, rows, next, x, y, ldy);
    case 2: return dot_tokens<V, W, 4, 2>(w, cols, 0, rows, next, x, y, ldy);
    case 3: return dot_tokens<V, W, 3, 3>(w, cols, 0, rows, next, x, y, ldy);
    default: return dot_tokens<V, W, 3, 4>(w, cols, 0, rows, next, x, y, ldy);
  }
}

template <class V>
inline void dot_rows(const void* w, int format, int64_t cols, int rows, uintptr_t next,
                     const float* const* x, int n_tokens, float* y, int64_t ldy) {
  if (format == kBf16)
    dot_rows_of<V>(static_cast<const uint16_t*>(w), cols, rows, next, x, n_tokens, y, ldy);
  else
    dot_rows_of<V>(static_cast<const float*>(w), cols, rows, next, x, n_tokens, y, ldy);
}

// fp8: sums of each scale's columns apart. A scale covers whole pairs of vectors, but for the last.
// widen_fp8 gives 2^-120 of a number: x has half of that made up for (kFp8Half), so that no sum is
// subnormal, the sums the other half. (In the weights, of which the smallest are subnormal, it halves
// the speed of a matrix that has many of those: Zen 5.)
template <class V, int kRows, int kTokens>
inline void fp8_block(const Matrix& m, int64_t row, const RowsAhead<kRows>& ahead,
                      const float* const* x, float* y, int64_t ldy) {
  constexpr int kPair = 2 * V::lanes, kLine = 64;
  constexpr int kSets = kTokens == 1 ? 2 : 1;  // chains of additions
  const int64_t cols = m.cols;
  const uint8_t* w = m.w + row * cols;
  const typename V::Type half = V::broadcast(&kFp8Half);
  typename V::Type total[kRows][kTokens];
  float tail[kRows][kTokens] = {};
  int64_t scale_at[kRows];
  for (int r = 0; r < kRows; ++r) {
    scale_at[r] = (row + r) / m.scales.rows * m.scales.per_row(cols);
    for (int t = 0; t < kTokens; ++t) total[r][t] = V::zero();
  }
  for (int64_t k = 0, group = 0; k < cols; ++group) {
    const int64_t end = k + m.scales.group < cols ? k + m.scales.group : cols;
    typename V::Type acc[kSets][kRows][kTokens];
    for (int s = 0; s < kSets; ++s)
      for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t) acc[s][r][t] = V::zero();
    const auto add_pair = [&](int64_t at) {
      typename V::Type wv[kRows][2];
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) V::widen_fp8(w + r * cols + at, wv[r]);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
          const typename V::Type xv = V::load(x[t] + at + v * V::lanes);
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            typename V::Type& sum = acc[v % kSets][r][t];
            sum = V::fma(wv[r][v], xv, sum);
          }
        }
    };
    for (; k + kLine <= end; k += kLine) {
      for (int r = 0; r < kRows; ++r) ahead.ask(r, k);
#pragma GCC unroll 4
      for (int at = 0; at < kLine; at += kPair) add_pair(k + at);
    }
    for (; k + kPair <= end; k += kPair) add_pair(k);
    float scale[kRows];
    for (int r = 0; r < kRows; ++r) {
      const bool same = r > 0 && scale_at[r] == scale_at[r - 1];
      scale[r] = same ? scale[r - 1]
                      : scale_value(m.scales.data, m.scales.type, scale_at[r] + group);
      const typename V::Type factor = V::broadcast(scale + r);
      for (int t = 0; t < kTokens; ++t) {
        typename V::Type sum = acc[0][r][t];
        if (kSets == 2) sum = V::add(sum, acc[kSets - 1][r][t]);
        total[r][t] = V::fma(V::mul(sum, half), factor, total[r][t]);
      }
    }
    for (; k < end; ++k)  // fewer than a pair
      for (int r = 0; r < kRows; ++r)
        for (int t = 0; t < kTokens; ++t)
          tail[r][t] += float_of_fp8(w[r * cols + k]) * (x[t][k] * (1.0f / kFp8Half)) * scale[r];
  }
  for (int r = 0; r < kRows; ++r)
    for (int t = 0; t < kTokens; ++t) y[t * ldy + r] = V::sum(total[r][t]) + tail[r][t];
}

template <class V, int kRows, int kTokens>
inline void fp8_tokens(const Matrix& m, int64_t row, int from, int rows, uintptr_t next,
                       const float* const* x, float* y, int64_t ldy) {
  const Stream stream{reinterpret_cast<uintptr_t>(m.w) + row * m.cols, m.cols, rows, next};
  int r = from;
  for (; r + kRows <= rows; r += kRows)
    fp8_block<V, kRows, kTokens>(m, row + r, RowsAhead<kRows>(stream, r), x, y + r, ldy);
  if constexpr (kRows > 1)
    if (r < rows) fp8_tokens<V, kRows - 1, kTokens>(m, row, r, rows, next, x, y, ldy);
}

// As many rows at a time as 16 registers hold sums and weights of.
template <class V>
inline void dot_fp8(const Matrix& m, int64_t row, int rows, uintptr_t next, const float* const* x,
                    int n_tokens, float* y, int64_t ldy) {
  switch (n_tokens) {
    case 1: return fp8_tokens<V, 3, 1>(m, row, 0, rows, next, x, y, ldy);
    case 2: return fp8_tokens<V, 3, 2>(m, row, 0, rows, next, x, y, ldy);
    case 3: return fp8_tokens<V, 3, 3>(m, row, 0, rows, next, x, y, ldy);
    default: return fp8_tokens<V, 2, 4>(m, row, 0, rows, next, x, y, ldy);
  }
}

// Columns [k, k + n) of a row of an fp8 matrix, in fp32.
template <class V>
inline void load_fp8_row(const Matrix& m, int64_t row, int64_t k, int64_t n, float* out) {
  const uint8_t* w = m.w + row * m.cols + k;
  const float factor = kFp8Half * kFp8Half;
  const typename V::Type factors = V::broadcast(&factor);
  for (int64_t i = 0; i < n;) {
    const int64_t whole = m.scales.group - (k + i) % m.scales.group;
    const int64_t end = i + whole < n ? i + whole : n;
    const float scale = fp8_scale(m, row, k + i);
    for (; i + 2 * V::lanes <= end; i += 2 * V::lanes) {
      typename V::Type wv[2];
      V::widen_fp8(w + i, wv);
      for (int v = 0; v < 2; ++v)
        V::store(out + i + v * V::lanes, V::mul(V::mul(wv[v], factors), V::broadcast(&scale)));
    }
    for (; i < end; ++i) out[i] = float_of_fp8(w[i]) * scale;
  }
}

// Weight panel of fp32. With one column a step, all of `depth` is valid.
template <class V>
inline void load_weights_fp32(const Matrix& m, int64_t row, int64_t k, int rows, int depth,
                              int valid, void* panel) {
  float* out = static_cast<float*>(panel);
  if (m.format == kMxfp4) return load_mxfp4(m, row, k, rows, depth, valid, out);
  for (int r = 0; r < rows; ++r, out += depth) {
    const int64_t at = (row + r) * m.cols + k;
    if (m.format == kFp8)
      load_fp8_row<V>(m, row + r, k, depth, out);
    else
      to_float(m.w + at * (m.format == kBf16 ? 2 : 4), m.format == kBf16, depth, out);
  }
}

// P: a product over panels: Weight (the element that is broadcast), Vector, lanes,
//    multiply_add(Weight, Vector of x, fp32 accumulator).
// `row`: of the panel, where the block starts.
template <class V, class P, int kVectors, int kRows>
inline void multiply_block(const typename P::Weight* w, int row, int steps,
                           const typename P::Weight* x, bool accumulate, const Ahead& ahead,
                           float* c) {
  constexpr int kWidth = kVectors * V::lanes;
  w += row * steps;
  c += row * kWidth;
  const int line_steps = ahead.data == nullptr ? steps : 64 / ahead.step_bytes;
  uintptr_t next = reinterpret_cast<uintptr_t>(ahead.data) + row * ahead.row_bytes;
  typename V::Type acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      acc[r][v] = accumulate ? V::load(c + r * kWidth + v * V::lanes) : V::zero();
  for (int k = 0; k < steps; next += 64) {
    if (ahead.data != nullptr)
      for (int r = 0; r < kRows; ++r)
        __builtin_prefetch(reinterpret_cast<const void*>(next + r * ahead.row_bytes), 0,
                           kSecondLevel);
    const int line_end = k + line_steps < steps ? k + line_steps : steps;
    for (; k < line_end; ++k) {
      typename P::Vector xv[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) xv[v] = P::load(x + k * kWidth + v * V::lanes);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const typename P::Vector wv = P::broadcast(w + r * steps + k);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) acc[r][v] = P::multiply_add(wv, xv[v], acc[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) V::store(c + r * kWidth + v * V::lanes, acc[r][v]);
}

// Rows in blocks of kRows while they last, then of 4, 2 and 1.
template <class V, class P, int kVectors, int kRows>
inline void multiply_rows(const typename P::Weight* w, int rows, int steps,
                          const typename P::Weight* x, bool accumulate, const Ahead& ahead,
                          float* c) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    multiply_block<V, P, kVectors, kRows>(w, r, steps, x, accumulate, ahead, c);
  if constexpr (kRows > 4)
    for (; r + 4 <= rows; r += 4)
      multiply_block<V, P, kVectors, 4>(w, r, steps, x, accumulate, ahead, c);
  for (; r + 2 <= rows; r += 2)
    multiply_block<V, P, kVectors, 2>(w, r, steps, x, accumulate, ahead, c);
  for (; r < rows; ++r) multiply_block<V, P, kVectors, 1>(w, r, steps, x, accumulate, ahead, c);
}

// As multiply_block with vectors along the columns: c[r][t], rows of `width`, for kTokens rows of x.
template <class V, class P, int kRows, int kTokens>
inline void narrow_block(const typename P::Weight* w, int row, int steps,
                         const typename P::Weight* x, int64_t x_stride, int width, bool accumulate,
                         const Ahead& ahead, float* c) {
  using Weight = typename P::Weight;
  w += row * steps;
  c += row * width;
  const int line_steps = ahead.data == nullptr ? steps : 64 / ahead.step_bytes;
  uintptr_t next = reinterpret_cast<uintptr_t>(ahead.data) + row * ahead.row_bytes;
  typename V::Type acc[kRows][kTokens];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) acc[r][t] = V::zero();
  const auto add = [&](const Weight* wk, int64_t w_stride, const Weight* xk, int64_t stride) {
    typename P::Vector xv[kTokens];
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) xv[t] = P::load(xk + t * stride);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const typename P::Vector wv = P::load(wk + r * w_stride);
#pragma GCC unroll 4
      for (int t = 0; t < kTokens; ++t) acc[r][t] = P::multiply_add(wv, xv[t], acc[r][t]);
    }
  };
  int k = 0;
  for (; k + V::lanes <= steps; next += 64) {
    if (ahead.data != nullptr)
      for (int r = 0; r < kRows; ++r)
        __builtin_prefetch(reinterpret_cast<const void*>(next + r * ahead.row_bytes), 0,
                           kSecondLevel);
    const int line_end = k + line_steps < steps ? k + line_steps : steps;
    for (; k + V::lanes <= line_end; k += V::lanes) add(w + k, steps, x + k, x_stride);
  }
  if (k < steps) {  // the columns that are left, and zeros
    Weight w_end[kRows * V::lanes] = {}, x_end[kTokens * V::lanes] = {};
    const size_t bytes = static_cast<size_t>(steps - k) * sizeof(Weight);
    for (int r = 0; r < kRows; ++r) memcpy(w_end + r * V::lanes, w + r * steps + k, bytes);
    for (int t = 0; t < kTokens; ++t) memcpy(x_end + t * V::lanes, x + t * x_stride + k, bytes);
    add(w_end, V::lanes, x_end, V::lanes);
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int t = 0; t < kTokens; ++t) {
      const float sum = V::sum(acc[r][t]);
      c[r * width + t] = accumulate ? c[r * width + t] + sum : sum;
    }
}

template <class V, class P, int kRows, int kTokens>
inline void narrow_rows(const typename P::Weight* w, int rows, int steps,
                        const typename P::Weight* x, int64_t x_stride, int width, bool accumulate,
                        const Ahead& ahead, float* c) {
  int r = 0;
  for (; r + kRows <= rows; r += kRows)
    narrow_block<V, P, kRows, kTokens>(w, r, steps, x, x_stride, width, accumulate, ahead, c);
  for (; r < rows; ++r)
    narrow_block<V, P, 1, kTokens>(w, r, steps, x, x_stride, width, accumulate, ahead, c);
}

// Any number of tokens, four at a time; rows as many as the registers hold sums of.
template <class V, class P>
inline void narrow_tokens(const typename P::Weight* w, int rows, int steps,
                          const typename P::Weight* x, int64_t x_stride, int width, bool accumulate,
                          Ahead ahead, float* c) {
  for (int t = 0; t < width; t += 4, x += 4 * x_stride, c += 4) {
    switch (width - t) {
      case 1:
        narrow_rows<V, P, 12, 1>(w, rows, steps, x, x_stride, width, accumulate, ahead, c);
        break;
      case 2:
        narrow_rows<V, P, 6, 2>(w, rows, steps, x, x_stride, width, accumulate, ahead, c);
        break;
      case 3:
        narrow_rows<V, P, 4, 3>(w, rows, steps, x, x_stride, width, accumulate, ahead, c);
        break;
      default:
        narrow_rows<V, P, 3, 4>(w, rows, steps, x, x_stride, width, accumulate, ahead, c);
    }
    ahead.data = nullptr;
  }
}

struct Fp32Product {
  // One column per step; `V` gives the vector operations.
  template <class V>
  struct Of {
    using Weight = float;
    using Vector = typename V::Type;
    static Vector load(const float* x) { return V::load(x); }
    static Vector broadcast(const float* w) { return V::broadcast(w); }
    static typename V::Type multiply_add(Vector w, Vector x, typename V::Type acc) {
      return V::fma(w, x, acc);
    }
  };
};

// A plain loop over `data` with eight vectors in flight: what a reader of memory can reach.
template <class V>
inline uint64_t read_bytes(const void* data, int64_t bytes) {
  constexpr int kStep = 8;
  const float* p = static_cast<const float*>(data);
  const int64_t n = bytes / 4;
  typename V::Type acc[kStep];
  for (int s = 0; s < kStep; ++s) acc[s] = V::zero();
  for (int64_t i = 0; i + kStep * V::lanes <= n; i += kStep * V::lanes) {
    const uintptr_t next = reinterpret_cast<uintptr_t>(p + i) + kStreamAheadBytes;
    for (int line = 0; line < kStep * V::lanes * 4; line += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(next + line), 0, kSecondLevel);
#pragma GCC unroll 8
    for (int s = 0; s < kStep; ++s) acc[s] = V::add(acc[s], V::load(p + i + s * V::lanes));
  }
  float sum = 0.0f;
  for (int s = 0; s < kStep; ++s) sum += V::sum(acc[s]);
  return bits_of_float(sum);
}

// Independent multiply-adds in registers: the peak that a GEMM is held against.
template <class V>
inline double fma_flops(int64_t iterations, float* sink) {
  constexpr int kChains = 12;  // latency 4 times two a cycle, and room to spare
  typename V::Type acc[kChains];
  const float factor = 0.999999f;
  const typename V::Type f = V::broadcast(&factor);
  for (int s = 0; s < kChains; ++s) acc[s] = f;
  for (int64_t i = 0; i < iterations; ++i) {
#pragma GCC unroll 12
    for (int s = 0; s < kChains; ++s) acc[s] = V::fma(acc[s], f, f);
  }
  for (int s = 0; s < kChains; ++s) *sink += V::sum(acc[s]);
  return 2.0 * V::lanes * kChains * static_cast<double>(iterations);
}

}  // namespace
}  // namespace cpux
