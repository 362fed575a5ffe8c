#include "product.h"

#include <algorithm>
#include <cstring>

#include "elementwise.h"

namespace cpux {

namespace {

// Rows of fp32 and bf16 weights that several calls of dot_rows share: whole blocks of 3 and of 4.
constexpr int64_t kDotRows = 12;
// Groups of tiles that stay in the cache while all tokens meet them.
constexpr int64_t kQuantSliceGroups = 32;

int64_t padded_cols(const Gemm& gemm, const Activations& a) {
  return round_up(a.cols, gemm.k_step);
}

// Of `rest` tokens, fewer than a full panel: those that make a narrow panel of their own.
int64_t narrow_tokens(const Gemm& gemm, int64_t rest) {
  const int64_t tail = rest % gemm.lanes;
  return tail <= gemm.narrow_tokens ? tail : 0;
}

bool is_narrow(const Gemm& gemm, const Panel& panel) { return panel.width % gemm.lanes != 0; }

// Where the panel's first column lies.
uint8_t* panel_data(const Gemm& gemm, const Activations& a, const Panel& panel) {
  return a.panels + panel.first * padded_cols(gemm, a) * gemm.element_bytes;
}

// A token's column of a panel, in elements from the panel's start.
int64_t panel_offset(const Gemm& gemm, const Activations& a, const Panel& panel, int64_t t,
                     int64_t k) {
  if (is_narrow(gemm, panel)) return t * padded_cols(gemm, a) + k;
  return (k / gemm.k_step * panel.width + t) * gemm.k_step + k % gemm.k_step;
}

// One element of a panel, in the panel's type.
void store_element(const Gemm& gemm, uint8_t* data, int64_t at, float value) {
  if (gemm.element_bytes == 4)
    reinterpret_cast<float*>(data)[at] = value;
  else
    reinterpret_cast<uint16_t*>(data)[at] = bf16_of_float(value);
}

// Where the group of 32 columns `g` of token `t` lies, in groups: blocks of tokens that one product
// takes, each with the block's tokens side by side.
int64_t group_at(const QuantFormat& format, const Activations& a, int64_t t, int64_t g) {
  const int64_t first = t / format.block_tokens * format.block_tokens;
  const int64_t tokens = std::min<int64_t>(format.block_tokens, a.n - first);
  return first * a.groups() + g * tokens + (t - first);
}

int64_t element_bytes(const Matrix& m) {
  return m.format == kFp32 ? 4 : m.format == kBf16 ? 2 : 1;
}

int product_dot(const Kernels& kernels, const Matrix& m, const Activations& a, int64_t r0,
                int64_t r1, const Next& next, float* c, int64_t stride) {
  // More tokens than one call takes: few rows at a time, which wait in the cache for the next call,
  // and calls of about as many tokens (a call for one or two is worth little).
  const int64_t step = a.n <= kMaxDotTokens ? r1 - r0 : kDotRows;
  for (int64_t r = r0; r < r1; r += step) {
    const int rows = static_cast<int>(std::min(step, r1 - r));
    const uintptr_t then = r + rows < r1 || next.w == 0 ? place_of(m, r + rows).w : next.w;
    int64_t t = 0;
    for (int64_t calls = (a.n + kMaxDotTokens - 1) / kMaxDotTokens; calls > 0; --calls) {
      const int64_t tokens = (a.n - t + calls - 1) / calls;
      float* y = c + t * stride + (r - r0);
      if (m.format == kFp8)
        kernels.dot_fp8(m, r, rows, then, a.rows + t, static_cast<int>(tokens), y, stride);
      else
        kernels.dot_rows(m.w + r * m.cols * element_bytes(m), m.format, m.cols, rows, then,
                         a.rows + t, static_cast<int>(tokens), y, stride);
      t += tokens;
    }
  }
  return 0;
}

// A row block of tiles: its weights and scales.
struct RowBlock {
  const uint8_t* w;
  BlockScales scales;
};

RowBlock row_block(const Matrix& m, int64_t block) {
  const Scales& s = m.scales;
  const int64_t groups = (m.cols + kGroup - 1) / kGroup;
  const int64_t first = block * s.per_row(m.cols) * kTileRows;
  const int64_t offset_bytes = s.offset_type == kMinimumOffset ? 2 : 1;
  return {m.w + block * groups * quant_group_bytes(m.format),
          {s.data + first * scale_bytes(s.type),
           s.offsets == nullptr ? nullptr : s.offsets + first * offset_bytes, s.type, s.offset_type,
           s.group / kGroup}};
}

int product_quantised(const Kernels& kernels, const Matrix& m, const Activations& a, int64_t r0,
                      int64_t r1, const Next& next, float* c, int64_t stride) {
  const int64_t groups = a.groups();
  const QuantFormat format = kernels.quant[m.format - kInt8];
  const int64_t first_block = r0 / kTileRows;
  const int64_t end_block = (r1 + kTileRows - 1) / kTileRows;
  // One block of tokens streams whole rows; more reuse a slice of the weights from the cache.
  const int64_t step = a.n <= format.block_tokens ? groups : kQuantSliceGroups;
  for (int64_t g = 0; g < groups; g += step) {
    for (int64_t t = 0; t < a.n; t += format.block_tokens) {
      const int n = static_cast<int>(std::min<int64_t>(format.block_tokens, a.n - t));
      for (int64_t b = first_block; b < end_block; ++b) {
        const RowBlock block = row_block(m, b);
        Next after{};  // the first tokens wait for memory, the others find it in the cache
        if (t == 0)
          after = b + 1 < end_block || next.w == 0 ? place_of(m, (b + 1) * kTileRows, g) : next;
        kernels.quant_rows(m.format, block.w, block.scales, after, g, std::min(groups, g + step),
                           a.values + t * groups * format.value_bytes, a.scales + t * groups,
                           a.starts + t * groups, n, g > 0,
                           c + t * stride + (b - first_block) * kTileRows, stride);
      }
    }
  }
  return static_cast<int>(r0 - first_block * kTileRows);
}

// Columns of a weight panel: the matrix cut evenly, an odd number of cache lines to a row, so that
// rows fall on different sets (rows 4 KiB apart, AVX2, 8 tokens: 1.7x the time).
int64_t slice_depth(int64_t cols, int element_bytes) {
  constexpr int64_t kLine = 64;
  constexpr int64_t kMostLines = kSliceBytes / kLine - 1;
  const int64_t lines = (cols * element_bytes + kLine - 1) / kLine;
  const int64_t slices = (lines + kMostLines - 1) / kMostLines;
  return ((lines + slices - 1) / slices | 1) * kLine / element_bytes;
}

void product_panels(const Kernels& kernels, const Matrix& m, const Activations& a, int64_t r0,
                    int64_t r1, float* c, void* slice) {
  const Gemm& gemm = gemm_of(kernels, a.form);
  const int64_t element = element_bytes(m);
  const int64_t cols = padded_cols(gemm, a);
  const int64_t depth_max = slice_depth(cols, gemm.element_bytes);
  const auto weights = [&](int64_t row, int64_t k) -> const uint8_t* {
    return is_tiled(m.format) ? nullptr : m.w + (row * m.cols + k) * element;
  };
  for (int64_t k = 0; k < cols; k += depth_max) {
    const int depth = static_cast<int>(std::min(depth_max, cols - k));
    const int valid = static_cast<int>(std::min<int64_t>(depth, m.cols - k));
    for (int64_t r = r0; r < r1; r += kSliceRows) {
      const int rows = static_cast<int>(std::min<int64_t>(kSliceRows, r1 - r));
      gemm.load_weights(m, r, k, rows, depth, valid, slice);
      // Memory works while the first panel is multiplied: on the rows below, or the columns after.
      Ahead ahead{nullptr, m.cols * element, static_cast<int>(gemm.k_step * element)};
      if (r + rows < r1)
        ahead.data = weights(r + rows, k);
      else if (k + depth < cols)
        ahead.data = weights(r0, k + depth);
      for (int64_t p = 0; p < n_panels(kernels, a); ++p) {
        const Panel panel = panel_of(kernels, a, p);
        const uint8_t* x = panel_data(gemm, a, panel) +
                           panel_offset(gemm, a, panel, 0, k) * gemm.element_bytes;
        const int width = static_cast<int>(panel.width);
        float* out = c + panel.first * (r1 - r0) + (r - r0) * width;
        if (is_narrow(gemm, panel))
          gemm.multiply_narrow(slice, rows, depth, x, cols, width, k > 0, ahead, out);
        else
          gemm.multiply(slice, rows, depth, x, width, k > 0, ahead, out);
        ahead.data = nullptr;
      }
    }
  }
}

void add_bias(const Kernels& kernels, const Matrix& m, const Activations& a, int64_t r0, int64_t r1,
              int offset, float* c, int64_t stride) {
  const float* bias = m.bias + r0;
  if (!is_panels(a.form)) {
    for (int64_t t = 0; t < a.n; ++t) kernels.axpy(1.0f, bias, r1 - r0, c + t * stride + offset);
    return;
  }
  for (int64_t p = 0; p < n_panels(kernels, a); ++p) {
    const Panel panel = panel_of(kernels, a, p);
    float* row = c + panel.first * (r1 - r0);
    for (int64_t r = 0; r < r1 - r0; ++r, row += panel.width)
      for (int64_t t = 0; t < panel.width; ++t) row[t] += bias[r];
  }
}

}  // namespace

Form choose_form(const Kernels& kernels, int format, int64_t n_tokens, bool exact_fp32) {
  if (format == kMxfp4 && exact_fp32) return Form::kPanels;
  if (is_tiled(format)) return Form::kQuantised;
  // fp8 takes more steps to widen: once for all tokens where that is cheaper than by three calls.
  const int least = format == kFp8 ? std::min(kernels.gemm_min_tokens, 2 * kMaxDotTokens + 1)
                                   : kernels.gemm_min_tokens;
  if (kernels.gemm_min_tokens == 0 || n_tokens < least) return Form::kDot;
  if (format != kFp32 && kernels.gemm_bf16.element_bytes != 0 && !exact_fp32)
    return Form::kBf16Panels;
  return Form::kPanels;
}

Activations allocate(const Kernels& kernels, Form form, int format, int64_t n, int64_t cols,
                     Arena& arena) {
  Activations a{};
  a.form = form;
  a.format = format;
  a.n = n;
  a.cols = cols;
  if (form == Form::kDot) {
    a.rows = arena.take<const float*>(n);
  } else if (form == Form::kQuantised) {
    const int64_t groups = n * a.groups();
    a.values = arena.take<uint8_t>(groups * kernels.quant[format - kInt8].value_bytes);
    a.scales = arena.take<float>(groups);
    a.starts = arena.take<int32_t>(groups);
  } else {
    const Gemm& gemm = gemm_of(kernels, form);
    a.panels =
        arena.take<uint8_t>(round_up(n, gemm.lanes) * padded_cols(gemm, a) * gemm.element_bytes);
  }
  return a;
}

const Gemm& gemm_of(const Kernels& kernels, Form form) {
  return form == Form::kBf16Panels ? kernels.gemm_bf16 : kernels.gemm;
}

int64_t n_panels(const Kernels& kernels, const Activations& a) {
  const Gemm& gemm = gemm_of(kernels, a.form);
  const int64_t rest = a.n % gemm.panel_tokens;
  const int64_t narrow = narrow_tokens(gemm, rest);
  return a.n / gemm.panel_tokens + (rest > narrow) + (narrow > 0);
}

Panel panel_of(const Kernels& kernels, const Activations& a, int64_t index) {
  const Gemm& gemm = gemm_of(kernels, a.form);
  const int64_t full = a.n / gemm.panel_tokens;
  const int64_t first = std::min(index, full) * gemm.panel_tokens;
  if (index < full) return {first, gemm.panel_tokens, gemm.panel_tokens};
  const int64_t narrow = narrow_tokens(gemm, a.n - first);
  const int64_t wide = a.n - first - narrow;
  if (index > full || wide == 0) return {first + wide, narrow, narrow};
  return {first, wide, round_up(wide, gemm.lanes)};
}

void store_row(const Activations& a, int64_t t, int64_t from, int64_t count, const float* x) {
  float* row = const_cast<float*>(a.rows[t]) + from;
  const float factor = a.format == kFp8 ? kFp8Half : 1.0f;
  for (int64_t i = 0; i < count; ++i) row[i] = x[i] * factor;
}

void pack_panel(const Kernels& kernels, const Activations& a, int64_t index,
                const float* const* x) {
  const Gemm& gemm = gemm_of(kernels, a.form);
  const Panel panel = panel_of(kernels, a, index);
  const int64_t cols = padded_cols(gemm, a);
  uint8_t* data = panel_data(gemm, a, panel);
  // Lines of the panel are written whole: 16 columns of every token, then the next 16.
  constexpr int64_t kColumns = 16;
  for (int64_t k0 = 0; k0 < cols; k0 += kColumns) {
    const int64_t k1 = std::min(cols, k0 + kColumns);
    for (int64_t t = 0; t < panel.width; ++t) {
      for (int64_t k = k0; k < k1; ++k) {
        const float value = t < panel.tokens && k < a.cols ? x[t][k] : 0.0f;
        store_element(gemm, data, panel_offset(gemm, a, panel, t, k), value);
      }
    }
  }
}

void store_panel_rows(const Kernels& kernels, const Activations& a, int64_t index, int64_t from,
                      int64_t rows, const float* value) {
  const Gemm& gemm = gemm_of(kernels, a.form);
  const Panel panel = panel_of(kernels, a, index);
  uint8_t* data = panel_data(gemm, a, panel);
  const int64_t width = panel.width;
  if (gemm.element_bytes == 4 && !is_narrow(gemm, panel)) {
    memcpy(data + from * width * sizeof(float), value,
           static_cast<size_t>(rows * width) * sizeof(float));
    return;
  }
  for (int64_t r = 0; r < round_up(rows, gemm.k_step); ++r)
    for (int64_t t = 0; t < width; ++t) {
      const float v = r < rows ? value[r * width + t] : 0.0f;
      store_element(gemm, data, panel_offset(gemm, a, panel, t, from + r), v);
    }
}

void quantise(const Kernels& kernels, const Activations& a, int64_t t, int64_t from, int64_t count,
              const float* x) {
  const QuantFormat format = kernels.quant[a.format - kInt8];
  for (int64_t k = 0; k < count; k += kGroup) {
    const int64_t at = group_at(format, a, t, (from + k) / kGroup);
    kernels.quantize_group(x + k, static_cast<int>(std::min<int64_t>(kGroup, count - k)), a.format,
                           a.values + at * format.value_bytes, a.scales + at, a.starts + at);
  }
}

void copy_quantised(const Kernels& kernels, const Activations& a, int64_t t,
                    const Activations& source) {
  const QuantFormat format = kernels.quant[a.format - kInt8];
  for (int64_t g = 0; g < a.groups(); ++g) {
    const int64_t at = group_at(format, a, t, g);
    memcpy(a.values + at * format.value_bytes, source.values + g * format.value_bytes,
           static_cast<size_t>(format.value_bytes));
    a.scales[at] = source.scales[g];
    a.starts[at] = source.starts[g];
  }
}

Next place_of(const Matrix& m, int64_t row, int64_t group) {
  if (!is_tiled(m.format))
    return {reinterpret_cast<uintptr_t>(m.w) + row * m.cols * element_bytes(m), 0};
  const int64_t block = row / kTileRows;
  const int64_t groups = (m.cols + kGroup - 1) / kGroup;
  const int64_t scales = block * m.scales.per_row(m.cols) + group * kGroup / m.scales.group;
  return {reinterpret_cast<uintptr_t>(m.w) + (block * groups + group) * quant_group_bytes(m.format),
          reinterpret_cast<uintptr_t>(m.scales.data) +
              scales * kTileRows * scale_bytes(m.scales.type)};
}

int product(const Kernels& kernels, const Matrix& m, const Activations& a, int64_t r0, int64_t r1,
            float* c, const Scratch& s, const Next& next) {
  int offset = 0;
  if (a.form == Form::kDot)
    offset = product_dot(kernels, m, a, r0, r1, next, c, s.stride);
  else if (a.form == Form::kQuantised)
    offset = product_quantised(kernels, m, a, r0, r1, next, c, s.stride);
  else
    product_panels(kernels, m, a, r0, r1, c, s.slice);
  if (m.bias != nullptr) add_bias(kernels, m, a, r0, r1, offset, c, s.stride);
  return offset;
}

Scratch* allocate_scratch(int threads, int64_t n_tokens, int64_t tile, Arena& arena) {
  const int64_t stride = round_up(tile, kTileRows) + kTileRows;
  const int64_t floats = round_up(n_tokens, kMaxPanelTokens) * stride;
  Scratch* scratch = arena.take<Scratch>(threads);
  for (int i = 0; i < threads; ++i)
    scratch[i] = {arena.take<float>(floats), arena.take<float>(floats),
                  arena.take<uint8_t>(kSliceRows * kSliceBytes), stride};
  return scratch;
}

}  // namespace cpux
