// All CPU experts of one layer for T tokens: two passes over their weights, one barrier between.
//
// Pass 1 computes tiles of gate and up rows and their activation; pass 2 tiles of output rows. A tile
// of pass 2 owns its rows of the output and adds the experts in a fixed order: no atomics on floats,
// so the result has the same bits whichever thread takes which tile.
#include <algorithm>
#include <cstring>

#include "entry_points.h"
#include "grouping.h"
#include "team.h"

namespace cpux {

namespace {

// Up to this many tokens are prepared by the calling thread: a barrier costs more.
constexpr int64_t kSerialTokens = 4;
// Scratch for the tokens of one chunk; a longer prompt is cut and streams the weights once a chunk.
constexpr int64_t kChunkBytes = 192 << 20;

// Scales that the format's kernels read.
bool has_valid_scales(const cpux_layer& layer) {
  const int format = layer.weight_format, type = layer.scale_type;
  const bool sized = layer.scale_group >= 0 && layer.scale_group % kGroup == 0 &&
                     layer.scale_rows > 0 && type >= kHalfScale && type <= kE8m0Scale &&
                     layer.offset_type >= kNoOffset && layer.offset_type <= kMinimumOffset;
  if (format == kFp8) return sized && layer.offset_type == kNoOffset;
  if (format == kMxfp4)
    return sized && type == kE8m0Scale && layer.scale_group == kGroup && layer.scale_rows == 1 &&
           layer.offset_type == kNoOffset;
  return sized && type != kE8m0Scale && layer.scale_rows == 1;
}

bool is_valid(const cpux_layer& layer) {
  const bool scaled = has_scales(layer.weight_format), offset = layer.offset_type != kNoOffset;
  return layer.weight_format >= kFp32 && layer.weight_format <= kFp8 && layer.hidden_size > 0 &&
         layer.intermediate_size > 0 && layer.gate_up >= 0 && layer.down >= 0 &&
         scaled == (layer.gate_up_scale >= 0) && scaled == (layer.down_scale >= 0) &&
         offset == (layer.gate_up_offset >= 0) && offset == (layer.down_offset >= 0) &&
         (!scaled || has_valid_scales(layer));
}

bool is_valid(const cpux_tokens& tokens) {
  const bool any = tokens.n_tokens > 0;
  return tokens.n_tokens >= 0 && tokens.top_k >= 0 && tokens.n_experts >= 0 &&
         (!any || tokens.hidden != nullptr) &&
         (!any || tokens.top_k == 0 || (tokens.index != nullptr && tokens.weight != nullptr)) &&
         (tokens.n_experts == 0 || (tokens.blocks != nullptr && tokens.on_cpu != nullptr));
}

template <class T>
const T* field(const uint8_t* block, int64_t offset) {
  return offset < 0 ? nullptr : reinterpret_cast<const T*>(block + offset);
}

class Chunk {
 public:
  Chunk(const Kernels& kernels, int threads, const cpux_layer& layer, const cpux_tokens& tokens,
        int64_t t0, int64_t t1);
  void run(float* out);
  void first(float* first);
  void second(const float* middle, float* out);

 private:
  struct Item {
    Expert* expert;
    int64_t index;
  };

  Scales scales_of(const Expert& e, int64_t scale, int64_t offset, int64_t cols) const;
  Matrix gate_up(const Expert& e) const;
  Matrix down(const Expert& e) const;
  Form form_of(const Expert& e) const {
    return choose_form(kernels_, layer_.weight_format, e.n_pairs, tokens_.hidden_is_bf16 == 0);
  }

  // Every Chunk::allocate_* runs on the calling thread, before the team starts.
  void allocate_inputs();
  void allocate_middle();
  void allocate_rows(const Activations& a);
  void add_gathers(Expert& e, const Activations& a);

  // The experts' inputs, by a team, in the returned number of stages, or by the calling thread.
  int prepare(Team& team);
  void prepare_alone();
  void convert_token(int64_t t);
  void gather(const Item& item);
  void gather_middle(const Item& item, const float* middle);
  Next after_gate_tile(int64_t tile) const;
  Next after_down(const Expert* e, int64_t tile) const;
  void gate_tile(int64_t tile, const Scratch& s);
  void raw_tile(int64_t tile, const Scratch& s, float* first);
  void store_middle(const Expert& e, int64_t i0, int64_t i1, int gate_offset, int up_offset,
                    const Scratch& s);
  void down_tile(int64_t tile, const Scratch& s, float* out);

  float* x_row(int64_t token) const { return x_ + (token - t0_) * layer_.hidden_size; }
  int64_t tiles(int64_t rows) const { return (rows + tile_ - 1) / tile_; }

  const Kernels& kernels_;
  const cpux_layer& layer_;
  const cpux_tokens& tokens_;
  const int64_t t0_, n_tokens_;
  const int threads_;
  Arena& arena_;
  const bool quantised_;
  const Grouping groups_;
  int64_t tile_;
  Scratch* scratch_;
  float* x_ = nullptr;              // fp32 rows of the chunk
  Activations* x_token_ = nullptr;  // quantised rows of the chunk, one token each
  Item* gathers_ = nullptr;         // what to gather for the experts' inputs, or their middle
  int64_t n_gathers_ = 0;
};

Chunk::Chunk(const Kernels& kernels, int threads, const cpux_layer& layer,
             const cpux_tokens& tokens, int64_t t0, int64_t t1)
    : kernels_(kernels),
      layer_(layer),
      tokens_(tokens),
      t0_(t0),
      n_tokens_(t1 - t0),
      threads_(threads),
      arena_(fresh_arena()),
      quantised_(choose_form(kernels, layer.weight_format, 1, tokens.hidden_is_bf16 == 0) ==
                 Form::kQuantised),
      groups_(group_pairs(tokens, t0, t1, arena_)) {
  bool panels = false;
  for (const Expert& e : groups_) panels |= is_panels(form_of(e));
  tile_ = panels ? kPanelTile : kDotTile;
  scratch_ = allocate_scratch(threads, groups_.most_pairs, tile_, arena_);
}

Scales Chunk::scales_of(const Expert& e, int64_t scale, int64_t offset, int64_t cols) const {
  const int64_t group = layer_.scale_group > 0 ? layer_.scale_group : round_up(cols, kGroup);
  return {field<uint8_t>(e.block, scale), field<uint8_t>(e.block, offset), layer_.scale_type,
          layer_.offset_type, group, layer_.scale_rows};
}

Matrix Chunk::gate_up(const Expert& e) const {
  return {layer_.weight_format,
          (layer_.has_gate != 0 ? 2 : 1) * layer_.intermediate_size,
          layer_.hidden_size,
          e.block + layer_.gate_up,
          scales_of(e, layer_.gate_up_scale, layer_.gate_up_offset, layer_.hidden_size),
          field<float>(e.block, layer_.gate_up_bias)};
}

Matrix Chunk::down(const Expert& e) const {
  return {layer_.weight_format,
          layer_.hidden_size,
          layer_.intermediate_size,
          e.block + layer_.down,
          scales_of(e, layer_.down_scale, layer_.down_offset, layer_.intermediate_size),
          field<float>(e.block, layer_.down_bias)};
}

void Chunk::allocate_inputs() {
  const int64_t h = layer_.hidden_size;
  x_ = arena_.take<float>(n_tokens_ * h);
  if (quantised_) {
    x_token_ = arena_.take<Activations>(n_tokens_);
    for (int64_t t = 0; t < n_tokens_; ++t)
      x_token_[t] = allocate(kernels_, Form::kQuantised, layer_.weight_format, 1, h, arena_);
  }
  gathers_ = arena_.take<Item>(groups_.n_pairs);
  for (Expert& e : groups_) {
    const Form form = form_of(e);
    if (quantised_ && e.n_pairs == 1) {
      e.x = x_token_[e.pairs[0].token - t0_];
      continue;
    }
    e.x = allocate(kernels_, form, layer_.weight_format, e.n_pairs, h, arena_);
    if (form == Form::kDot && layer_.weight_format != kFp8) {
      for (int64_t p = 0; p < e.n_pairs; ++p)
        e.x.rows[p] = x_row(e.pairs[p].token);
      continue;
    }
    if (form == Form::kDot) allocate_rows(e.x);
    add_gathers(e, e.x);
  }
}

// kDot: rows of its own.
void Chunk::allocate_rows(const Activations& a) {
  float* rows = arena_.take<float>(a.n * a.cols);
  for (int64_t t = 0; t < a.n; ++t) a.rows[t] = rows + t * a.cols;
}

// One item for each panel, or token, of what is to be gathered for an expert.
void Chunk::add_gathers(Expert& e, const Activations& a) {
  const int64_t n = is_panels(a.form) ? n_panels(kernels_, a) : a.n;
  for (int64_t i = 0; i < n; ++i) gathers_[n_gathers_++] = {&e, i};
}

void Chunk::allocate_middle() {
  for (Expert& e : groups_) {
    e.middle = allocate(kernels_, form_of(e), layer_.weight_format, e.n_pairs,
                         layer_.intermediate_size, arena_);
    if (e.middle.form == Form::kDot) allocate_rows(e.middle);
  }
}

void Chunk::convert_token(int64_t t) {
  const int64_t h = layer_.hidden_size;
  const char* source = static_cast<const char*>(tokens_.hidden) +
                       (t0_ + t) * h * (tokens_.hidden_is_bf16 != 0 ? 2 : 4);
  kernels_.to_float(source, tokens_.hidden_is_bf16 != 0, h, x_row(t0_ + t));
  if (quantised_) quantise(kernels_, x_token_[t], 0, 0, h, x_row(t0_ + t));
}

int Chunk::prepare(Team& team) {
  team.share(0, n_tokens_, [&](int64_t t) { convert_token(t); });
  team.share(1, n_gathers_, [&](int64_t i) { gather(gathers_[i]); });
  return 2;
}

void Chunk::prepare_alone() {
  for (int64_t t = 0; t < n_tokens_; ++t) convert_token(t);
  for (int64_t i = 0; i < n_gathers_; ++i) gather(gathers_[i]);
}

void Chunk::gather(const Item& item) {
  const Expert& e = *item.expert;
  if (quantised_)
    return copy_quantised(kernels_, e.x, item.index, x_token_[e.pairs[item.index].token - t0_]);
  const auto row = [&](int64_t t) { return x_row(e.pairs[t].token); };
  if (e.x.form == Form::kDot)
    return store_row(e.x, item.index, 0, layer_.hidden_size, row(item.index));
  const Panel panel = panel_of(kernels_, e.x, item.index);
  const float* rows[kMaxPanelTokens];
  for (int64_t t = 0; t < panel.tokens; ++t) rows[t] = row(panel.first + t);
  pack_panel(kernels_, e.x, item.index, rows);
}

// Where weights are read after a tile of the first pass, if this thread takes the following one, or
// after an expert's in the second.
Next Chunk::after_gate_tile(int64_t tile) const {
  const int64_t per_expert = tiles(layer_.intermediate_size);
  if (++tile == groups_.n_experts * per_expert) return place_of(down(groups_.experts[0]), 0);
  return place_of(gate_up(groups_.experts[tile / per_expert]), tile % per_expert * tile_);
}

Next Chunk::after_down(const Expert* e, int64_t tile) const {
  if (++e == groups_.end()) return place_of(down(groups_.experts[0]), (tile + 1) * tile_);
  return place_of(down(*e), tile * tile_);
}

// The tile of gate and up rows, activated, as part of the expert's middle.
void Chunk::gate_tile(int64_t tile, const Scratch& s) {
  const int64_t per_expert = tiles(layer_.intermediate_size);
  const Expert& e = groups_.experts[tile / per_expert];
  const int64_t i0 = tile % per_expert * tile_;
  const int64_t i1 = std::min(i0 + tile_, layer_.intermediate_size);
  const Matrix m = gate_up(e);
  const bool has_gate = layer_.has_gate != 0;
  const int64_t up = layer_.intermediate_size;
  const Next then = after_gate_tile(tile);
  const Next then_up = has_gate ? place_of(m, up + i0) : then;
  const int gate_offset = product(kernels_, m, e.x, i0, i1, s.c, s, then_up);
  int up_offset = 0;
  if (has_gate) up_offset = product(kernels_, m, e.x, up + i0, up + i1, s.other, s, then);
  store_middle(e, i0, i1, gate_offset, up_offset, s);
}

void Chunk::store_middle(const Expert& e, int64_t i0, int64_t i1, int gate_offset, int up_offset,
                         const Scratch& s) {
  const int64_t rows = i1 - i0;
  const auto activate = [&](int64_t gate_at, int64_t up_at, int64_t n, float* out) {
    kernels_.activate(layer_.activation, layer_.alpha, layer_.limit, s.c + gate_at,
                      layer_.has_gate != 0 ? s.other + up_at : nullptr, n, out);
  };
  if (!is_panels(e.middle.form)) {
    for (int64_t t = 0; t < e.n_pairs; ++t) {
      const int64_t at = t * s.stride;
      float* out = s.c + at + gate_offset;
      activate(at + gate_offset, at + up_offset, rows, out);
      if (e.middle.form == Form::kDot)
        store_row(e.middle, t, i0, rows, out);
      else
        quantise(kernels_, e.middle, t, i0, rows, out);
    }
    return;
  }
  for (int64_t p = 0; p < n_panels(kernels_, e.middle); ++p) {
    const Panel panel = panel_of(kernels_, e.middle, p);
    float* value = s.c + panel.first * rows;
    activate(panel.first * rows, panel.first * rows, rows * panel.width, value);
    store_panel_rows(kernels_, e.middle, p, i0, rows, value);
  }
}

// The tile of gate_up rows as they are, for an activation that the caller computes.
void Chunk::raw_tile(int64_t tile, const Scratch& s, float* first) {
  const int64_t per_expert = tiles(gate_up(groups_.experts[0]).rows);
  const Expert& e = groups_.experts[tile / per_expert];
  const Matrix m = gate_up(e);
  const int64_t r0 = tile % per_expert * tile_;
  const int64_t r1 = std::min(r0 + tile_, m.rows);
  const int offset = product(kernels_, m, e.x, r0, r1, s.c, s);
  float* base = first + e.first_pair * m.rows + r0;
  for_each_token(kernels_, e.x, r1 - r0, offset, s, [&](int64_t t, const float* y) {
    memcpy(base + t * m.rows, y, static_cast<size_t>(r1 - r0) * sizeof(float));
  });
}

void Chunk::gather_middle(const Item& item, const float* middle) {
  const Expert& e = *item.expert;
  const int64_t width = layer_.intermediate_size;
  const float* base = middle + e.first_pair * width;
  if (e.middle.form == Form::kDot) {
    store_row(e.middle, item.index, 0, width, base + item.index * width);
  } else if (e.middle.form == Form::kQuantised) {
    quantise(kernels_, e.middle, item.index, 0, width, base + item.index * width);
  } else {
    const Panel panel = panel_of(kernels_, e.middle, item.index);
    const float* rows[kMaxPanelTokens];
    for (int64_t t = 0; t < panel.tokens; ++t) rows[t] = base + (panel.first + t) * width;
    pack_panel(kernels_, e.middle, item.index, rows);
  }
}

// A tile of output rows: zero, then every expert's weighted share, in the experts' order.
void Chunk::down_tile(int64_t tile, const Scratch& s, float* out) {
  const int64_t h = layer_.hidden_size;
  const int64_t r0 = tile * tile_;
  const int64_t r1 = std::min(r0 + tile_, h);
  for (int64_t t = t0_; t < t0_ + n_tokens_; ++t) std::fill(out + t * h + r0, out + t * h + r1, 0.f);
  for (const Expert& e : groups_) {
    const int offset = product(kernels_, down(e), e.middle, r0, r1, s.c, s, after_down(&e, tile));
    for_each_token(kernels_, e.middle, r1 - r0, offset, s, [&](int64_t t, const float* y) {
      kernels_.axpy(e.pairs[t].weight, y, r1 - r0, out + e.pairs[t].token * h + r0);
    });
  }
}

void Chunk::run(float* out) {
  allocate_inputs();
  allocate_middle();
  const bool serial = n_tokens_ <= kSerialTokens;
  if (serial) prepare_alone();
  Team team(threads_);
  team.run([&](int thread) {
    const Scratch& s = scratch_[thread];
    const int stage = serial ? 0 : prepare(team);
    team.share(stage, groups_.n_experts * tiles(layer_.intermediate_size),
               [&](int64_t i) { gate_tile(i, s); });
    team.share(stage + 1, tiles(layer_.hidden_size), [&](int64_t i) { down_tile(i, s, out); });
  });
}

void Chunk::first(float* first) {
  if (groups_.n_experts == 0) return;
  allocate_inputs();
  const int64_t n_raw = groups_.n_experts * tiles(gate_up(groups_.experts[0]).rows);
  Team team(threads_);
  team.run([&](int thread) {
    team.share(prepare(team), n_raw, [&](int64_t i) { raw_tile(i, scratch_[thread], first); });
  });
}

void Chunk::second(const float* middle, float* out) {
  gathers_ = arena_.take<Item>(groups_.n_pairs);
  allocate_middle();
  for (Expert& e : groups_) add_gathers(e, e.middle);
  Team team(threads_);
  team.run([&](int thread) {
    team.share(0, n_gathers_, [&](int64_t i) { gather_middle(gathers_[i], middle); });
    team.share(1, tiles(layer_.hidden_size),
               [&](int64_t i) { down_tile(i, scratch_[thread], out); });
  });
}

int64_t chunk_tokens(const cpux_layer& layer, const cpux_tokens& tokens) {
  const int64_t pair_bytes = (2 * layer.hidden_size + layer.intermediate_size) * 4;
  const int64_t pairs = std::max<int64_t>(kMaxPanelTokens, kChunkBytes / pair_bytes);
  return std::max<int64_t>(1, pairs / std::max<int64_t>(1, tokens.top_k));
}

// work(Chunk) for one chunk of all tokens; `between` [n_pairs, ...] lies between the passes.
template <class F>
int with_chunk(int isa, int threads, const cpux_layer& layer, const cpux_tokens& tokens,
               const float* between, F work) {
  const bool valid = is_valid(layer) && is_valid(tokens) &&
                     (between != nullptr || cpux_count_pairs(&tokens) == 0);
  return guarded(isa, threads, valid, [&](const Kernels& kernels) {
    Chunk chunk(kernels, threads, layer, tokens, 0, tokens.n_tokens);
    work(chunk);
  });
}

}  // namespace

}  // namespace cpux

int cpux_run(int isa, int threads, const cpux_layer* layer, const cpux_tokens* tokens,
             float* out) {
  using namespace cpux;
  const bool valid = is_valid(*layer) && layer->activation >= kSilu &&
                     layer->activation <= kClampedSwiglu && is_valid(*tokens);
  return guarded(isa, threads, valid, [&](const Kernels& kernels) {
    const int64_t step = chunk_tokens(*layer, *tokens);
    for (int64_t t = 0; t < tokens->n_tokens; t += step)
      Chunk(kernels, threads, *layer, *tokens, t, std::min(t + step, tokens->n_tokens)).run(out);
  });
}

int cpux_first(int isa, int threads, const cpux_layer* layer, const cpux_tokens* tokens,
               float* first) {
  return cpux::with_chunk(isa, threads, *layer, *tokens, first,
                          [&](cpux::Chunk& chunk) { chunk.first(first); });
}

int cpux_second(int isa, int threads, const cpux_layer* layer, const cpux_tokens* tokens,
                const float* middle, float* out) {
  return cpux::with_chunk(isa, threads, *layer, *tokens, middle,
                          [&](cpux::Chunk& chunk) { chunk.second(middle, out); });
}
