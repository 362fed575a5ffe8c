// Products of int8, int4 and mxfp4 tiles with int8 activations, over an integer vector type Q; included
// once per instruction set (internal linkage: see elementwise.h).
//
// A 64-byte line of weights is 16 rows x 4 columns, so four activation bytes broadcast to every
// lane give each row its partial sum: no horizontal sum, no permutation.
//
// Q: lanes (rows of one vector), Float, zero_float, to_float, load_half, load_bf16, load_e8m0 and
//    load_bytes(const uint8_t*): so many values as fp32, broadcast(const float*), mul, fma,
//    load_float, store_float, and Product<format>: the integer product of one line, of those at the
//    end, over I: Type and the vector's instructions.
#pragma once

#include <algorithm>
#include <type_traits>

#include "elementwise.h"

namespace cpux {
namespace {

// So many bytes ahead weights are asked for, or a row block where that is less (Qwen3-30B's down: 6 KiB).
constexpr int64_t kQuantAheadBytes = 6144;

// Keeps a running sum in its register: left alone, GCC computes all products of a group first, to
// balance the tree of additions, and spills them (AVX2 int8, 128 tokens: 1.5x slower).
template <class V>
inline void keep(V& sum) {
  asm("" : "+v"(sum));
}

// Q::Product<format>:
//   Sum                   what accumulates inside a group
//   kLines                lines (of 64 bytes) of weights in a group
//   Weights, prepare(const uint8_t*)                     one vector of a line, unpacked
//   add(Sum, Weights, const uint8_t* x, int line)        x: the token's group of activations
//   first(const int32_t* start), finish(Sum) -> int32 per row
//   whole(int32_t start)  minus level_offset times the sum of the group's activations
//   kValueBytes, quantise(x, valid, values, scale, start)   a group of activations, as add reads it
// One vector of scales from number `at` of the row block's 16s on; kPlain: float16.
template <class Q, int kFormat, bool kPlain>
inline typename Q::Float load_scales(const BlockScales& s, int64_t at) {
  if (kFormat == kMxfp4) return Q::load_e8m0(s.data + at);
  const uint8_t* p = s.data + at * (kPlain ? 2 : scale_bytes(s.type));
  if (kPlain || s.type == kHalfScale) return Q::load_half(p);
  if (s.type == kBf16Scale) return Q::load_bf16(p);
  return Q::load_float(reinterpret_cast<const float*>(p));
}

// What is added to a weight q * scale where the group has a zero or a minimum of its own.
template <class Q, int kFormat>
inline typename Q::Float load_offsets(const BlockScales& s, int64_t at, typename Q::Float scale) {
  const float own = level_offset(kFormat), minus = -1.0f;
  if (s.offset_type == kMinimumOffset)  // u * scale + minimum
    return Q::fma(Q::broadcast(&own), scale, Q::load_half(s.offsets + at * 2));
  const auto zero = Q::load_bytes(s.offsets + at);  // (u - zero) * scale
  return Q::mul(Q::fma(Q::broadcast(&minus), zero, Q::broadcast(&own)), scale);
}

template <class Q, int kFormat, bool kPlain, int kTokens>
inline void quant_block(const uint8_t* w, const BlockScales& w_scales, const Next& next,
                        int64_t g0, int64_t g1, const uint8_t* x, const float* scales, const int32_t* starts,
                        bool accumulate, float* y, int64_t ldy) {
  using P = typename Q::template Product<kFormat>;
  constexpr int kVectors = kTileRows / Q::lanes;
  constexpr int64_t kGroupBytes = quant_group_bytes(kFormat);
  constexpr int64_t kScaleBytes = kTileRows * (kFormat == kMxfp4 ? 1 : 2);  // kPlain, of a group
  const int64_t turn = g1 - std::min(kQuantAheadBytes / kGroupBytes, g1 - g0);  // on to `next`
  uintptr_t weights_ahead = reinterpret_cast<uintptr_t>(w) + (g0 + g1 - turn) * kGroupBytes;
  uintptr_t scales_ahead = reinterpret_cast<uintptr_t>(w_scales.data) + (g0 + g1 - turn) * kScaleBytes;
  typename Q::Float total[kTokens][kVectors];
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      total[t][v] = accumulate ? Q::load_float(y + t * ldy + v * Q::lanes) : Q::zero_float();
  int64_t scale_at = kPlain ? g0 : g0 / w_scales.groups;
  int64_t scale_end = kPlain ? 0 : (scale_at + 1) * w_scales.groups;  // its last group and one
  for (int64_t g = g0; g < g1; ++g) {
    const uint8_t* line = w + g * kGroupBytes;
    if (g == turn) {
      weights_ahead = next.w;
      scales_ahead = next.scales;
    }
    if (next.w != 0) {  // into the second level
#pragma GCC unroll 8
      for (int at = 0; at < kGroupBytes; at += 64)
        __builtin_prefetch(reinterpret_cast<const void*>(weights_ahead + at), 0, 2);
      if (kPlain) __builtin_prefetch(reinterpret_cast<const void*>(scales_ahead), 0, 2);
      weights_ahead += kGroupBytes;
      scales_ahead += kScaleBytes;
    }
    const uint8_t* xg = x + g * kTokens * P::kValueBytes;
    const int32_t* start = starts + g * kTokens;
    typename P::Sum sum[kTokens][kVectors];
#pragma GCC unroll 8
    for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[t][v] = P::first(start + t);
#pragma GCC unroll 8
    for (int s = 0; s < P::kLines; ++s) {
      typename P::Weights weights[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) weights[v] = P::prepare(line + s * 64 + v * Q::lanes * 4);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t)
        P::template add<kVectors>(sum[t], weights, xg + t * P::kValueBytes, s);
    }
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      const int64_t at = scale_at * kTileRows + v * Q::lanes;
      const typename Q::Float ws = load_scales<Q, kFormat, kPlain>(w_scales, at);
#pragma GCC unroll 8
      for (int t = 0; t < kTokens; ++t) {
        const typename Q::Float scale = Q::mul(ws, Q::broadcast(scales + g * kTokens + t));
        total[t][v] =
            Q::fma(Q::to_float(P::finish(sum[t][v])), scale, total[t][v]);
      }
      if (!kPlain && w_scales.offsets != nullptr) {
        const typename Q::Float offset = load_offsets<Q, kFormat>(w_scales, at, ws);
        for (int t = 0; t < kTokens; ++t) {
          const float x_sum = static_cast<float>(P::whole(start[t])) * (-1.0f / level_offset(kFormat)) *
                              scales[g * kTokens + t];
          total[t][v] = Q::fma(offset, Q::broadcast(&x_sum), total[t][v]);
        }
      }
    }
    if (kPlain) {
      ++scale_at;
    } else if (g + 1 == scale_end) {
      ++scale_at;
      scale_end += w_scales.groups;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) Q::store_float(y + t * ldy + v * Q::lanes, total[t][v]);
}

template <class Q, int kFormat, bool kPlain, int kTokens>
inline void quant_tokens(const uint8_t* w, const BlockScales& w_scales, const Next& next,
                         int64_t g0, int64_t g1, const uint8_t* x, const float* scales,
                         const int32_t* starts, int n_tokens, bool accumulate, float* y,
                         int64_t ldy) {
  if constexpr (kTokens > 1) {
    if (n_tokens < kTokens)
      return quant_tokens<Q, kFormat, kPlain, kTokens - 1>(w, w_scales, next, g0, g1, x, scales,
                                                           starts, n_tokens, accumulate, y, ldy);
  }
  quant_block<Q, kFormat, kPlain, kTokens>(w, w_scales, next, g0, g1, x, scales, starts,
                                           accumulate, y, ldy);
}

template <class Q>
inline void quant_rows(int format, const uint8_t* w, const BlockScales& w_scales,
                       const Next& next, int64_t g0, int64_t g1, const void* values, const float* scales, const int32_t* starts,
                       int n_tokens, bool accumulate, float* y, int64_t ldy) {
  const auto run = [&](auto tokens) {
    tokens(w, w_scales, next, g0, g1, static_cast<const uint8_t*>(values), scales, starts,
           n_tokens, accumulate, y, ldy);
  };
  constexpr int kTokens = Q::block_tokens;
  if (format == kMxfp4) return run(quant_tokens<Q, kMxfp4, true, kTokens>);
  if (w_scales.are_plain())
    return format == kInt8 ? run(quant_tokens<Q, kInt8, true, kTokens>)
                           : run(quant_tokens<Q, kInt4, true, kTokens>);
  format == kInt8 ? run(quant_tokens<Q, kInt8, false, kTokens>)
                  : run(quant_tokens<Q, kInt4, false, kTokens>);
}

// A group's levels: round(x / scale) in [-127, 127] with scale = max|x| / 127; returns the scale.
// Below 1e-30 a group is zero (its reciprocal would overflow); NaN or infinity makes the scale NaN.
inline float quantize_levels(const float* x, int valid, int32_t* levels) {
  float padded[kGroup] = {};
  if (valid < kGroup) {
    memcpy(padded, x, static_cast<size_t>(valid) * sizeof(float));
    x = padded;
  }
  uint32_t largest_bits = 0;
  for (int i = 0; i < kGroup; ++i) {
    const uint32_t bits = bits_of_float(x[i]) & 0x7fffffffu;  // ordered like |x|, NaN on top
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  const float largest = float_of_bits(largest_bits);
  const bool usable = largest_bits < 0x7f800000u && largest > 1e-30f;
  const float inverse = usable ? 127.0f / largest : 0.0f;
  for (int i = 0; i < kGroup; ++i) {
    const float value = usable ? x[i] * inverse : 0.0f;
    levels[i] = static_cast<int32_t>(bits_of_float(value + 12582912.0f) - 0x4b400000u);
  }
  if (largest_bits >= 0x7f800000u) return NAN;
  return usable ? largest / 127.0f : 0.0f;
}

// Bytes in order, and -offset * their sum: for products of unsigned weights q + offset.
inline void quantize_bytes(const float* x, int valid, int32_t offset, void* values, float* scale,
                           int32_t* start) {
  int32_t levels[kGroup];
  *scale = quantize_levels(x, valid, levels);
  int8_t* out = static_cast<int8_t*>(values);
  int32_t sum = 0;
  for (int i = 0; i < kGroup; ++i) {
    out[i] = static_cast<int8_t>(levels[i]);
    sum += levels[i];
  }
  *start = -offset * sum;
}

// 16-bit pairs, columns 0 2 1 3 of every four: the weights' even and odd bytes widen in place.
inline void quantize_pairs(const float* x, int valid, void* values, float* scale, int32_t* start) {
  int32_t levels[kGroup];
  *scale = quantize_levels(x, valid, levels);
  int16_t* out = static_cast<int16_t*>(values);
  int32_t sum = 0;
  for (int i = 0; i < kGroup; ++i) sum += levels[i];
  for (int i = 0; i < kGroup; i += 4) {
    out[i] = static_cast<int16_t>(levels[i]);
    out[i + 1] = static_cast<int16_t>(levels[i + 2]);
    out[i + 2] = static_cast<int16_t>(levels[i + 1]);
    out[i + 3] = static_cast<int16_t>(levels[i + 3]);
  }
  *start = -level_offset(kInt8) * sum;
}

// The 8-bit product (vpmaddubsw) saturates at |q| = 127 twice, so int8 multiplies 16-bit pairs
// (vpmaddwd).
template <class I>
struct PairProduct8 {
  using Sum = typename I::Type;  // int32 per row
  static constexpr int kLines = 8;
  static constexpr int kValueBytes = 64;
  struct Weights {
    typename I::Type even, odd;  // int16: columns 0 and 2, columns 1 and 3
  };
  static Weights prepare(const uint8_t* p) {
    const auto w = I::load(p);
    return {I::shift_right_signed16(I::shift_left16(w)), I::shift_right_signed16(w)};
  }
  static Sum first(const int32_t*) { return I::zero(); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const auto even = I::broadcast4(x + line * 8);
    const auto odd = I::broadcast4(x + line * 8 + 4);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = I::add32(sum[v], I::multiply_add16(w[v].even, even));
      sum[v] = I::add32(sum[v], I::multiply_add16(w[v].odd, odd));
      keep(sum[v]);
    }
  }
  static Sum finish(Sum sum) { return sum; }
  static int32_t whole(int32_t start) { return start; }
  static void quantise(const float* x, int valid, void* values, float* scale, int32_t* start) {
    quantize_pairs(x, valid, values, scale, start);
  }
};

// Both nibbles of a line of int4, as q + 8.
template <class I>
struct Nibbles {
  static constexpr int kOffset = level_offset(kInt4);
  static constexpr float kUnit = 1.0f;  // what one level stands for
  typename I::Type low, high;
  static Nibbles of(const uint8_t* p) {
    const auto mask = I::broadcast8(15);
    const auto w = I::load(p);
    return {I::bit_and(w, mask), I::bit_and(I::shift_right4(w), mask)};
  }
};

// The same of E2M1, as 12 plus twice what a code stands for: 0 to 24.
template <class I>
struct E2m1 {
  static constexpr int kOffset = level_offset(kMxfp4);
  static constexpr float kUnit = 0.5f;
  typename I::Type low, high;
  static E2m1 of(const uint8_t* p) {
    alignas(16) static constexpr uint8_t kTable[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                       12, 11, 10, 9,  8,  6,  4,  0};
    const auto table = I::broadcast_table(kTable);
    const auto codes = Nibbles<I>::of(p);
    return {I::look_up(table, codes.low), I::look_up(table, codes.high)};
  }
};

// int4 and mxfp4 do use it, in sixteen bits throughout: of two columns in four a row's group sums to
// at most 16 * 12 * 127, which fits, whatever overflows on the way there. So the sum starts from minus
// the offset times the sum of the activations of those columns, two such halves to a start.
template <class I, class Codes>
struct ByteProduct4 {
  using Sum = typename I::Type;  // int16 per row, twice
  using Weights = Codes;
  static constexpr int kLines = 4;
  static constexpr int kValueBytes = 32;
  static Weights prepare(const uint8_t* p) { return Weights::of(p); }
  static Sum first(const int32_t* start) { return I::broadcast32(*start); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const auto low = I::broadcast4(x + line * 4);
    const auto high = I::broadcast4(x + line * 4 + 16);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = I::add16(sum[v], I::multiply_add8(w[v].low, low));
      sum[v] = I::add16(sum[v], I::multiply_add8(w[v].high, high));
      keep(sum[v]);
    }
  }
  static typename I::Type finish(Sum sum) { return I::multiply_add16(sum, I::broadcast16(1)); }
  static int32_t whole(int32_t start) {
    return static_cast<int16_t>(start) + static_cast<int16_t>(start >> 16);
  }
  static void quantise(const float* x, int valid, void* values, float* scale, int32_t* start) {
    quantize_bytes(x, valid, Codes::kOffset, values, scale, start);
    const int8_t* level = static_cast<const int8_t*>(values);
    int32_t first = 0;
    for (int i = 0; i < kGroup; ++i) first -= i % 4 < 2 ? Codes::kOffset * level[i] : 0;
    *start = static_cast<int32_t>(static_cast<uint32_t>(*start - first) << 16) | (first & 0xffff);
    *scale *= Codes::kUnit;
  }
};

// Four byte products per lane in one instruction (vpdpbusd, I::dot). The weight is the unsigned
// operand: int8 as q + 128 (a flipped sign bit), int4 as stored, q + 8; the sum starts from minus
// the offset times the sum of the activations.
template <class I>
struct DotProduct8 {
  using Sum = typename I::Type;  // int32 per row
  using Weights = typename I::Type;
  static constexpr int kLines = 8;
  static constexpr int kValueBytes = 32;
  static Weights prepare(const uint8_t* p) { return I::bit_xor(I::load(p), I::broadcast8(-128)); }
  static Sum first(const int32_t* start) { return I::broadcast32(*start); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const auto values = I::broadcast4(x + line * 4);
    for (int v = 0; v < kVectors; ++v) sum[v] = I::dot(sum[v], w[v], values);
  }
  static Sum finish(Sum sum) { return sum; }
  static int32_t whole(int32_t start) { return start; }
  static void quantise(const float* x, int valid, void* values, float* scale, int32_t* start) {
    quantize_bytes(x, valid, level_offset(kInt8), values, scale, start);
  }
};

template <class I, class Codes>
struct DotProduct4 {
  using Sum = typename I::Type;  // int32 per row
  using Weights = Codes;
  static constexpr int kLines = 4;
  static constexpr int kValueBytes = 32;
  static Weights prepare(const uint8_t* p) { return Weights::of(p); }
  static Sum first(const int32_t* start) { return I::broadcast32(*start); }
  template <int kVectors>
  static void add(Sum* sum, const Weights* w, const uint8_t* x, int line) {
    const auto low = I::broadcast4(x + line * 4);
    const auto high = I::broadcast4(x + line * 4 + 16);
    for (int v = 0; v < kVectors; ++v) {
      sum[v] = I::dot(sum[v], w[v].low, low);
      sum[v] = I::dot(sum[v], w[v].high, high);
    }
  }
  static Sum finish(Sum sum) { return sum; }
  static int32_t whole(int32_t start) { return start; }
  static void quantise(const float* x, int valid, void* values, float* scale, int32_t* start) {
    quantize_bytes(x, valid, Codes::kOffset, values, scale, start);
    *scale *= Codes::kUnit;
  }
};

// Base `B`, a vector of rows, with its products.
template <class B, class Int8, class Int4, class Mxfp4>
struct Quant : B {
  template <int kFormat>
  using Product = std::conditional_t<kFormat == kInt8, Int8,
                                     std::conditional_t<kFormat == kInt4, Int4, Mxfp4>>;
};

// What Kernels::quant, quantize_group and quant_rows hold for a Quant.
template <class Q, int kFormat>
constexpr QuantFormat quant_format() {
  return {Q::template Product<kFormat>::kValueBytes, Q::block_tokens};
}

template <class Q>
inline void quantize_group(const float* x, int valid, int format, void* values, float* scale,
                           int32_t* start) {
  if (format == kInt8)
    Q::template Product<kInt8>::quantise(x, valid, values, scale, start);
  else if (format == kInt4)
    Q::template Product<kInt4>::quantise(x, valid, values, scale, start);
  else
    Q::template Product<kMxfp4>::quantise(x, valid, values, scale, start);
}

}  // namespace
}  // namespace cpux
