"""Experts with many tokens, by Triton from slot memory: all of a prompt's hits in three launches.

A program multiplies a tile of tokens of one expert with rows of its matrix, on tensor cores with
sums in fp32. The first kernel gives the activation of `gate_up` in the model's dtype, the second
rows of `down` for each pair, with the routing weight, and the third adds a token's pairs to the
layer's sum, in the order of its choice: the same each time. Tokens come sorted by expert, and a
table says which tile is whose; one expert alone needs no table, so nothing is sent for it. Packed
weights stay packed in memory: the bits of a word go to as many products, each with the columns that
they belong to.

Import this only where Triton is installed. Without a GPU it runs in Triton's interpreter, which is
what the tests of every run use; docs/PERFORMANCE.md has what a GPU gave.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.kernels.oracle import apply_activation
from moe_offload.kernels.triton_experts import TritonExperts
from moe_offload.kernels.triton_kernels import (
    activate,
    decode_fp8,
    in_slot,
    level,
    load_offsets,
    load_scales,
    scale_place,
)

SUM_COLUMNS: Final = 1024  # of a program that adds up pairs
_PAIRS_BYTES: Final = 64 << 20  # at most, of what pairs give before it is added up: groups at once
LEAST_CAPABILITY: Final = 80  # Ampere: from there on tensor cores multiply bf16
Groups = Sequence[tuple[int, int, int]]  # a slot, its first place among sorted pairs, how many
# What changes from call to call: no variant is compiled for it.
VARYING: Final = ("top_k", "slot", "first", "n_tokens")


@dataclass(frozen=True)
class Tile:
    """What a program computes, in how large steps: of a row-major matrix, or words of a packed one.

    32 words are 128 or 256 columns.
    """

    tokens: int = 64
    rows: int = 64
    columns: int = 64
    words: int = 32
    n_warps: int = 8


@triton.jit
def _tile_of(tiles, slot, first, n_tokens, ONE: tl.constexpr, TOKENS: tl.constexpr):
    """This program's slot, its places in the sorted pairs and which are its, rows of `middle`."""
    tile = tl.program_id(0)
    if ONE:
        start = first + tile * TOKENS
        end = first + n_tokens
        row = tile * TOKENS
        slot = slot.to(tl.int64)
    else:
        slot = tl.load(tiles + 4 * tile).to(tl.int64)
        start = tl.load(tiles + 4 * tile + 1)
        end = tl.load(tiles + 4 * tile + 2)
        row = tl.load(tiles + 4 * tile + 3)
    place = start + tl.arange(0, TOKENS)
    return slot, place, place < end, (row + tl.arange(0, TOKENS)).to(tl.int64)


@triton.jit
def _product(
    x,  # [TOKENS, 1] addresses of rows
    there, matrix, scales, offsets, rows, valid, n_columns, CODES: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, OFFSET: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """fp32 [TOKENS, ROWS]: the rows of x times rows of the matrix, whose weights get x's dtype."""
    acc = tl.zeros([TOKENS, ROWS], tl.float32)
    if CODES == "float" or CODES == "fp8":
        for start in range(0, n_columns, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            inside = column < n_columns
            value = tl.load(x + column[None, :], mask=there[:, None] & inside[None, :], other=0.0)
            mask = inside[:, None] & valid[None, :]
            at = rows.to(tl.int64)[None, :] * n_columns + column[:, None]
            weight = tl.load(matrix + at, mask=mask, other=0)
            if CODES == "fp8":
                at = (rows // SCALE_ROWS)[None, :] + column[:, None] * 0
                if GROUP > 0:
                    at = at * ((n_columns + GROUP - 1) // GROUP) + column[:, None] // GROUP
                weight = decode_fp8(weight) * load_scales(scales, at, mask)
            acc = tl.dot(value, weight.to(value.dtype), acc, input_precision="ieee")
    else:
        BITS: tl.constexpr = 8 if CODES == "int8" else 4
        PARTS: tl.constexpr = 32 // BITS
        n_groups = (n_columns + 31) // 32
        row_block = (rows // 16)[None, :]
        lane = (rows % 16)[None, :]
        for start in range(0, n_groups * BITS, WORDS):
            w = start + tl.arange(0, WORDS)
            inside = (w < n_groups * BITS)[:, None] & valid[None, :]
            at = (row_block * (n_groups * BITS) + w[:, None]) * 16 + lane
            word = tl.load(matrix + at, mask=inside, other=0)
            group = w // BITS
            at = scale_place(row_block, group[:, None], n_groups, GROUP) + lane
            scale = load_scales(scales, at, inside)
            offset = tl.zeros([WORDS, ROWS], tl.float32)
            if OFFSET != "":
                own: tl.constexpr = 128 if BITS == 8 else 8
                offset = load_offsets(offsets, at, inside, scale, own, OFFSET)
            first = group * 32 + (w % BITS) * 4
            for part in range(PARTS):  # not unrolled: a minute's compilation
                low = part % 4
                high = part // 4
                column = first + low + 16 * high
                mask = there[:, None] & (column < n_columns)[None, :]
                value = tl.load(x + column[None, :], mask=mask, other=0.0)
                weight = level(word, 8 * low + 4 * high, CODES) * scale + offset
                acc = tl.dot(value, weight.to(value.dtype), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=VARYING)
def first_tiles_kernel(
    x,  # [T, H]
    pairs,  # int64: t * K + k, sorted by expert
    tiles,  # int32 [tiles, 4]: slot, first and last place in `pairs`, row of `middle`; unless ONE
    slot, first, n_tokens,
    matrix,  # the slots, as in first_kernel
    scales, offsets, biases,
    middle,  # [rows, I] in x's dtype, or [rows, R] for KIND "module"
    n_columns, intermediate, top_k, block_words, matrix_offset, scale_offset, offset_offset,
    bias_offset, alpha, limit, CODES: tl.constexpr, MATRIX_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, OFFSET_BYTES: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, OFFSET: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, ONE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    slot, place, there, out_row = _tile_of(tiles, slot, first, n_tokens, ONE, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < intermediate
    token = tl.load(pairs + place, mask=there, other=0) // top_k
    x += token[:, None] * n_columns
    matrix, scales, offsets, biases = in_slot(
        slot, matrix, scales, offsets, biases,
        block_words, matrix_offset, scale_offset, offset_offset, bias_offset,
        MATRIX_BYTES, SCALE_BYTES, OFFSET_BYTES,
    )  # fmt: skip
    gate = _product(
        x, there, matrix, scales, offsets, row, valid, n_columns,
        CODES, GROUP, SCALE_ROWS, OFFSET, TOKENS, ROWS, COLUMNS, WORDS,
    )  # fmt: skip
    if HAS_BIAS:
        gate += tl.load(biases + row, mask=valid, other=0.0)[None, :]
    up = gate
    if HAS_GATE:
        up = _product(
            x, there, matrix, scales, offsets, row + intermediate, valid, n_columns,
            CODES, GROUP, SCALE_ROWS, OFFSET, TOKENS, ROWS, COLUMNS, WORDS,
        )  # fmt: skip
        if HAS_BIAS:
            up += tl.load(biases + intermediate + row, mask=valid, other=0.0)[None, :]
    mask = there[:, None] & valid[None, :]
    if KIND == "module":
        width = intermediate
        if HAS_GATE:
            width = 2 * intermediate
            at = out_row[:, None] * width + intermediate + row[None, :]
            tl.store(middle + at, up.to(middle.dtype.element_ty), mask=mask)
        tl.store(
            middle + out_row[:, None] * width + row[None, :],
            gate.to(middle.dtype.element_ty),
            mask=mask,
        )
    else:
        value = activate(gate, up, alpha, limit, KIND, HAS_GATE)
        at = out_row[:, None] * intermediate + row[None, :]
        tl.store(middle + at, value.to(middle.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=VARYING)
def second_tiles_kernel(
    middle,  # [rows, I]
    pairs, tiles, slot, first, n_tokens, matrix, scales, offsets, biases,
    weights,  # fp32 [T * K]
    out,  # fp32 [rows, H]
    row_of_pair,  # int32 [T * K], which row a pair's is
    n_columns,  # I
    hidden_size, block_words, matrix_offset, scale_offset, offset_offset, bias_offset,
    CODES: tl.constexpr, MATRIX_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr,
    OFFSET_BYTES: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, ONE: tl.constexpr, TOKENS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    slot, place, there, in_row = _tile_of(tiles, slot, first, n_tokens, ONE, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < hidden_size
    matrix, scales, offsets, biases = in_slot(
        slot, matrix, scales, offsets, biases,
        block_words, matrix_offset, scale_offset, offset_offset, bias_offset,
        MATRIX_BYTES, SCALE_BYTES, OFFSET_BYTES,
    )  # fmt: skip
    value = _product(
        middle + in_row[:, None] * n_columns, there, matrix, scales, offsets, row, valid, n_columns,
        CODES, GROUP, SCALE_ROWS, OFFSET, TOKENS, ROWS, COLUMNS, WORDS,
    )  # fmt: skip
    if HAS_BIAS:
        value += tl.load(biases + row, mask=valid, other=0.0)[None, :]
    pair = tl.load(pairs + place, mask=there, other=0)
    value *= tl.load(weights + pair, mask=there, other=0.0)[:, None]
    at = in_row[:, None] * hidden_size + row[None, :]
    tl.store(out + at, value, mask=there[:, None] & valid[None, :])
    if tl.program_id(1) == 0:
        tl.store(row_of_pair + pair, in_row.to(tl.int32), mask=there)


@triton.jit(do_not_specialize=("top_k",))
def add_pairs_kernel(
    each,  # fp32 [rows, H]
    row_of_pair,  # int32 [T * K], -1 where a pair has none
    out,  # fp32 [T, H], added to
    hidden_size,
    top_k,
    COLUMNS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < hidden_size
    total = tl.zeros([COLUMNS], tl.float32)
    for choice in range(top_k):
        row = tl.load(row_of_pair + token * top_k + choice).to(tl.int64)
        if row >= 0:
            total += tl.load(each + row * hidden_size + column, mask=inside, other=0.0)
    at = out + token * hidden_size + column
    tl.store(at, tl.load(at, mask=inside, other=0.0) + total, mask=inside)


def tile_constants(constants: Mapping[str, object], tile: Tile) -> dict[str, Any]:
    """What a format makes constant in these kernels, of `format_constants`."""
    return {
        **{name: value for name, value in constants.items() if name != "STEP"},
        "TOKENS": tile.tokens,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "WORDS": tile.words,
    }


DEFAULT_TILE: Final = Tile()


def runs_tiles(device: torch.device) -> bool:
    """Whether the kernels are for this device's GPU."""
    if device.type != "cuda":
        return True
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor >= LEAST_CAPABILITY


class TiledExperts:
    """Adds experts with many tokens to a layer's sum."""

    def __init__(self, experts: TritonExperts, tile: Tile = DEFAULT_TILE) -> None:
        self._experts = experts
        self._tile = tile
        self._constants = tile_constants(experts.constants, tile)
        self._no_tiles = torch.zeros(4, dtype=torch.int32, device=experts.slots.device)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile what hidden states of `dtype` will need."""
        if not len(self._experts.slots):
            return
        layout, device = self._experts.layout, self._experts.slots.device
        hidden = torch.zeros(2, layout.hidden_size, dtype=dtype, device=device)
        out = torch.zeros(hidden.shape, device=device)
        pairs = torch.zeros(2, dtype=torch.int64, device=device)
        weights = torch.zeros(2, 1, device=device)
        for groups in ([(0, 0, 2)], [(0, 0, 1), (0, 1, 1)]):
            self.add(hidden, groups, pairs, weights, out)

    def add(
        self,
        hidden: Tensor,
        groups: Groups,
        pairs: Tensor,
        weights: Tensor,
        out: Tensor,
    ) -> None:
        """Add what experts give to `out`, fp32 [T, H].

        A group is a slot, and which of `pairs` are its: from which on, and how many.
        `hidden` is [T, H], `weights` [T, K] and `pairs` int64, all on the slots' device.
        """
        most = _PAIRS_BYTES // (4 * self._experts.layout.hidden_size)
        part: list[tuple[int, int, int]] = []
        for group in groups:
            if part and sum(n for _, _, n in (*part, group)) > most:
                self._add(hidden, part, pairs, weights, out)
                part = []
            part.append(group)
        self._add(hidden, part, pairs, weights, out)

    def _add(
        self, hidden: Tensor, groups: Groups, pairs: Tensor, weights: Tensor, out: Tensor
    ) -> None:
        experts = self._experts
        layout, activation = experts.layout, experts.activation
        width, hidden_size = layout.intermediate_size, layout.hidden_size
        n_tiles, which = self._tiles(groups)
        raw = activation.kind == "module"
        n_rows = sum(n for _, _, n in groups)
        middle = torch.empty(
            n_rows, layout.first_rows if raw else width, dtype=hidden.dtype, device=hidden.device
        )
        each = torch.empty(n_rows, hidden_size, device=hidden.device)
        row_of_pair = torch.full(weights.shape, -1, dtype=torch.int32, device=hidden.device)
        shared = {
            **self._constants,
            "HAS_BIAS": layout.has_bias,
            "ONE": len(groups) == 1,
            "enable_fp_fusion": True,
            "num_warps": self._tile.n_warps,
        }
        first_tiles_kernel[(n_tiles, triton.cdiv(width, self._tile.rows))](
            hidden.contiguous(),
            pairs,
            *which,
            *experts.memory(),
            middle,
            hidden_size,
            width,
            weights.shape[1],
            *experts.offsets("gate_up"),
            activation.alpha,
            activation.limit,
            HAS_GATE=layout.has_gate,
            KIND=activation.kind,
            **shared,
        )
        if raw:
            middle = apply_activation(middle, activation, layout.has_gate, experts.act_module)
            middle = middle.to(hidden.dtype).contiguous()
        second_tiles_kernel[(n_tiles, triton.cdiv(hidden_size, self._tile.rows))](
            middle,
            pairs,
            *which,
            *experts.memory(),
            weights.float().contiguous(),
            each,
            row_of_pair,
            width,
            hidden_size,
            *experts.offsets("down"),
            **shared,
        )
        add_pairs_kernel[(len(out), triton.cdiv(hidden_size, SUM_COLUMNS))](
            each,
            row_of_pair,
            out,
            hidden_size,
            weights.shape[1],
            COLUMNS=SUM_COLUMNS,
            enable_fp_fusion=True,
        )

    def _tiles(self, groups: Groups) -> tuple[int, tuple[Tensor | int, ...]]:
        """How many tiles there are, and the kernels' arguments that say which."""
        if len(groups) == 1:
            (group,) = groups
            return triton.cdiv(group[2], self._tile.tokens), (self._no_tiles, *group)
        rows: list[tuple[int, int, int, int]] = []
        n_before = 0
        for slot, first, n in groups:
            starts = range(0, n, self._tile.tokens)
            rows += [(slot, first + start, first + n, n_before + start) for start in starts]
            n_before += n
        # As a decode step's slots: so little CUDA takes without holding the host up.
        table = torch.tensor(rows, dtype=torch.int32)
        table = table.to(self._no_tiles.device, non_blocking=True)
        return len(rows), (table, 0, 0, 0)
