// A matrix times the activations of some tokens, in whichever form the token count favours.
//
// Forms: few tokens on row-major weights keep their fp32 rows (kDot); many are packed into GEMM
// panels (kPanels, kBf16Panels); tiles want them quantised (kQuantised), but for fp32 tokens on
// mxfp4, which stay exact (kPanels).
#pragma once

#include <cstdint>

#include "kernels.h"
#include "scratch.h"

namespace cpux {

// Rows that one tile of a product covers: a multiple of 16 (quantised row blocks), of 32 in gate_up (groups of
// the next product) and of 12 (weight panels).
constexpr int kDotTile = 32;
constexpr int kPanelTile = 48;
// A weight panel: rows, and at most so many bytes of each. Its 48 KiB and 16 tokens of activations stay in a 256 KiB
// second-level cache. Long rows read memory in long pieces (16 tokens, AVX2: 24 rows of 2 KiB 1.05x,
// 48 rows of 1 KiB 1.06x the time).
constexpr int kSliceRows = 12;
constexpr int kSliceBytes = 4096;

enum class Form { kDot, kPanels, kBf16Panels, kQuantised };

inline bool is_panels(Form form) { return form == Form::kPanels || form == Form::kBf16Panels; }

// `exact_fp32`: the tokens carry fp32 that bf16 panels would round.
Form choose_form(const Kernels& kernels, int format, int64_t n_tokens, bool exact_fp32);

// n tokens of `cols` values each, in one form.
struct Activations {
  Form form;
  int format;  // of the weights they meet
  int64_t n, cols;
  const float** rows;  // kDot: n pointers
  uint8_t* panels;     // kPanels, kBf16Panels: [panel][cols padded / k_step][width][k_step]
  uint8_t* values;     // kQuantised: [block][G][tokens of block][value_bytes]
  float* scales;       // [block][G][tokens of block]
  int32_t* starts;

  int64_t groups() const { return (cols + kGroup - 1) / kGroup; }
};

// Memory for the activations; what is in it must be written by the functions below.
Activations allocate(const Kernels& kernels, Form form, int format, int64_t n, int64_t cols,
                     Arena& arena);

// Panels of a gemm form: their number, tokens and width. A narrow one (kernels.h) is as wide as its
// tokens.
struct Panel {
  int64_t first, tokens, width;
};
const Gemm& gemm_of(const Kernels& kernels, Form form);
int64_t n_panels(const Kernels& kernels, const Activations& a);
Panel panel_of(const Kernels& kernels, const Activations& a, int64_t index);

// kDot: writes columns [from, from + count) of token t into a row of ours, as the product wants them.
void store_row(const Activations& a, int64_t t, int64_t from, int64_t count, const float* x);
// kPanels: packs panel `index` from the fp32 rows of its tokens, x[0..tokens).
void pack_panel(const Kernels& kernels, const Activations& a, int64_t index,
                const float* const* x);
// kPanels: writes rows [from, from + rows) of panel `index`, given as fp32 [rows][width]; `from` a
// multiple of k_step.
void store_panel_rows(const Kernels& kernels, const Activations& a, int64_t index, int64_t from,
                      int64_t rows, const float* value);
// kQuantised: quantises columns [from, from + count) of token t; `from` a multiple of 32.
void quantise(const Kernels& kernels, const Activations& a, int64_t t, int64_t from, int64_t count,
              const float* x);
// kQuantised: copies token t from the only token of `source`.
void copy_quantised(const Kernels& kernels, const Activations& a, int64_t t,
                    const Activations& source);

// What one thread needs for tiles of products.
struct Scratch {
  float* c;        // one tile's product
  float* other;    // a second tile's, or one token's row
  void* slice;     // a weight panel
  int64_t stride;  // from one token to the next in `c`, where the form has tokens
};
// One for each thread, for products of at most so many tokens and tiles of so many rows.
Scratch* allocate_scratch(int threads, int64_t n_tokens, int64_t tile, Arena& arena);

// Product of rows [r0, r1), a tile, with bias.
//   kDot, kQuantised: value of (t, r) at c[t * s.stride + r - r0 + offset]; returns offset < 16
//   panels:           panel p at c + first * (r1 - r0), fp32 [r1 - r0][width]
// `c` is s.c or s.other. `next`: where the thread's next product reads, if it is not below.
int product(const Kernels& kernels, const Matrix& m, const Activations& a, int64_t r0, int64_t r1,
            float* c, const Scratch& s, const Next& next = {});
// Where a product of the rows from `row` on begins to read; tiles from a group of columns on.
Next place_of(const Matrix& m, int64_t row, int64_t group = 0);

// Calls f(t, y) for each token of a product of `rows` rows at s.c + offset, y [rows] contiguous.
template <class F>
void for_each_token(const Kernels& kernels, const Activations& a, int64_t rows, int offset,
                    const Scratch& s, F f) {
  const float* c = s.c + offset;
  if (!is_panels(a.form)) {
    for (int64_t t = 0; t < a.n; ++t) f(t, c + t * s.stride);
    return;
  }
  for (int64_t p = 0; p < n_panels(kernels, a); ++p) {
    const Panel panel = panel_of(kernels, a, p);
    for (int64_t t = 0; t < panel.tokens; ++t) {
      const float* column = c + panel.first * rows + t;
      for (int64_t r = 0; r < rows; ++r) s.other[r] = column[r * panel.width];
      f(panel.first + t, static_cast<const float*>(s.other));
    }
  }
}
}  // namespace cpux
