// Attention over a vector type V. It gives what float_kernels.h says, and
//    max(a, b) = a > b ? a : b, sum4: the sums of four vectors, registers: their number,
//    times_power(a, b): a times 2 to the integer in b's low bits, at least -126,
//    zero_below(x, least, a): a, but 0 where x < least.
// A new token reads keys and values as a cache holds them, heads that share keys together, so that a
// key is read and widened once for all.
#pragma once

#include <algorithm>

#include "float_kernels.h"

namespace cpux {
namespace {

// A term of a softmax: e^x to 2 ulp for x <= 0, exactly 0 below e^-87. NaN stays NaN. x = n ln2 + r,
// degree 6 in r.
template <class V>
inline typename V::Type softmax_term(typename V::Type x) {
  const auto number = [](float value) { return V::broadcast(&value); };
  const typename V::Type round = number(12582912.0f);  // 1.5 * 2^23: the integer lands in the low bits
  const typename V::Type shifted = V::fma(x, number(1.44269504f), round);
  const typename V::Type n = V::add(shifted, number(-12582912.0f));
  typename V::Type r = V::fma(n, number(-0.693359375f), x);
  r = V::fma(n, number(2.12194440e-4f), r);
  typename V::Type p = V::fma(r, number(1.3888889e-3f), number(8.3333333e-3f));
  p = V::fma(p, r, number(4.1666667e-2f));
  p = V::fma(p, r, number(0.16666667f));
  p = V::fma(p, r, number(0.5f));
  p = V::fma(p, r, number(1.0f));
  p = V::fma(p, r, number(1.0f));
  return V::zero_below(x, number(-87.0f), V::times_power(p, shifted));
}

// x[i] becomes e^(x[i] - top), where top, which is returned, is the largest of `least` and all x[i].
// Sums run in kLanes chains: what is left out at the end changes nothing.
template <class V>
inline float exponentials(float* x, int64_t n, float least, float* sum) {
  constexpr int kLanes = 16, kVectors = kLanes / V::lanes;
  const int64_t whole = n / kLanes * kLanes;
  alignas(64) float end[kLanes], lane[kLanes];  // `end`: the last numbers, filled up
  if (whole < n)
    for (int64_t i = 0; i < kLanes; ++i) end[i] = whole + i < n ? x[whole + i] : -INFINITY;
  typename V::Type largest[kVectors], total[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    largest[v] = V::broadcast(&least);
    total[v] = V::zero();
  }
  const auto compare = [&](const float* at) {
    for (int v = 0; v < kVectors; ++v) largest[v] = V::max(V::load(at + v * V::lanes), largest[v]);
  };
  for (int64_t i = 0; i < whole; i += kLanes) compare(x + i);
  if (whole < n) compare(end);
  for (int v = 0; v < kVectors; ++v) V::store(lane + v * V::lanes, largest[v]);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] = lane[i] > lane[i + step] ? lane[i] : lane[i + step];
  const float top = lane[0], shift = top == -INFINITY ? 0.0f : -top;
  const auto add = [&](float* at) {
    for (int v = 0; v < kVectors; ++v) {
      const typename V::Type term =
          softmax_term<V>(V::add(V::load(at + v * V::lanes), V::broadcast(&shift)));
      V::store(at + v * V::lanes, term);
      total[v] = V::add(total[v], term);
    }
  };
  for (int64_t i = 0; i < whole; i += kLanes) add(x + i);
  if (whole < n) {
    add(end);
    memcpy(x + whole, end, static_cast<size_t>(n - whole) * sizeof(float));
  }
  for (int v = 0; v < kVectors; ++v) V::store(lane + v * V::lanes, total[v]);
  for (int step = kLanes / 2; step > 0; step /= 2)
    for (int i = 0; i < step; ++i) lane[i] += lane[i + step];
  *sum = lane[0];
  return top;
}

// What is read next, asked for into the first level: eight heads on a key take as long as reading it, so
// that what waits for the second level is lost. The calls on a block of keys or values ask for shares of
// it: memory works all the time that the block is computed on (Zen 3, AVX2, 32,768 keys of Qwen3-30B's
// heads: 8.7 ms where the first heads ask for all of it, 7.9 so).
class NextBlock {
 public:
  // `row_bytes` for each key of a block of n_keys, in `shares`.
  NextBlock(const void* next, int64_t row_bytes, int n_keys, int64_t shares)
      : at_(reinterpret_cast<uintptr_t>(next)),
        step_(next == nullptr ? 0 : row_bytes / shares),
        share_(step_ * n_keys) {}
  // The share's part that goes with keys [k, k + n).
  void ask(int64_t share, int k, int n) const {
    const uintptr_t from = at_ + share * share_ + k * step_;
    for (int64_t byte = 0; byte < n * step_; byte += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(from + byte), 0, 3);
  }

 private:
  const uintptr_t at_;
  const int64_t step_, share_;
};

template <class V, class W, int kKeys, int kHeads>
inline void score_block(const W* keys, int64_t cols, const float* query, float* y, int64_t ldy) {
  typename V::Type acc[kKeys][kHeads];
#pragma GCC unroll 8
  for (int k = 0; k < kKeys; ++k)
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) acc[k][h] = V::zero();
  int64_t d = 0;
  for (; d + V::lanes <= cols; d += V::lanes) {
    typename V::Type key[kKeys];
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) key[k] = load_weight<V>(keys + k * cols + d);
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const typename V::Type q = V::load(query + h * cols + d);
#pragma GCC unroll 8
      for (int k = 0; k < kKeys; ++k) acc[k][h] = V::fma(key[k], q, acc[k][h]);
    }
  }
  float sum[kKeys][kHeads];
#pragma GCC unroll 8
  for (int k = 0; k < kKeys; ++k) {
    if constexpr (kHeads % 4 == 0) {
#pragma GCC unroll 2
      for (int h = 0; h < kHeads; h += 4)
        V::sum4(acc[k][h], acc[k][h + 1], acc[k][h + 2], acc[k][h + 3], sum[k] + h);
    } else {
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) sum[k][h] = V::sum(acc[k][h]);
    }
  }
  for (; d < cols; ++d)
    for (int k = 0; k < kKeys; ++k)
      for (int h = 0; h < kHeads; ++h)
        sum[k][h] += scalar_weight(keys + k * cols + d) * query[h * cols + d];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 8
    for (int k = 0; k < kKeys; ++k) y[h * ldy + k] = sum[k][h];
}

// Heads h to h + kHeads.
template <class V, class W, int kKeys, int kHeads>
inline void score_heads(const W* keys, int64_t cols, int n_keys, const NextBlock& next, int h,
                        const float* query, float* y, int64_t ldy) {
  query += h * cols;
  y += h * ldy;
  int k = 0;
  for (; k + kKeys <= n_keys; k += kKeys) {
    for (int i = 0; i < kHeads; ++i) next.ask(h + i, k, kKeys);
    score_block<V, W, kKeys, kHeads>(keys + k * cols, cols, query, y + k, ldy);
  }
  for (; k < n_keys; ++k)
    score_block<V, W, 1, kHeads>(keys + k * cols, cols, query, y + k, ldy);
}

// kHeads heads of the values of kVectors vectors of columns; `share` of the next block.
template <class V, class W, int kHeads, int kVectors>
inline void mix_columns(const W* values, int64_t cols, int n_keys, const NextBlock& next,
                        int64_t share, const float* weight, int64_t ldw, float* y, int64_t ldy) {
  typename V::Type acc[kHeads][kVectors];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[h][v] = V::load(y + h * ldy + v * V::lanes);
  for (int k = 0; k < n_keys; ++k, values += cols) {
    next.ask(share, k, 1);
    typename V::Type value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = load_weight<V>(values + v * V::lanes);
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) {
      const typename V::Type factor = V::broadcast(weight + h * ldw + k);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[h][v] = V::fma(factor, value[v], acc[h][v]);
    }
  }
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) V::store(y + h * ldy + v * V::lanes, acc[h][v]);
}

// Heads h to h + kHeads of n_heads.
template <class V, class W, int kHeads, int kVectors>
inline void mix_heads(const W* values, int64_t cols, int n_keys, const void* next_block, int h,
                      int n_heads, const float* weight, int64_t ldw, float* y, int64_t ldy) {
  weight += h * ldw;
  y += h * ldy;
  constexpr int64_t kColumns = kVectors * V::lanes;
  const int64_t calls = cols / kColumns;
  const NextBlock next(next_block, cols * static_cast<int64_t>(sizeof(W)), n_keys,
                       std::max<int64_t>(1, calls * n_heads / kHeads));
  int64_t c = 0;
  for (; c + kColumns <= cols; c += kColumns)
    mix_columns<V, W, kHeads, kVectors>(values + c, cols, n_keys, next,
                                        h / kHeads * calls + c / kColumns, weight, ldw, y + c, ldy);
  const NextBlock nothing(nullptr, 0, 0, 1);
  for (; c + V::lanes <= cols; c += V::lanes)
    mix_columns<V, W, kHeads, 1>(values + c, cols, n_keys, nothing, 0, weight, ldw, y + c, ldy);
  for (; c < cols; ++c)
    for (int i = 0; i < kHeads; ++i)
      for (int k = 0; k < n_keys; ++k)
        y[i * ldy + c] += weight[i * ldw + k] * scalar_weight(values + k * cols + c);
}

// As many heads as the registers hold sums of, for all that there are.
template <class V, class W>
inline void score_keys_of(const W* keys, int64_t cols, int n_keys, const void* next_block,
                          const float* query, int n_heads, float* y, int64_t ldy) {
  constexpr bool kWide = V::registers == 32;
  const NextBlock next(next_block, cols * static_cast<int64_t>(sizeof(W)), n_keys, n_heads);
  int h = 0;
  const auto heads = [&](int n, auto score) {
    for (; h + n <= n_heads; h += n) score(keys, cols, n_keys, next, h, query, y, ldy);
  };
  if constexpr (kWide) heads(8, score_heads<V, W, 3, 8>);
  heads(4, score_heads<V, W, kWide ? 4 : 3, 4>);
  heads(2, score_heads<V, W, 4, 2>);
  heads(1, score_heads<V, W, 8, 1>);
}

template <class V>
inline void score_keys(const void* keys, int format, int64_t cols, int n_keys, const void* next,
                       const float* query, int n_heads, float* y, int64_t ldy) {
  if (format == kBf16)
    score_keys_of<V>(static_cast<const uint16_t*>(keys), cols, n_keys, next, query, n_heads, y, ldy);
  else
    score_keys_of<V>(static_cast<const float*>(keys), cols, n_keys, next, query, n_heads, y, ldy);
}

template <class V, class W>
inline void mix_values_of(const W* values, int64_t cols, int n_keys, const void* next,
                          const float* weight, int64_t ldw, int n_heads, float* y, int64_t ldy) {
  constexpr bool kWide = V::registers == 32;
  int h = 0;
  const auto heads = [&](int n, auto mix) {
    for (; h + n <= n_heads; h += n)
      mix(values, cols, n_keys, next, h, n_heads, weight, ldw, y, ldy);
  };
  if constexpr (kWide) heads(8, mix_heads<V, W, 8, 2>);
  heads(4, mix_heads<V, W, 4, kWide ? 4 : 2>);
  heads(2, mix_heads<V, W, 2, 4>);
  heads(1, mix_heads<V, W, 1, 4>);
}

template <class V>
inline void mix_values(const void* values, int format, int64_t cols, int n_keys, const void* next,
                       const float* weight, int64_t ldw, int n_heads, float* y, int64_t ldy) {
  if (format == kBf16)
    mix_values_of<V>(static_cast<const uint16_t*>(values), cols, n_keys, next, weight, ldw, n_heads,
                     y, ldy);
  else
    mix_values_of<V>(static_cast<const float*>(values), cols, n_keys, next, weight, ldw, n_heads, y,
                     ldy);
}

}  // namespace
}  // namespace cpux
