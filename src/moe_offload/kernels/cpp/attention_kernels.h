// Attention over a vector type V. It gives what float_kernels.h says, and
//    max(a, b) = a > b ? a : b, sum4: the sums of four vectors, registers: their number,
//    times_power(a, b): a times 2 to the integer in b's low bits, at least -126,
//    zero_below(x, least, a): a, but 0 where x < least.
// A new token reads keys and values as a cache holds them, heads that share keys together, so that a
// key is read and widened once for all.
#pragma once

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

// Keys so far ahead, and the next block of values, are asked for into the first level: eight heads on
// a key take as long as reading it, so that what waits for the second level is lost (8,192 keys of
// Qwen3-30B's heads, AVX512: 694 us from there, 554 from the first; 3 KiB ahead 565, 1.5 KiB 559; the
// keys packed into panels as a prompt's are, 1,640).
constexpr int64_t kKeysAheadBytes = 6144;
constexpr int kFirstLevel = 3;  // of __builtin_prefetch

template <class V, class W, int kKeys, int kHeads>
inline void score_block(const W* keys, int64_t cols, const float* query, float* y, int64_t ldy) {
  typename V::Type acc[kKeys][kHeads];
#pragma GCC unroll 8
  for (int k = 0; k < kKeys; ++k)
#pragma GCC unroll 8
    for (int h = 0; h < kHeads; ++h) acc[k][h] = V::zero();
  const uintptr_t next = reinterpret_cast<uintptr_t>(keys) + kKeysAheadBytes;
  for (int64_t line = 0; line < kKeys * cols * static_cast<int64_t>(sizeof(W)); line += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(next + line), 0, kFirstLevel);
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

template <class V, class W, int kKeys, int kHeads>
inline void score_heads(const W* keys, int64_t cols, int n_keys, const float* query, float* y,
                        int64_t ldy) {
  int k = 0;
  for (; k + kKeys <= n_keys; k += kKeys)
    score_block<V, W, kKeys, kHeads>(keys + k * cols, cols, query, y + k, ldy);
  for (; k < n_keys; ++k)
    score_block<V, W, 1, kHeads>(keys + k * cols, cols, query, y + k, ldy);
}

// kHeads heads of the values of kVectors vectors of columns. What lies `ahead` elements on is asked for
// meanwhile, unless that is 0.
template <class V, class W, int kHeads, int kVectors>
inline void mix_columns(const W* values, int64_t cols, int n_keys, int64_t ahead,
                        const float* weight, int64_t ldw, float* y, int64_t ldy) {
  typename V::Type acc[kHeads][kVectors];
#pragma GCC unroll 8
  for (int h = 0; h < kHeads; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) acc[h][v] = V::load(y + h * ldy + v * V::lanes);
  for (int k = 0; k < n_keys; ++k, values += cols) {
    const uintptr_t next = reinterpret_cast<uintptr_t>(values) + ahead * sizeof(W);
    if (ahead != 0)
      for (int line = 0; line < kVectors * V::lanes * static_cast<int>(sizeof(W)); line += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(next + line), 0, kFirstLevel);
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

template <class V, class W, int kHeads, int kVectors>
inline void mix_heads(const W* values, int64_t cols, int n_keys, const float* weight, int64_t ldw,
                      float* y, int64_t ldy) {
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(W));
  int64_t c = 0;
  for (; c + kVectors * V::lanes <= cols; c += kVectors * V::lanes)
    mix_columns<V, W, kHeads, kVectors>(values + c, cols, n_keys,
                                        c % kLine < kVectors * V::lanes ? n_keys * cols : 0, weight,
                                        ldw, y + c, ldy);
  for (; c + V::lanes <= cols; c += V::lanes)
    mix_columns<V, W, kHeads, 1>(values + c, cols, n_keys, 0, weight, ldw, y + c, ldy);
  for (; c < cols; ++c)
    for (int h = 0; h < kHeads; ++h)
      for (int k = 0; k < n_keys; ++k)
        y[h * ldy + c] += weight[h * ldw + k] * scalar_weight(values + k * cols + c);
}

// As many heads as the registers hold sums of, for all that there are.
template <class V, class W>
inline void score_keys_of(const W* keys, int64_t cols, int n_keys, const float* query, int n_heads,
                          float* y, int64_t ldy) {
  constexpr bool kWide = V::registers == 32;
  int h = 0;
  const auto next = [&](int n) { return h + n <= n_heads; };
  const auto q = [&] { return query + h * cols; };
  const auto out = [&] { return y + h * ldy; };
  if constexpr (kWide)
    for (; next(8); h += 8) score_heads<V, W, 3, 8>(keys, cols, n_keys, q(), out(), ldy);
  for (; next(4); h += 4) score_heads<V, W, kWide ? 4 : 3, 4>(keys, cols, n_keys, q(), out(), ldy);
  for (; next(2); h += 2) score_heads<V, W, 4, 2>(keys, cols, n_keys, q(), out(), ldy);
  for (; next(1); ++h) score_heads<V, W, 8, 1>(keys, cols, n_keys, q(), out(), ldy);
}

template <class V>
inline void score_keys(const void* keys, int format, int64_t cols, int n_keys, const float* query,
                       int n_heads, float* y, int64_t ldy) {
  if (format == kBf16)
    score_keys_of<V>(static_cast<const uint16_t*>(keys), cols, n_keys, query, n_heads, y, ldy);
  else
    score_keys_of<V>(static_cast<const float*>(keys), cols, n_keys, query, n_heads, y, ldy);
}

template <class V, class W>
inline void mix_values_of(const W* values, int64_t cols, int n_keys, const float* weight,
                          int64_t ldw, int n_heads, float* y, int64_t ldy) {
  constexpr bool kWide = V::registers == 32;
  int h = 0;
  const auto next = [&](int n) { return h + n <= n_heads; };
  const auto w = [&] { return weight + h * ldw; };
  const auto out = [&] { return y + h * ldy; };
  if constexpr (kWide)
    for (; next(8); h += 8) mix_heads<V, W, 8, 2>(values, cols, n_keys, w(), ldw, out(), ldy);
  for (; next(4); h += 4)
    mix_heads<V, W, 4, kWide ? 4 : 2>(values, cols, n_keys, w(), ldw, out(), ldy);
  for (; next(2); h += 2) mix_heads<V, W, 2, 4>(values, cols, n_keys, w(), ldw, out(), ldy);
  for (; next(1); ++h) mix_heads<V, W, 1, 4>(values, cols, n_keys, w(), ldw, out(), ldy);
}

template <class V>
inline void mix_values(const void* values, int format, int64_t cols, int n_keys,
                       const float* weight, int64_t ldw, int n_heads, float* y, int64_t ldy) {
  if (format == kBf16)
    mix_values_of<V>(static_cast<const uint16_t*>(values), cols, n_keys, weight, ldw, n_heads, y,
                     ldy);
  else
    mix_values_of<V>(static_cast<const float*>(values), cols, n_keys, weight, ldw, n_heads, y, ldy);
}

}  // namespace
}  // namespace cpux
