// Attention of many tokens per sequence: no score leaves the second-level cache.
//
// An item is some tokens of one sequence with all heads that share keys: its rows. The keys that they
// see come in blocks, each packed once into the panels of a Gemm (kernels.h) for all rows. A few rows at
// a time then multiply with the keys, take the exponentials of their scores, and multiply those with the
// values. The largest score, the sum of exponentials and the weighted sum of values that a row has so
// far are rescaled when a larger score comes. Which rows make an item has no effect on a row's bits.
//
// Panels are bf16 where the instruction set multiplies that and the model is bf16 (the exponentials are
// rounded to it, their sum is not), else fp32. Sums are fp32.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "entry_points.h"
#include "team.h"

namespace cpux {

namespace {

constexpr int64_t kBlockKeys = 128;
constexpr int64_t kItemRows = 256;
constexpr int64_t kStripRows = 24;  // rows that multiply with a panel in turn; of 6, 8 and 12

// Where a thread keeps an item.
struct Room {
  uint8_t* query;   // [rows][key_depth], a weight panel
  uint8_t* keys;    // panels [key_depth / k_step][width][k_step]
  uint8_t* values;  // panels [kBlockKeys / k_step][width][k_step]
  float* words;     // four rows of keys: [4][key_depth / k_step]
  float* scores;    // panels [kStripRows][width]
  float* row;       // [kBlockKeys]
  uint8_t* terms;   // [kStripRows][keys], a weight panel
  float* sums;      // strips of panels [rows][width]
  float *largest, *total;  // [rows]
};

class PromptAttention {
 public:
  PromptAttention(const Kernels& kernels, int threads, const cpux_attention& a, Arena& arena);
  void run(void* out);

 private:
  struct Item {
    int64_t batch, kv_head, first_token, n_tokens;
  };

  Item item_of(int64_t index) const;
  const uint8_t* mask_row(const Item& item, int64_t token) const {
    return a_.mask + item.batch * a_.mask_strides[0] + token * a_.mask_strides[1];
  }
  // Keys that the tokens of an item may see: [first, end).
  int64_t first_key(const Item& item) const;
  int64_t end_key(const Item& item) const;
  int64_t causal_end(int64_t token) const { return a_.n_keys - a_.n_queries + token + 1; }

  void compute(const Item& item, const Room& room, void* out);
  void pack_query(const Item& item, const Room& room);
  void pack_keys(const char* keys, int64_t n, const Room& room);
  void pack_values(const char* values, int64_t n, const Room& room);
  void strip(const Item& item, int64_t first_row, int64_t n_rows, int64_t first_key, int64_t n_keys,
             const Room& room);
  // Of a block of n_keys keys, those up to the last that a row may see.
  int64_t seen(const Item& item, int64_t row, int64_t first_key, int64_t n_keys) const {
    if (a_.mask != nullptr) return n_keys;
    const int64_t own = causal_end(item.first_token + row / group_) - first_key;
    return std::max<int64_t>(0, std::min(n_keys, own));
  }
  void store(const Item& item, const Room& room, void* out);
  // Calls f(first, width) for panels of n columns.
  template <class F>
  void each_panel(int64_t n, F f) const {
    for (int64_t first = 0; first < n; first += gemm_.panel_tokens)
      f(first, round_up(std::min<int64_t>(gemm_.panel_tokens, n - first), gemm_.lanes));
  }

  const Kernels& kernels_;
  const cpux_attention& a_;
  const int threads_;
  const bool is_bf16_;
  const Gemm& gemm_;
  const int64_t element_, group_, key_depth_, value_width_;
  int64_t item_tokens_, n_items_;
  Room* rooms_;
};

PromptAttention::PromptAttention(const Kernels& kernels, int threads, const cpux_attention& a,
                                 Arena& arena)
    : kernels_(kernels),
      a_(a),
      threads_(threads),
      is_bf16_(a.is_bf16 != 0),
      gemm_(is_bf16_ && kernels.gemm_bf16.element_bytes != 0 ? kernels.gemm_bf16 : kernels.gemm),
      element_(is_bf16_ ? 2 : 4),
      group_(a.n_heads / a.n_kv_heads),
      key_depth_(round_up(a.key_size, gemm_.k_step)),
      value_width_(round_up(a.value_size, gemm_.lanes)),
      rooms_(arena.take<Room>(threads)) {
  const int64_t n_heads = a.n_batch * a.n_kv_heads;
  const auto items = [&](int64_t tokens) { return n_heads * ((a.n_queries + tokens - 1) / tokens); };
  item_tokens_ = std::max<int64_t>(1, std::min(a.n_queries, kItemRows / group_));
  // Few items leave threads without one; keys are packed anew for each item, so not too small ones.
  while (items(item_tokens_) < 2 * threads && item_tokens_ * group_ > 2 * kStripRows)
    item_tokens_ = (item_tokens_ + 1) / 2;
  n_items_ = items(item_tokens_);
  const int64_t rows = item_tokens_ * group_, bytes = gemm_.element_bytes;
  for (int i = 0; i < threads; ++i)
    rooms_[i] = {arena.take<uint8_t>(rows * key_depth_ * bytes),
                 arena.take<uint8_t>(kBlockKeys * key_depth_ * bytes),
                 arena.take<uint8_t>(kBlockKeys * value_width_ * bytes),
                 arena.take<float>(4 * key_depth_),
                 arena.take<float>(kStripRows * kBlockKeys),
                 arena.take<float>(kBlockKeys),
                 arena.take<uint8_t>(kStripRows * kBlockKeys * bytes),
                 arena.take<float>(rows * value_width_),
                 arena.take<float>(rows),
                 arena.take<float>(rows)};
}

// The last tokens of a head come first: with a causal mask they see the most keys.
PromptAttention::Item PromptAttention::item_of(int64_t index) const {
  const int64_t per_head = (a_.n_queries + item_tokens_ - 1) / item_tokens_;
  const int64_t first = (per_head - 1 - index % per_head) * item_tokens_;
  return {index / per_head / a_.n_kv_heads, index / per_head % a_.n_kv_heads, first,
          std::min(item_tokens_, a_.n_queries - first)};
}

int64_t PromptAttention::first_key(const Item& item) const {
  if (a_.mask == nullptr) return 0;
  int64_t first = a_.n_keys;
  for (int64_t t = 0; t < item.n_tokens; ++t) {
    const uint8_t* mask = mask_row(item, item.first_token + t);
    const void* seen = memchr(mask, 1, static_cast<size_t>(first));
    if (seen != nullptr) first = static_cast<const uint8_t*>(seen) - mask;
  }
  return first;
}

int64_t PromptAttention::end_key(const Item& item) const {
  const int64_t last_token = item.first_token + item.n_tokens - 1;
  if (a_.mask == nullptr) return causal_end(last_token);
  int64_t end = 0;
  for (int64_t t = last_token; t >= item.first_token; --t) {
    const uint8_t* mask = mask_row(item, t);
    const void* seen = memrchr(mask + end, 1, static_cast<size_t>(a_.n_keys - end));
    if (seen != nullptr) end = static_cast<const uint8_t*>(seen) - mask + 1;
  }
  return end;
}

// Four rows of n_words 32-bit numbers each, back to back -> [n_words][width].
void transpose4(const float* rows, int64_t n_words, int64_t width, float* out) {
  using Four = float __attribute__((vector_size(16), aligned(4)));
  using Index = int32_t __attribute__((vector_size(16)));
  const auto load = [&](int r, int64_t w) {
    return *reinterpret_cast<const Four*>(rows + r * n_words + w);
  };
  int64_t w = 0;
  for (; w + 4 <= n_words; w += 4) {
    const Four a = load(0, w), b = load(1, w), c = load(2, w), d = load(3, w);
    const Four ab0 = __builtin_shuffle(a, b, Index{0, 4, 1, 5});
    const Four ab1 = __builtin_shuffle(a, b, Index{2, 6, 3, 7});
    const Four cd0 = __builtin_shuffle(c, d, Index{0, 4, 1, 5});
    const Four cd1 = __builtin_shuffle(c, d, Index{2, 6, 3, 7});
    const auto store = [&](int64_t at, Four v) { *reinterpret_cast<Four*>(out + at * width) = v; };
    store(w, __builtin_shuffle(ab0, cd0, Index{0, 1, 4, 5}));
    store(w + 1, __builtin_shuffle(ab0, cd0, Index{2, 3, 6, 7}));
    store(w + 2, __builtin_shuffle(ab1, cd1, Index{0, 1, 4, 5}));
    store(w + 3, __builtin_shuffle(ab1, cd1, Index{2, 3, 6, 7}));
  }
  for (; w < n_words; ++w)
    for (int r = 0; r < 4; ++r) out[w * width + r] = rows[r * n_words + w];
}

void PromptAttention::pack_query(const Item& item, const Room& room) {
  const int64_t bytes = gemm_.element_bytes;
  uint8_t* row = room.query;
  for (int64_t t = 0; t < item.n_tokens; ++t)
    for (int64_t h = 0; h < group_; ++h, row += key_depth_ * bytes) {
      const int64_t at = item.batch * a_.query_strides[0] +
                         (item.kv_head * group_ + h) * a_.query_strides[1] +
                         (item.first_token + t) * a_.query_strides[2];
      const char* source = static_cast<const char*>(a_.query) + at * element_;
      memset(row + a_.key_size * bytes, 0, static_cast<size_t>((key_depth_ - a_.key_size) * bytes));
      if (bytes == 2)
        memcpy(row, source, static_cast<size_t>(a_.key_size) * 2);
      else
        kernels_.to_float(source, is_bf16_, a_.key_size, reinterpret_cast<float*>(row));
    }
}

void PromptAttention::pack_keys(const char* keys, int64_t n, const Room& room) {
  const int64_t bytes = gemm_.element_bytes, n_words = key_depth_ / gemm_.k_step;
  each_panel(n, [&](int64_t first, int64_t width) {
    float* panel = reinterpret_cast<float*>(room.keys + first * key_depth_ * bytes);
    for (int64_t k = 0; k < width; k += 4) {
      memset(room.words, 0, static_cast<size_t>(4 * n_words) * sizeof(float));
      for (int64_t r = 0; r < 4 && first + k + r < n; ++r) {
        const char* source = keys + (first + k + r) * a_.key_size * element_;
        float* words = room.words + r * n_words;
        if (bytes == 2)
          memcpy(words, source, static_cast<size_t>(a_.key_size) * 2);
        else
          kernels_.to_float(source, is_bf16_, a_.key_size, words);
      }
      transpose4(room.words, n_words, width, panel + k);
    }
  });
}

void PromptAttention::pack_values(const char* values, int64_t n, const Room& room) {
  const int64_t bytes = gemm_.element_bytes, row_bytes = a_.value_size * element_;
  each_panel(a_.value_size, [&](int64_t first, int64_t width) {
    uint8_t* panel = room.values + first * kBlockKeys * bytes;
    const int64_t columns = std::min(width, a_.value_size - first);
    for (int64_t k = 0; k < round_up(n, gemm_.k_step); k += gemm_.k_step) {
      const char* source = values + k * row_bytes + first * element_;
      if (bytes == 4) {
        float* out = reinterpret_cast<float*>(panel) + k * width;
        kernels_.to_float(source, is_bf16_, columns, out);
        std::fill(out + columns, out + width, 0.0f);
        continue;
      }
      uint16_t* out = reinterpret_cast<uint16_t*>(panel) + k * width;
      const uint16_t* upper = reinterpret_cast<const uint16_t*>(source);
      const uint16_t* lower = reinterpret_cast<const uint16_t*>(source + row_bytes);
      const bool is_pair = k + 1 < n;
      for (int64_t c = 0; c < columns; ++c) {
        out[2 * c] = upper[c];
        out[2 * c + 1] = is_pair ? lower[c] : 0;
      }
      std::fill(out + 2 * columns, out + 2 * width, uint16_t{0});
    }
  });
}

// Rows [first_row, first_row + n_rows) of an item with a block of keys that is packed.
void PromptAttention::strip(const Item& item, int64_t first_row, int64_t n_rows, int64_t first_key,
                            int64_t n_keys, const Room& room) {
  const int64_t bytes = gemm_.element_bytes;
  const int64_t n_seen = seen(item, first_row + n_rows - 1, first_key, n_keys);
  if (n_seen == 0) return;
  const int rows = static_cast<int>(n_rows);
  const Ahead nothing{nullptr, 0, 1};
  const uint8_t* query = room.query + first_row * key_depth_ * bytes;
  each_panel(n_keys, [&](int64_t first, int64_t width) {
    if (first < n_seen)
      gemm_.multiply(query, rows, static_cast<int>(key_depth_),
                     room.keys + first * key_depth_ * bytes, static_cast<int>(width), false, nothing,
                     room.scores + first * n_rows);
  });
  const int64_t depth = round_up(n_seen, gemm_.k_step);
  float* sums = room.sums + first_row * value_width_;
  for (int64_t r = 0; r < n_rows; ++r) {
    const int64_t n_own = seen(item, first_row + r, first_key, n_keys);
    each_panel(n_keys, [&](int64_t first, int64_t width) {
      if (first < n_own)
        memcpy(room.row + first, room.scores + first * n_rows + r * width,
               static_cast<size_t>(std::min(width, n_own - first)) * sizeof(float));
    });
    const int64_t token = item.first_token + (first_row + r) / group_;
    const uint8_t* mask = a_.mask == nullptr ? nullptr : mask_row(item, token) + first_key;
    kernels_.adjust_scores(room.row, n_own, a_.scale, a_.softcap, mask);
    float& largest = room.largest[first_row + r];
    float sum;
    const float top = kernels_.exponentials(room.row, n_own, largest, &sum);
    float& total = room.total[first_row + r];
    if (top != largest) {
      const float factor = expf(largest - top);
      largest = top;
      total *= factor;
      each_panel(a_.value_size, [&](int64_t first, int64_t width) {
        float* part = sums + first * n_rows + r * width;
        for (int64_t c = 0; c < width; ++c) part[c] *= factor;
      });
    }
    total += sum;
    std::fill(room.row + n_own, room.row + depth, 0.0f);
    if (bytes == 2)
      kernels_.to_bf16(room.row, depth, reinterpret_cast<uint16_t*>(room.terms) + r * depth);
    else
      memcpy(reinterpret_cast<float*>(room.terms) + r * depth, room.row,
             static_cast<size_t>(depth) * sizeof(float));
  }
  each_panel(a_.value_size, [&](int64_t first, int64_t width) {
    gemm_.multiply(room.terms, rows, static_cast<int>(depth),
                   room.values + first * kBlockKeys * bytes, static_cast<int>(width), true, nothing,
                   sums + first * n_rows);
  });
}

void PromptAttention::store(const Item& item, const Room& room, void* out) {
  const int64_t n_rows = item.n_tokens * group_;
  for (int64_t r = 0; r < n_rows; ++r) {
    const int64_t strip = r / kStripRows * kStripRows;
    const int64_t strip_rows = std::min(kStripRows, n_rows - strip);
    const float* sums = room.sums + strip * value_width_;
    const float scale = room.total[r] == 0.0f ? 0.0f : 1.0f / room.total[r];
    const int64_t token = item.batch * a_.n_queries + item.first_token + r / group_;
    const int64_t at = (token * a_.n_heads + item.kv_head * group_ + r % group_) * a_.value_size;
    each_panel(a_.value_size, [&](int64_t first, int64_t width) {
      const int64_t count = std::min(width, a_.value_size - first);
      const float* part = sums + first * strip_rows + (r - strip) * width;
      float scaled[kMaxPanelTokens];
      for (int64_t c = 0; c < count; ++c) scaled[c] = part[c] * scale;
      if (is_bf16_)
        kernels_.to_bf16(scaled, count, static_cast<uint16_t*>(out) + at + first);
      else
        std::copy(scaled, scaled + count, static_cast<float*>(out) + at + first);
    });
  }
}

void PromptAttention::compute(const Item& item, const Room& room, void* out) {
  const int64_t n_rows = item.n_tokens * group_;
  const char* keys = static_cast<const char*>(a_.keys) +
                     (item.batch * a_.key_strides[0] + item.kv_head * a_.key_strides[1]) * element_;
  const char* values =
      static_cast<const char*>(a_.values) +
      (item.batch * a_.value_strides[0] + item.kv_head * a_.value_strides[1]) * element_;
  for (int64_t r = 0; r < n_rows; ++r) {
    room.largest[r] =
        a_.sinks == nullptr ? -INFINITY : a_.sinks[item.kv_head * group_ + r % group_];
    room.total[r] = a_.sinks == nullptr ? 0.0f : 1.0f;
  }
  std::fill(room.sums, room.sums + n_rows * value_width_, 0.0f);
  pack_query(item, room);
  const int64_t end = end_key(item);
  // Blocks start at the same keys for all items: a row's sums do not depend on its neighbours.
  for (int64_t k = first_key(item) / kBlockKeys * kBlockKeys; k < end; k += kBlockKeys) {
    const int64_t n_keys = std::min(kBlockKeys, end - k);
    pack_keys(keys + k * a_.key_size * element_, n_keys, room);
    pack_values(values + k * a_.value_size * element_, n_keys, room);
    for (int64_t r = 0; r < n_rows; r += kStripRows)
      strip(item, r, std::min(kStripRows, n_rows - r), k, n_keys, room);
  }
  store(item, room, out);
}

void PromptAttention::run(void* out) {
  Team team(threads_);
  team.run([&](int thread) {
    team.share(0, n_items_, [&](int64_t i) { compute(item_of(i), rooms_[thread], out); });
  });
}

}  // namespace

void attend_prompt(const Kernels& kernels, int threads, const cpux_attention& attention,
                   Arena& arena, void* out) {
  if (attention.n_batch * attention.n_queries == 0) return;
  PromptAttention(kernels, threads, attention, arena).run(out);
}

}  // namespace cpux
