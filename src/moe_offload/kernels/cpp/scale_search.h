// The scales of our own int8, int4 and mxfp4, for sixteen rows by a group of 32 columns at a time: what
// checkpoint/quantization.py computes, with the same operations in the same order, so that both
// give the same bytes and so does every instruction set. Each lane of a vector is a row.
#pragma once

#include <cstring>

#include "kernels.h"

namespace cpux {
namespace {

// Lanes: vectors of Float and of Int, equally many of each, and the larger and smaller of two Floats.
template <class Lanes>
struct ScaleSearch {
  using Float = typename Lanes::Float;
  using Int = typename Lanes::Int;
  static constexpr int kLanes = sizeof(Float) / sizeof(float);

  // fp32 has no bits behind the point from 2^23 on: a sum with this is rounded to nearest even.
  static constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23
  static constexpr float kSmallestScale = 0x1p-24f, kLargestScale = 65504.0f;

  template <int kBits>
  struct Format;

  template <class To, class From>
  static To bits_of(From v) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits");
    To out;
    memcpy(&out, &v, sizeof out);
    return out;
  }

  static Float all(float value) { return Float{} + value; }
  static Float load(const float* p) {
    Float v;
    memcpy(&v, p, sizeof v);
    return v;
  }
  static Float clamp(Float v, float low, float high) {
    return Lanes::smaller(Lanes::larger(v, all(low)), all(high));
  }
  static Float magnitude(Float v) { return bits_of<Float>(bits_of<Int>(v) & 0x7fffffff); }

  // The nearest nonzero finite float16, with the sign of `scale`.
  static Float representable(Float scale) {
    const Float size = clamp(magnitude(scale), kSmallestScale, kLargestScale);
    // A power of two 2^13 times as large has its last bit where float16 has; below 2^-14 that stays.
    Int power = bits_of<Int>(size) & 0x7f800000;
    const Int smallest = Int{} + (113 << 23);
    power = (power > smallest ? power : smallest) + (13 << 23);
    const Float rounder = bits_of<Float>(power);
    const Int sign = bits_of<Int>(scale) & ~0x7fffffff;
    return bits_of<Float>(bits_of<Int>((size + rounder) - rounder) | sign);
  }

  // float16's bits of such a value or zero.
  static Int half_bits(Float v) {
    const Int bits = bits_of<Int>(v) & 0x7fffffff;
    const Int normal = (bits >> 13) - (112 << 10);
    const Int subnormal = bits_of<Int>(magnitude(v) + 0.5f) - 0x3f000000;  // in steps of 2^-24
    const Int sign = (bits_of<Int>(v) >> 16) & 0x8000;
    return (bits >= (113 << 23) ? normal : subnormal) | sign;
  }

  // The nearest level of weights that are `steps` scales large, plus kRounder.
  template <int kBits>
  static Float raised_level(Float steps) {
    return clamp(steps, Format<kBits>::low, Format<kBits>::high) + kRounder;
  }

  // A group's terms are added up in two halves.
  template <class F>
  static Float sum_of_group(F term) {
    Float halves[2] = {};
    for (int i = 0; i < kGroup / 2; ++i)
      for (int half = 0; half < 2; ++half) halves[half] += term(half * (kGroup / 2) + i);
    return halves[0] + halves[1];
  }

  template <int kBits>
  static Float squared_error(const float* x, Float scale) {
    const Float inverse = 1.0f / scale;
    const Float sum = sum_of_group([&](int column) {
      const Float steps = load(x + column * kTileRows) * inverse;
      const Float rest = steps - (raised_level<kBits>(steps) - kRounder);
      return rest * rest;
    });
    return sum * scale * scale;
  }

  // False where a weight is no number or too large for a scale.
  template <int kBits>
  static bool search(const float* x, Float* scale) {
    using F = Format<kBits>;
    Float high = load(x), low = high;
    Int wrong = {};
    for (int column = 0; column < kGroup; ++column) {
      const Float v = load(x + column * kTileRows);
      wrong |= ~(magnitude(v) <= all(kLargestScale * (kBits == 8 ? 127.0f : 8.0f)));
      high = Lanes::larger(v, high);
      low = Lanes::smaller(v, low);
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (wrong[lane]) return false;
    const Float extreme = high > -low ? high : low;
    Float best = representable(extreme / F::divisors[0]);
    Float least = squared_error<kBits>(x, best);
    const auto try_scale = [&](Float candidate) {
      const Float error = squared_error<kBits>(x, candidate);
      const Int better = error < least;
      best = better ? candidate : best;
      least = better ? error : least;
    };
    for (int i = 1; i < 8; ++i) try_scale(representable(extreme / F::divisors[i]));
    const Float inverse = 1.0f / best;
    const auto level = [&](int column) {
      return raised_level<kBits>(load(x + column * kTileRows) * inverse) - kRounder;
    };
    const Float product =
        sum_of_group([&](int column) { return load(x + column * kTileRows) * level(column); });
    const Float square = sum_of_group([&](int column) { return level(column) * level(column); });
    try_scale(representable(product / Lanes::larger(square, all(1e-6f))));
    *scale = magnitude(extreme) < all(kSmallestScale / 2) ? Float{} : best;
    return true;
  }

  // bits [steps][4] of a lane's row, one level for each column of a group, to a tile's words.
  template <int kBits, class F>
  static void pack(uint8_t* packed, F level) {
    for (int step = 0; step < kBits; ++step) {
      Int word = {};
      for (int j = 0; j < 4; ++j) {
        const int column = step * 4 + j;
        const Int byte = kBits == 8 ? level(column) : level(column) | (level(column + 16) << 4);
        word |= byte << (8 * j);
      }
      memcpy(packed + step * 4 * kTileRows, &word, sizeof word);
    }
  }

  template <int kBits>
  static bool quantise(const float* x, uint8_t* packed, uint16_t* scales) {
    Float scale;
    if (!search<kBits>(x, &scale)) return false;
    const Int half = half_bits(scale);
    for (int lane = 0; lane < kLanes; ++lane) scales[lane] = static_cast<uint16_t>(half[lane]);
    const Float inverse = scale == Float{} ? Float{} : 1.0f / scale;
    const auto level = [&](int column) {  // q, plus 8 of int4
      const Float raised = raised_level<kBits>(load(x + column * kTileRows) * inverse);
      const Int q = bits_of<Int>(raised) - bits_of<Int>(all(kRounder));
      return kBits == 8 ? q & 255 : q + 8;
    };
    pack<kBits>(packed, level);
    return true;
  }

  // E2M1: above which half one becomes the next, and twice what it grows by then.
  static constexpr float kEdges[7] = {0.5f, 1.5f, 2.5f, 3.5f, 5.0f, 7.0f, 10.0f};
  static constexpr float kGrowth[7] = {1.0f, 1.0f, 1.0f, 1.0f, 2.0f, 2.0f, 4.0f};
  static constexpr float kLargestWeight = 1e38f;

  static bool to_e2m1(const float* x, uint8_t* packed, uint8_t* scales) {
    Float largest = {};
    Int wrong = {};
    for (int column = 0; column < kGroup; ++column) {
      const Float size = magnitude(load(x + column * kTileRows));
      wrong |= ~(size <= all(kLargestWeight));
      largest = Lanes::larger(size, largest);
    }
    for (int lane = 0; lane < kLanes; ++lane)
      if (wrong[lane]) return false;
    const Int exponent = (bits_of<Int>(largest) >> 23) - 126;  // |w| < 2^exponent
    const Int lowest = Int{} - 120;
    const Int top = largest == Float{} ? Int{} : exponent > lowest ? exponent : lowest;
    const auto power = [](Int e) { return bits_of<Float>((e + 127) << 23); };
    const auto error = [&](Int candidate) {  // of the scale 2^candidate
      const Float unit = power(candidate - 1), inverse = power(1 - candidate);
      return sum_of_group([&](int column) {
        const Float size = magnitude(load(x + column * kTileRows));
        const Float steps = size * inverse;
        Float halves = {};
        for (int i = 0; i < 7; ++i) halves += steps > all(kEdges[i]) ? all(kGrowth[i]) : Float{};
        const Float rest = halves * unit - size;
        return rest * rest;
      });
    };
    const Int scale = error(top - 2) < error(top - 3) ? top - 2 : top - 3;
    const Float inverse = power(1 - scale);
    pack<4>(packed, [&](int column) {
      const Float v = load(x + column * kTileRows);
      const Float steps = magnitude(v) * inverse;
      Int code = (bits_of<Int>(v) >> 28) & 8;
      for (int i = 0; i < 7; ++i) code -= Int(steps > all(kEdges[i]));  // true is -1
      return code;
    });
    for (int lane = 0; lane < kLanes; ++lane) scales[lane] = static_cast<uint8_t>(scale[lane] + 127);
    return true;
  }
};

template <class Lanes>
template <int kBits>
struct ScaleSearch<Lanes>::Format {
  static constexpr bool is_int8 = kBits == 8;
  static constexpr float low = is_int8 ? -127.0f : -8.0f, high = is_int8 ? 127.0f : 7.0f;
  // A candidate scale is the group's signed extreme over one of these.
  static constexpr float divisors[8] = {
      is_int8 ? 127.0f : -8.0f,  is_int8 ? 127.45f : -8.5f, is_int8 ? 126.4f : -9.0f,
      is_int8 ? 125.3f : -7.5f,  is_int8 ? 124.3f : -7.0f,  is_int8 ? 123.2f : 7.0f,
      is_int8 ? 122.1f : 7.5f,   is_int8 ? 121.0f : 8.0f,
  };
};

template <class Lanes>
bool quantise_tile(int format, const float* x, uint8_t* packed, void* scales) {
  using S = ScaleSearch<Lanes>;
  uint16_t* halves = static_cast<uint16_t*>(scales);
  uint8_t* bytes = static_cast<uint8_t*>(scales);
  for (int row = 0; row < kTileRows; row += S::kLanes) {
    uint8_t* words = packed + row * 4;
    const bool is_done = format == kMxfp4 ? S::to_e2m1(x + row, words, bytes + row)
                         : format == kInt8
                             ? S::template quantise<8>(x + row, words, halves + row)
                             : S::template quantise<4>(x + row, words, halves + row);
    if (!is_done) return false;
  }
  return true;
}

}  // namespace
}  // namespace cpux
