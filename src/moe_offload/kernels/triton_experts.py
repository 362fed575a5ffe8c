"""The expert FFN from slot memory by Triton kernels, for all hits of a layer together.

Two launches compute every (token, expert) pair of a layer: rows of `gate_up` with the activation,
then rows of `down` with the routing weight. A third sums each token's pairs. A program computes one
tile of rows of one pair; programs of one row tile and different pairs run side by side, so tokens
that share an expert share its bytes in the L2 cache. Packed formats are read as int32 words,
which lie contiguously as [row block, word, 16 rows], and are dequantised in registers. Products and
sums are fp32.

In decode the pairs' slots travel as arguments of the launch, or, in a recorded graph, lie in
memory of the host that the GPU reads: a step's layer sends nothing. fp8 is decoded by its bits:
no GPU needs units for it.

Import this only where Triton is installed. Without a GPU it runs in Triton's interpreter, which is
what the tests of every run use; docs/PERFORMANCE.md has what a GPU gave.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.checkpoint.block import Activation, BlockLayout, MatrixName
from moe_offload.config import WEIGHT_FORMATS, Scales
from moe_offload.kernels.oracle import ActivationModule, apply_activation

ROWS: Final = 16  # of a tile: one row block of the packed layout
DENSE_COLUMNS: Final = 256  # per step: 8 KiB of bf16 in a tile
WORDS: Final = 128  # per step: 8 KiB of packed weights in a tile
SLOT_BITS: Final = 15
SLOTS_PER_WORD: Final = 4
N_SLOT_WORDS: Final = 4
# What changes from step to step, or between a prompt and decode: no variant is compiled for it.
VARYING: Final = ("top_k", "slots_0", "slots_1", "slots_2", "slots_3")


@triton.jit
def _slot_of(pair, slot_of_pair, slots_0, slots_1, slots_2, slots_3, IN_WORDS: tl.constexpr):
    """The slot of a pair, -1 where it is not ours: from four words of four slots, or memory."""
    if IN_WORDS:
        which = pair // 4
        word = tl.where(
            which == 0,
            slots_0,
            tl.where(which == 1, slots_1, tl.where(which == 2, slots_2, slots_3)),
        )
        slot = ((word >> (15 * (pair % 4)).to(tl.int64)) & 32767) - 1
    else:
        # .cv: in a graph it is the host's memory, of which a cache may hold the step before.
        slot = tl.load(slot_of_pair + pair, cache_modifier=".cv").to(tl.int64)
    return slot


@triton.jit
def load_scales(scales, at, mask):
    """fp32; a byte is an exponent (E8M0)."""
    scale = tl.load(scales + at, mask=mask, other=0)
    if scale.dtype == tl.uint8:
        bits = tl.where(scale == 0, 1 << 22, scale.to(tl.int32) << 23)
        return bits.to(tl.float32, bitcast=True)
    return scale.to(tl.float32)


@triton.jit
def load_offsets(offsets, at, mask, scale, OWN: tl.constexpr, OFFSET: tl.constexpr):
    """What is added to q * scale where a group has a zero or minimum of its own."""
    offset = tl.load(offsets + at, mask=mask, other=0).to(tl.float32)
    if OFFSET == "zero":
        return (OWN - offset) * scale
    return OWN * scale + offset


@triton.jit
def level(word, shift, CODES: tl.constexpr):
    """fp32 of the 8 or 4 bits from bit `shift` of each packed word."""
    if CODES == "int8":
        return ((word << (24 - shift)) >> 24).to(tl.float32)
    code = (word >> shift) & 15
    if CODES == "int4":
        return (code - 8).to(tl.float32)
    size = code & 7  # E2M1: twice the number is 0 to 4, 6, 8, 12
    halves = tl.where(size < 5, size, tl.where(size == 5, 6, (size - 4) * 4))
    return tl.where(code < 8, halves, -halves).to(tl.float32) * 0.5


@triton.jit
def _dot_dense(
    matrix,
    scales,
    rows,
    valid,
    x,
    n_columns,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """fp32 [ROWS]: rows of the row-major `matrix` times the vector `x`.

    A step has one scale for each row.
    """
    acc = tl.zeros([rows.shape[0], COLUMNS], tl.float32)
    for start in range(0, n_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < n_columns
        value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        address = matrix + rows.to(tl.int64)[:, None] * n_columns + column[None, :]
        weight = tl.load(address, mask=valid[:, None] & inside[None, :], other=0)
        if CODES == "fp8":
            at = rows // SCALE_ROWS
            if GROUP > 0:
                at = at * ((n_columns + GROUP - 1) // GROUP) + start // GROUP
            scale = load_scales(scales, at, valid)
            acc += decode_fp8(weight) * (value[None, :] * scale[:, None])
        else:
            acc += weight.to(tl.float32) * value[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def decode_fp8(byte):
    """fp32 of e4m3, finite: as float16 its bits lie seven places up, and give 2^-8 of it."""
    bits = byte.to(tl.int16)
    half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    return half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0


@triton.jit
def _dot_packed(
    words,
    scales,
    offsets,
    rows,
    valid,
    x,
    n_columns,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    WORDS: tl.constexpr,
):
    """fp32 [ROWS]: the same for a packed matrix; 32 columns of a row are BITS words."""
    BITS: tl.constexpr = 8 if CODES == "int8" else 4
    n_groups = (n_columns + 31) // 32
    row_block = rows // 16
    lane = rows % 16
    acc = tl.zeros([WORDS, rows.shape[0]], tl.float32)
    for start in range(0, n_groups * BITS, WORDS):
        w = start + tl.arange(0, WORDS)
        inside = (w < n_groups * BITS)[:, None] & valid[None, :]
        at = (row_block[None, :] * (n_groups * BITS) + w[:, None]) * 16 + lane[None, :]
        word = tl.load(words + at, mask=inside, other=0)
        group = w // BITS
        at = scale_place(row_block[None, :], group[:, None], n_groups, GROUP) + lane[None, :]
        scale = load_scales(scales, at, inside)
        first = group * 32 + (w % BITS) * 4
        part = tl.zeros([WORDS, rows.shape[0]], tl.float32)
        total = tl.zeros([WORDS], tl.float32)
        for j in tl.static_range(4):
            column = first + j
            value = tl.load(x + column, mask=column < n_columns, other=0.0).to(tl.float32)
            part += level(word, 8 * j, CODES) * value[:, None]
            total += value
            if BITS == 4:
                column += 16
                value = tl.load(x + column, mask=column < n_columns, other=0.0).to(tl.float32)
                part += level(word, 8 * j + 4, CODES) * value[:, None]
                total += value
        acc += part * scale
        if OFFSET != "":
            own: tl.constexpr = 128 if BITS == 8 else 8
            acc += load_offsets(offsets, at, inside, scale, own, OFFSET) * total[:, None]
    return tl.sum(acc, axis=0)


@triton.jit
def scale_place(row_block, group, n_groups, GROUP: tl.constexpr):
    """Where the 16 scales of a row block and group of 32 columns start; GROUP 0: one for all."""
    if GROUP == 0:
        return (row_block + group * 0) * 16
    n_scales = (n_groups * 32 + GROUP - 1) // GROUP
    return (row_block * n_scales + group // (GROUP // 32)) * 16


@triton.jit
def _dot(
    matrix,
    scales,
    offsets,
    rows,
    valid,
    x,
    n_columns,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    STEP: tl.constexpr,
):
    if CODES == "float" or CODES == "fp8":
        return _dot_dense(matrix, scales, rows, valid, x, n_columns, CODES, GROUP, SCALE_ROWS, STEP)
    else:  # noqa: RET505 - Triton wants one return per branch
        return _dot_packed(
            matrix, scales, offsets, rows, valid, x, n_columns, CODES, GROUP, OFFSET, STEP
        )


@triton.jit
def activate(gate, up, alpha, limit, KIND: tl.constexpr, HAS_GATE: tl.constexpr):
    """`oracle.apply_activation`; comparisons are written so that NaN stays NaN."""
    if KIND == "clamped_swiglu":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        value = (up + 1) * gate * tl.sigmoid(alpha * gate)
    else:
        if KIND == "silu":
            value = gate * tl.sigmoid(gate)
        elif KIND == "gelu":
            value = gate * 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        elif KIND == "gelu_tanh":
            inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
            value = gate * tl.sigmoid(2 * inner)
        elif KIND == "relu":
            value = tl.where(gate < 0, 0.0, gate)
        else:
            value = tl.where(gate < 0, 0.0, gate)
            value = value * value
        if HAS_GATE:
            value = value * up
    return value


@triton.jit(do_not_specialize=VARYING)
def first_kernel(
    x,  # [T, H]
    matrix,  # the slots, as the matrix's words or elements
    scales,  # the slots, in the scales' dtype
    offsets,  # the slots, in the dtype of zeros or minima
    biases,  # the slots, as float32
    slot_of_pair,  # int32 [T * K], read unless IN_WORDS
    slots_0,  # int64: the slots of pairs 0 to 3, each plus one, in 15 bits
    slots_1,
    slots_2,
    slots_3,
    middle,  # fp32 [T * K, I], or [T * K, R] for KIND "module"
    n_columns,
    intermediate,
    top_k,
    block_words,  # int32 words from slot to slot; multiplied, not divided, so that the
    matrix_offset,  # compiler knows the alignment. Offsets count elements of their own array.
    scale_offset,
    offset_offset,
    bias_offset,
    alpha,
    limit,
    CODES: tl.constexpr,
    MATRIX_BYTES: tl.constexpr,  # of an element
    SCALE_BYTES: tl.constexpr,
    OFFSET_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    KIND: tl.constexpr,
    IN_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < intermediate
    slot = _slot_of(pair, slot_of_pair, slots_0, slots_1, slots_2, slots_3, IN_WORDS)
    if slot >= 0:
        matrix += slot * (block_words * (4 // MATRIX_BYTES)) + matrix_offset
        scales += slot * (block_words * (4 // SCALE_BYTES)) + scale_offset
        offsets += slot * (block_words * (4 // OFFSET_BYTES)) + offset_offset
        biases += slot * block_words + bias_offset
        x += (pair // top_k).to(tl.int64) * n_columns
        gate = _dot(
            matrix,
            scales,
            offsets,
            row,
            valid,
            x,
            n_columns,
            CODES,
            GROUP,
            SCALE_ROWS,
            OFFSET,
            STEP,
        )
        if HAS_BIAS:
            gate += tl.load(biases + row, mask=valid, other=0.0)
        up = gate
        if HAS_GATE:
            up = _dot(
                matrix,
                scales,
                offsets,
                row + intermediate,
                valid,
                x,
                n_columns,
                CODES,
                GROUP,
                SCALE_ROWS,
                OFFSET,
                STEP,
            )
            if HAS_BIAS:
                up += tl.load(biases + intermediate + row, mask=valid, other=0.0)
        if KIND == "module":
            width = intermediate
            if HAS_GATE:
                width = 2 * intermediate
                tl.store(middle + pair.to(tl.int64) * width + intermediate + row, up, mask=valid)
            tl.store(middle + pair.to(tl.int64) * width + row, gate, mask=valid)
        else:
            value = activate(gate, up, alpha, limit, KIND, HAS_GATE)
            tl.store(middle + pair.to(tl.int64) * intermediate + row, value, mask=valid)


@triton.jit(do_not_specialize=VARYING)
def second_kernel(
    middle,  # fp32 [T * K, I]
    matrix,
    scales,
    offsets,
    biases,
    slot_of_pair,
    slots_0,
    slots_1,
    slots_2,
    slots_3,
    weights,  # fp32 [T * K]
    out,  # fp32 [T * K, H]
    n_columns,  # I
    hidden_size,
    block_words,
    matrix_offset,
    scale_offset,
    offset_offset,
    bias_offset,
    CODES: tl.constexpr,
    MATRIX_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr,
    OFFSET_BYTES: tl.constexpr,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN_WORDS: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
):
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < hidden_size
    slot = _slot_of(pair, slot_of_pair, slots_0, slots_1, slots_2, slots_3, IN_WORDS)
    value = tl.zeros([ROWS], tl.float32)
    if slot >= 0:
        matrix += slot * (block_words * (4 // MATRIX_BYTES)) + matrix_offset
        scales += slot * (block_words * (4 // SCALE_BYTES)) + scale_offset
        offsets += slot * (block_words * (4 // OFFSET_BYTES)) + offset_offset
        biases += slot * block_words + bias_offset
        middle += pair.to(tl.int64) * n_columns
        value = _dot(
            matrix,
            scales,
            offsets,
            row,
            valid,
            middle,
            n_columns,
            CODES,
            GROUP,
            SCALE_ROWS,
            OFFSET,
            STEP,
        )
        if HAS_BIAS:
            value += tl.load(biases + row, mask=valid, other=0.0)
        value *= tl.load(weights + pair).to(tl.float32)
    tl.store(out + pair.to(tl.int64) * hidden_size + row, value, mask=valid)


@triton.jit
def unpack_kernel(
    words,  # one packed matrix
    scales,
    offsets,
    out,  # [n_rows, n_columns] row-major
    n_rows,
    n_columns,
    CODES: tl.constexpr,
    GROUP: tl.constexpr,
    OFFSET: tl.constexpr,
    WORDS: tl.constexpr,
):
    BITS: tl.constexpr = 8 if CODES == "int8" else 4
    row_block = tl.program_id(0)
    n_groups = (n_columns + 31) // 32
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 16)
    inside = (w < n_groups * BITS)[:, None] & (lane >= 0)[None, :]
    at = (row_block * (n_groups * BITS) + w[:, None]) * 16 + lane[None, :]
    word = tl.load(words + at, mask=inside, other=0)
    group = w // BITS
    at = scale_place(row_block, group[:, None], n_groups, GROUP) + lane[None, :]
    scale = load_scales(scales, at, inside)
    offset = tl.zeros([WORDS, 16], tl.float32)
    if OFFSET != "":
        own: tl.constexpr = 128 if BITS == 8 else 8
        offset = load_offsets(offsets, at, inside, scale, own, OFFSET)
    row = (row_block * 16 + lane)[None, :].to(tl.int64)
    first = (group * 32 + (w % BITS) * 4)[:, None]
    for j in tl.static_range(4):
        for half in tl.static_range(8 // BITS):
            column = first + j + 16 * half
            value = level(word, 8 * j + 4 * half, CODES) * scale + offset
            mask = (row < n_rows) & (column < n_columns)
            tl.store(out + row * n_columns + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def unpack_fp8_kernel(
    matrix,  # bytes [n_rows, n_columns]
    scales,
    out,
    n_rows,
    n_columns,
    GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None].to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (row < n_rows) & (column < n_columns)
    at = row // SCALE_ROWS + column * 0
    if GROUP > 0:
        at = at * ((n_columns + GROUP - 1) // GROUP) + column // GROUP
    scale = load_scales(scales, at, inside)
    byte = tl.load(matrix + row * n_columns + column, mask=inside, other=0)
    value = (decode_fp8(byte) * scale).to(out.dtype.element_ty)
    tl.store(out + row * n_columns + column, value, mask=inside)


_PAIRS_IN_WORDS: Final = SLOTS_PER_WORD * N_SLOT_WORDS
# Set in every word, so that Triton sees a 64-bit argument whatever the slots are.
_WORD_MARK: Final = 1 << 62


def format_constants(weight_format: str, scales: Scales) -> dict[str, object]:
    """What a format makes constant in `first_kernel` and `second_kernel`."""
    facts = WEIGHT_FORMATS[weight_format]
    step, size = WORDS, 4
    if not facts.group:
        # the largest power of two that divides the scales' columns
        step = min(DENSE_COLUMNS, scales.group & -scales.group or DENSE_COLUMNS)
        step, size = (step if facts.scales else DENSE_COLUMNS), facts.bits // 8
    return {
        "CODES": weight_format if facts.scales else "float",
        "MATRIX_BYTES": size,
        "SCALE_BYTES": getattr(torch, scales.dtype).itemsize,
        "OFFSET_BYTES": getattr(torch, scales.offset_dtype).itemsize,
        "GROUP": scales.group,
        "SCALE_ROWS": scales.rows,
        "OFFSET": scales.offset,
        "STEP": step,
    }


class TritonExperts:
    """The FFN of the experts in `slots`, uint8 [n_slots, block_bytes]."""

    def __init__(
        self,
        layout: BlockLayout,
        activation: Activation,
        slots: Tensor,
        act_module: ActivationModule | None = None,
    ) -> None:
        self.layout = layout
        self.activation = activation
        self.act_module = act_module
        self.slots = slots
        facts = WEIGHT_FORMATS[layout.weight_format]
        self._is_tiled = facts.group > 0
        element = {"float8_e4m3fn": "uint8"}.get(facts.dtype, facts.dtype)
        self._matrix = slots.view(torch.int32 if self._is_tiled else getattr(torch, element))
        scales = layout.matrix("down").scales or Scales("float16")
        self._scales = slots.view(getattr(torch, scales.dtype))
        self._offsets_of = slots.view(getattr(torch, scales.offset_dtype))
        self._biases = slots.view(torch.float32)
        self.constants = format_constants(layout.weight_format, scales)
        # Stands where the kernels expect slots in memory and these are in words.
        self._no_slots = torch.zeros(_PAIRS_IN_WORDS, dtype=torch.int32, device=slots.device)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every kernel that hidden states of `dtype` will need, by running it once."""
        layout, device = self.layout, self.slots.device
        hidden = torch.zeros(2, layout.hidden_size, dtype=dtype, device=device)
        for n_pairs in (1, _PAIRS_IN_WORDS + 1):  # slots in words, slots in memory
            self.grouped(hidden[:1], [-1] * n_pairs, torch.zeros(1, n_pairs, device=device))
        if len(self.slots):
            self.expert(0, hidden)

    def grouped(self, hidden: Tensor, slot_of_pair: Sequence[int], weights: Tensor) -> Tensor:
        """fp32 [T, H] for `hidden` [T, H] and `weights` [T, K] on the slots' device.

        `slot_of_pair` has T * K entries, -1 for a pair that is left out.
        """
        return self._grouped(hidden, *self._slot_arguments(slot_of_pair), weights)

    def grouped_by(self, hidden: Tensor, slot_of_pair: Tensor, weights: Tensor) -> Tensor:
        """The same by slots int32 [T * K] that the GPU reads: its own memory, or pinned."""
        slots: tuple[Tensor | int, ...] = (slot_of_pair, *[_WORD_MARK] * N_SLOT_WORDS)
        return self._grouped(hidden, False, slots, weights)

    def _grouped(
        self, hidden: Tensor, in_words: bool, slots: tuple[Tensor | int, ...], weights: Tensor
    ) -> Tensor:
        layout, activation = self.layout, self.activation
        n_tokens, top_k = weights.shape
        n_pairs, width = n_tokens * top_k, layout.intermediate_size
        raw = activation.kind == "module"
        middle = torch.empty(n_pairs, layout.first_rows if raw else width, device=hidden.device)
        first_kernel[(n_pairs, triton.cdiv(width, ROWS))](
            hidden.contiguous(),
            *self.memory(),
            *slots,
            middle,
            layout.hidden_size,
            width,
            top_k,
            *self.offsets("gate_up"),
            activation.alpha,
            activation.limit,
            **self.constants,
            HAS_GATE=layout.has_gate,
            HAS_BIAS=layout.has_bias,
            KIND=activation.kind,
            IN_WORDS=in_words,
            ROWS=ROWS,
            enable_fp_fusion=True,
        )
        if raw:
            first = middle.to(hidden.dtype)
            middle = apply_activation(first, activation, layout.has_gate, self.act_module)
            middle = middle.float().contiguous()
        out = torch.empty(n_tokens, top_k, layout.hidden_size, device=hidden.device)
        second_kernel[(n_pairs, triton.cdiv(layout.hidden_size, ROWS))](
            middle,
            *self.memory(),
            *slots,
            weights.float().contiguous(),
            out,
            width,
            layout.hidden_size,
            *self.offsets("down"),
            **self.constants,
            HAS_BIAS=layout.has_bias,
            IN_WORDS=in_words,
            ROWS=ROWS,
            enable_fp_fusion=True,
        )
        return out.sum(1) if top_k > 1 else out[:, 0]

    def expert(self, slot: int, x: Tensor) -> Tensor:
        """One expert for many tokens: x [n, H] -> [n, H] in x's dtype, through torch's GEMM."""
        layout = self.layout
        first = self._linear(slot, "gate_up", x, layout.first_rows)
        middle = apply_activation(first, self.activation, layout.has_gate, self.act_module)
        return self._linear(slot, "down", middle.to(x.dtype), layout.hidden_size)

    def _linear(self, slot: int, name: MatrixName, x: Tensor, n_rows: int) -> Tensor:
        block = self.slots[slot]
        stored = self.layout.field(name).view(block)
        bias = None
        if self.layout.has_bias:
            bias = self.layout.field(f"{name}_bias").view(block).to(x.dtype)
        matrix = self.layout.matrix(name)
        if matrix.scales is None:
            return torch.nn.functional.linear(x, stored.to(x.dtype), bias)
        n_columns = x.shape[1]
        weight = torch.empty(n_rows, n_columns, dtype=x.dtype, device=x.device)
        scale = self.layout.field(f"{name}_scale").view(block)
        if not self._is_tiled:
            unpack_fp8_kernel[(triton.cdiv(n_rows, ROWS), triton.cdiv(n_columns, DENSE_COLUMNS))](
                stored.view(torch.uint8),
                scale,
                weight,
                n_rows,
                n_columns,
                GROUP=matrix.scales.group,
                SCALE_ROWS=matrix.scales.rows,
                ROWS=ROWS,
                COLUMNS=DENSE_COLUMNS,
                enable_fp_fusion=True,
            )
            return torch.nn.functional.linear(x, weight, bias)
        offsets = scale
        if matrix.scales.offset:
            offsets = self.layout.field(f"{name}_{matrix.scales.offset}").view(block)
        n_words = stored.numel() // (4 * ROWS * stored.shape[0])
        unpack_kernel[(triton.cdiv(n_rows, ROWS), triton.cdiv(n_words, WORDS))](
            stored.view(torch.int32),
            scale,
            offsets,
            weight,
            n_rows,
            n_columns,
            CODES=self.layout.weight_format,
            GROUP=matrix.scales.group,
            OFFSET=matrix.scales.offset,
            WORDS=WORDS,
            enable_fp_fusion=True,
        )
        return torch.nn.functional.linear(x, weight, bias)

    def _slot_arguments(self, slot_of_pair: Sequence[int]) -> tuple[bool, tuple[Tensor | int, ...]]:
        """Whether the slots are in the words, and the kernels' five arguments that hold them."""
        if len(slot_of_pair) <= _PAIRS_IN_WORDS and len(self.slots) < (1 << SLOT_BITS) - 1:
            words = [_WORD_MARK] * N_SLOT_WORDS
            for pair, slot in enumerate(slot_of_pair):
                word, place = divmod(pair, SLOTS_PER_WORD)
                words[word] |= (slot + 1) << (SLOT_BITS * place)
            return True, (self._no_slots, *words)
        # At most 2 KiB: CUDA takes so little from pageable memory without holding the host up.
        table = torch.tensor(slot_of_pair, dtype=torch.int32)
        table = table.to(self.slots.device, non_blocking=True)
        return False, (table, *[_WORD_MARK] * N_SLOT_WORDS)

    def memory(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The slots as the kernels read them: matrices, scales, offsets and biases."""
        return self._matrix, self._scales, self._offsets_of, self._biases

    def offsets(self, name: MatrixName) -> tuple[int, ...]:
        """Words of a block, and where a matrix's arrays start, each in its own elements."""
        places = {field.name: field.offset_bytes for field in self.layout.fields}
        ends = ("", "_scale", f"_{self.constants['OFFSET'] or 'none'}", "_bias")
        return (
            self.layout.block_bytes // 4,
            *(
                places.get(f"{name}{end}", 0) // memory.element_size()
                for end, memory in zip(ends, self.memory(), strict=True)
            ),
        )
