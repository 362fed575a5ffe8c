"""The expert FFN from slot memory by Triton kernels, for all hits of a layer together.

Two launches compute every (token, expert) pair of a layer: rows of `gate_up` with the activation,
then rows of `down` with the routing weight. A third sums each token's pairs. A program computes one
tile of rows of one pair; programs of one row tile and different pairs run side by side, so tokens
that share an expert share its bytes in the L2 cache. Packed int8 and int4 are read as int32 words,
which lie contiguously as [row block, word, 16 rows], and are dequantised in registers. Products and
sums are fp32.

In decode the pairs' slots travel as arguments of the launch, not in memory: a step's layer then
sends the GPU nothing but the CPU's result.

Import this only where Triton is installed. Without a GPU it runs in Triton's interpreter, which is
how it was tested; its speed on a GPU is not measured yet.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_offload.checkpoint.block import Activation, BlockLayout
from moe_offload.config import WEIGHT_FORMATS
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
        slot = tl.load(slot_of_pair + pair).to(tl.int64)
    return slot


@triton.jit
def _dot_dense(matrix, rows, valid, x, n_columns, COLUMNS: tl.constexpr):
    """fp32 [ROWS]: rows of the row-major `matrix` times the vector `x`."""
    acc = tl.zeros([rows.shape[0], COLUMNS], tl.float32)
    for start in range(0, n_columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = column < n_columns
        value = tl.load(x + column, mask=inside, other=0.0).to(tl.float32)
        address = matrix + rows.to(tl.int64)[:, None] * n_columns + column[None, :]
        weight = tl.load(address, mask=valid[:, None] & inside[None, :], other=0.0)
        acc += weight.to(tl.float32) * value[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _dot_packed(words, scales, rows, valid, x, n_columns, BITS: tl.constexpr, WORDS: tl.constexpr):
    """fp32 [ROWS]: the same for a packed matrix; 32 columns of a row are BITS words."""
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
        at = (row_block[None, :] * n_groups + group[:, None]) * 16 + lane[None, :]
        scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
        first = group * 32 + (w % BITS) * 4
        part = tl.zeros([WORDS, rows.shape[0]], tl.float32)
        for j in tl.static_range(4):
            column = first + j
            value = tl.load(x + column, mask=column < n_columns, other=0.0).to(tl.float32)
            if BITS == 8:
                q = (word << (24 - 8 * j)) >> 24
                part += q.to(tl.float32) * value[:, None]
            else:
                q = ((word >> (8 * j)) & 15) - 8
                part += q.to(tl.float32) * value[:, None]
                column += 16
                value = tl.load(x + column, mask=column < n_columns, other=0.0).to(tl.float32)
                q = ((word >> (8 * j + 4)) & 15) - 8
                part += q.to(tl.float32) * value[:, None]
        acc += part * scale
    return tl.sum(acc, axis=0)


@triton.jit
def _dot(matrix, scales, rows, valid, x, n_columns, BITS: tl.constexpr, STEP: tl.constexpr):
    if BITS == 16 or BITS == 32:
        return _dot_dense(matrix, rows, valid, x, n_columns, STEP)
    else:  # noqa: RET505 - Triton wants one return per branch
        return _dot_packed(matrix, scales, rows, valid, x, n_columns, BITS, STEP)


@triton.jit
def _activate(gate, up, alpha, limit, KIND: tl.constexpr, HAS_GATE: tl.constexpr):
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
    scales,  # the slots, as float16
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
    bias_offset,
    alpha,
    limit,
    BITS: tl.constexpr,
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
        matrix += slot * (block_words * (2 if BITS == 16 else 1)) + matrix_offset
        scales += slot * (block_words * 2) + scale_offset
        biases += slot * block_words + bias_offset
        x += (pair // top_k).to(tl.int64) * n_columns
        gate = _dot(matrix, scales, row, valid, x, n_columns, BITS, STEP)
        if HAS_BIAS:
            gate += tl.load(biases + row, mask=valid, other=0.0)
        up = gate
        if HAS_GATE:
            up = _dot(matrix, scales, row + intermediate, valid, x, n_columns, BITS, STEP)
            if HAS_BIAS:
                up += tl.load(biases + intermediate + row, mask=valid, other=0.0)
        if KIND == "module":
            width = intermediate
            if HAS_GATE:
                width = 2 * intermediate
                tl.store(middle + pair.to(tl.int64) * width + intermediate + row, up, mask=valid)
            tl.store(middle + pair.to(tl.int64) * width + row, gate, mask=valid)
        else:
            value = _activate(gate, up, alpha, limit, KIND, HAS_GATE)
            tl.store(middle + pair.to(tl.int64) * intermediate + row, value, mask=valid)


@triton.jit(do_not_specialize=VARYING)
def second_kernel(
    middle,  # fp32 [T * K, I]
    matrix,
    scales,
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
    bias_offset,
    BITS: tl.constexpr,
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
        matrix += slot * (block_words * (2 if BITS == 16 else 1)) + matrix_offset
        scales += slot * (block_words * 2) + scale_offset
        biases += slot * block_words + bias_offset
        middle += pair.to(tl.int64) * n_columns
        value = _dot(matrix, scales, row, valid, middle, n_columns, BITS, STEP)
        if HAS_BIAS:
            value += tl.load(biases + row, mask=valid, other=0.0)
        value *= tl.load(weights + pair).to(tl.float32)
    tl.store(out + pair.to(tl.int64) * hidden_size + row, value, mask=valid)


@triton.jit
def unpack_kernel(
    words,  # one packed matrix
    scales,
    out,  # [n_rows, n_columns] row-major
    n_rows,
    n_columns,
    BITS: tl.constexpr,
    WORDS: tl.constexpr,
):
    row_block = tl.program_id(0)
    n_groups = (n_columns + 31) // 32
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    lane = tl.arange(0, 16)
    inside = (w < n_groups * BITS)[:, None] & (lane >= 0)[None, :]
    at = (row_block * (n_groups * BITS) + w[:, None]) * 16 + lane[None, :]
    word = tl.load(words + at, mask=inside, other=0)
    group = w // BITS
    at = (row_block * n_groups + group[:, None]) * 16 + lane[None, :]
    scale = tl.load(scales + at, mask=inside, other=0.0).to(tl.float32)
    row = (row_block * 16 + lane)[None, :].to(tl.int64)
    first = (group * 32 + (w % BITS) * 4)[:, None]
    for j in tl.static_range(4):
        column = first + j
        q = ((word << (24 - 8 * j)) >> 24) if BITS == 8 else ((word >> (8 * j)) & 15) - 8
        value = (q.to(tl.float32) * scale).to(out.dtype.element_ty)
        tl.store(out + row * n_columns + column, value, mask=(row < n_rows) & (column < n_columns))
        if BITS == 4:
            column += 16
            value = ((((word >> (8 * j + 4)) & 15) - 8).to(tl.float32) * scale).to(
                out.dtype.element_ty
            )
            tl.store(
                out + row * n_columns + column, value, mask=(row < n_rows) & (column < n_columns)
            )


_PAIRS_IN_WORDS: Final = SLOTS_PER_WORD * N_SLOT_WORDS
# Set in every word, so that Triton sees a 64-bit argument whatever the slots are.
_WORD_MARK: Final = 1 << 62


class TritonExperts:
    """The FFN of the experts in `slots`, uint8 [n_slots, block_bytes]."""

    def __init__(
        self,
        layout: BlockLayout,
        activation: Activation,
        slots: Tensor,
        act_module: ActivationModule | None = None,
    ) -> None:
        self._layout = layout
        self._activation = activation
        self._act_module = act_module
        self._bits = WEIGHT_FORMATS[layout.weight_format].bits
        self._slots = slots
        element = torch.bfloat16 if self._bits == 16 else torch.float32
        self._matrix = slots.view(torch.int32 if self._bits < 16 else element)
        self._scales = slots.view(torch.float16)
        self._biases = slots.view(torch.float32)
        self._step = WORDS if self._bits < 16 else DENSE_COLUMNS
        # Stands where the kernels expect slots in memory and these are in words.
        self._no_slots = torch.zeros(_PAIRS_IN_WORDS, dtype=torch.int32, device=slots.device)

    def warm_up(self, dtype: torch.dtype) -> None:
        """Compile every kernel that hidden states of `dtype` will need, by running it once."""
        layout, device = self._layout, self._slots.device
        hidden = torch.zeros(2, layout.hidden_size, dtype=dtype, device=device)
        for n_pairs in (1, _PAIRS_IN_WORDS + 1):  # slots in words, slots in memory
            self.grouped(hidden[:1], [-1] * n_pairs, torch.zeros(1, n_pairs, device=device))
        if len(self._slots):
            self.expert(0, hidden)

    def grouped(self, hidden: Tensor, slot_of_pair: Sequence[int], weights: Tensor) -> Tensor:
        """fp32 [T, H] for `hidden` [T, H] and `weights` [T, K] on the slots' device.

        `slot_of_pair` has T * K entries, -1 for a pair that is left out.
        """
        layout, activation = self._layout, self._activation
        n_tokens, top_k = weights.shape
        n_pairs, width = n_tokens * top_k, layout.intermediate_size
        raw = activation.kind == "module"
        middle = torch.empty(n_pairs, layout.first_rows if raw else width, device=hidden.device)
        in_words, slots = self._slot_arguments(slot_of_pair)
        first_kernel[(n_pairs, triton.cdiv(width, ROWS))](
            hidden.contiguous(),
            *self._memory(),
            *slots,
            middle,
            layout.hidden_size,
            width,
            top_k,
            *self._offsets("gate_up"),
            activation.alpha,
            activation.limit,
            BITS=self._bits,
            HAS_GATE=layout.has_gate,
            HAS_BIAS=layout.has_bias,
            KIND=activation.kind,
            IN_WORDS=in_words,
            ROWS=ROWS,
            STEP=self._step,
            enable_fp_fusion=True,
        )
        if raw:
            first = middle.to(hidden.dtype)
            middle = apply_activation(first, activation, layout.has_gate, self._act_module)
            middle = middle.float().contiguous()
        out = torch.empty(n_tokens, top_k, layout.hidden_size, device=hidden.device)
        second_kernel[(n_pairs, triton.cdiv(layout.hidden_size, ROWS))](
            middle,
            *self._memory(),
            *slots,
            weights.float().contiguous(),
            out,
            width,
            layout.hidden_size,
            *self._offsets("down"),
            BITS=self._bits,
            HAS_BIAS=layout.has_bias,
            IN_WORDS=in_words,
            ROWS=ROWS,
            STEP=self._step,
            enable_fp_fusion=True,
        )
        return out.sum(1) if top_k > 1 else out[:, 0]

    def expert(self, slot: int, x: Tensor) -> Tensor:
        """One expert for many tokens: x [n, H] -> [n, H] in x's dtype, through torch's GEMM."""
        layout = self._layout
        first = self._linear(slot, "gate_up", x, layout.first_rows)
        middle = apply_activation(first, self._activation, layout.has_gate, self._act_module)
        return self._linear(slot, "down", middle.to(x.dtype), layout.hidden_size)

    def _linear(self, slot: int, name: str, x: Tensor, n_rows: int) -> Tensor:
        block = self._slots[slot]
        stored = self._layout.field(name).view(block)
        bias = None
        if self._layout.has_bias:
            bias = self._layout.field(f"{name}_bias").view(block).to(x.dtype)
        if self._bits >= 16:
            return torch.nn.functional.linear(x, stored.to(x.dtype), bias)
        n_columns = x.shape[1]
        weight = torch.empty(n_rows, n_columns, dtype=x.dtype, device=x.device)
        scale = self._layout.field(f"{name}_scale").view(block)
        n_words = triton.cdiv(n_columns, 32) * self._bits
        unpack_kernel[(triton.cdiv(n_rows, ROWS), triton.cdiv(n_words, WORDS))](
            stored.view(torch.int32),
            scale,
            weight,
            n_rows,
            n_columns,
            BITS=self._bits,
            WORDS=WORDS,
            enable_fp_fusion=True,
        )
        return torch.nn.functional.linear(x, weight, bias)

    def _slot_arguments(self, slot_of_pair: Sequence[int]) -> tuple[bool, tuple[Tensor | int, ...]]:
        """Whether the slots are in the words, and the kernels' five arguments that hold them."""
        if len(slot_of_pair) <= _PAIRS_IN_WORDS and len(self._slots) < (1 << SLOT_BITS) - 1:
            words = [_WORD_MARK] * N_SLOT_WORDS
            for pair, slot in enumerate(slot_of_pair):
                word, place = divmod(pair, SLOTS_PER_WORD)
                words[word] |= (slot + 1) << (SLOT_BITS * place)
            return True, (self._no_slots, *words)
        # At most 2 KiB: CUDA takes so little from pageable memory without holding the host up.
        table = torch.tensor(slot_of_pair, dtype=torch.int32)
        table = table.to(self._slots.device, non_blocking=True)
        return False, (table, *[_WORD_MARK] * N_SLOT_WORDS)

    def _memory(self) -> tuple[Tensor, Tensor, Tensor]:
        return self._matrix, self._scales, self._biases

    def _offsets(self, name: str) -> tuple[int, ...]:
        """Words of a block, and where a matrix, its scales and its bias start in elements."""
        offsets = {field.name: field.offset_bytes for field in self._layout.fields}
        return (
            self._layout.block_bytes // 4,
            offsets[name] // self._matrix.element_size(),
            offsets.get(f"{name}_scale", 0) // 2,
            offsets.get(f"{name}_bias", 0) // 4,
        )
