"""The Triton kernels of the expert FFN from slot memory; `triton_experts.py` launches them.

Two launches compute every (token, expert) pair of a layer: rows of `gate_up` with the activation,
then rows of `down` with the routing weight. A third sums each token's pairs. A program computes one
tile of rows of one pair; programs of one row tile and different pairs run side by side, so tokens
that share an expert share its bytes in the L2 cache. Packed formats are read as int32 words,
which lie contiguously as [row block, word, 16 rows], and are dequantised in registers. Products and
sums are fp32. fp8 is decoded by its bits: no GPU needs units for it.

Import this only where Triton is installed. Without a GPU it runs in Triton's interpreter, which is
what the tests of every run use; docs/PERFORMANCE.md has what a GPU gave.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

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


@triton.jit(do_not_specialize=("n",))
def take_slots_kernel(from_host, out, n, BLOCK: tl.constexpr):
    """int32 [n], once over the bus: each of the thousand programs to come would wait for it there,
    behind the experts that are being copied."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # .cv: never from a cache, which may hold the slots of the step before.
    slot = tl.load(from_host + at, mask=at < n, other=-1, cache_modifier=".cv")
    tl.store(out + at, slot, mask=at < n)


@triton.jit
def in_slot(
    slot, matrix, scales, offsets, biases,
    block_words,  # int32 words from slot to slot; multiplied, not divided, so that the
    matrix_offset,  # compiler knows the alignment. Offsets count elements of their own array.
    scale_offset, offset_offset, bias_offset, MATRIX_BYTES: tl.constexpr,
    SCALE_BYTES: tl.constexpr, OFFSET_BYTES: tl.constexpr,
):  # fmt: skip
    """Where a slot's arrays begin, of the slots as arrays of each kind."""
    return (
        matrix + (slot * (block_words * (4 // MATRIX_BYTES)) + matrix_offset),
        scales + (slot * (block_words * (4 // SCALE_BYTES)) + scale_offset),
        offsets + (slot * (block_words * (4 // OFFSET_BYTES)) + offset_offset),
        biases + (slot * block_words + bias_offset),
    )


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
    matrix, scales, rows, valid, x, n_columns, CODES: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
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
    words, scales, offsets, rows, valid, x, n_columns, CODES: tl.constexpr, GROUP: tl.constexpr,
    OFFSET: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
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
    matrix, scales, offsets, rows, valid, x, n_columns, CODES: tl.constexpr,
    GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr, OFFSET: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
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
    slots_1, slots_2, slots_3,
    middle,  # fp32 [T * K, I], or [T * K, R] for KIND "module"
    n_columns, intermediate, top_k,
    block_words,  # as `in_slot` takes them
    matrix_offset, scale_offset, offset_offset, bias_offset, alpha, limit, CODES: tl.constexpr,
    MATRIX_BYTES: tl.constexpr,  # of an element
    SCALE_BYTES: tl.constexpr, OFFSET_BYTES: tl.constexpr, GROUP: tl.constexpr,
    SCALE_ROWS: tl.constexpr, OFFSET: tl.constexpr, HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr, KIND: tl.constexpr, IN_WORDS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < intermediate
    slot = _slot_of(pair, slot_of_pair, slots_0, slots_1, slots_2, slots_3, IN_WORDS)
    if slot >= 0:
        matrix, scales, offsets, biases = in_slot(
            slot, matrix, scales, offsets, biases,
            block_words, matrix_offset, scale_offset, offset_offset, bias_offset,
            MATRIX_BYTES, SCALE_BYTES, OFFSET_BYTES,
        )  # fmt: skip
        x += (pair // top_k).to(tl.int64) * n_columns
        gate = _dot(
            matrix, scales, offsets, row, valid, x, n_columns,
            CODES, GROUP, SCALE_ROWS, OFFSET, STEP,
        )  # fmt: skip
        if HAS_BIAS:
            gate += tl.load(biases + row, mask=valid, other=0.0)
        up = gate
        if HAS_GATE:
            up = _dot(
                matrix, scales, offsets, row + intermediate, valid, x, n_columns,
                CODES, GROUP, SCALE_ROWS, OFFSET, STEP,
            )  # fmt: skip
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
    matrix, scales, offsets, biases, slot_of_pair, slots_0, slots_1, slots_2, slots_3,
    weights,  # fp32 [T * K]
    out,  # fp32 [T * K, H]
    n_columns,  # I
    hidden_size, block_words, matrix_offset, scale_offset, offset_offset, bias_offset,
    CODES: tl.constexpr, MATRIX_BYTES: tl.constexpr, SCALE_BYTES: tl.constexpr,
    OFFSET_BYTES: tl.constexpr, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    OFFSET: tl.constexpr, HAS_BIAS: tl.constexpr, IN_WORDS: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    valid = row < hidden_size
    slot = _slot_of(pair, slot_of_pair, slots_0, slots_1, slots_2, slots_3, IN_WORDS)
    value = tl.zeros([ROWS], tl.float32)
    if slot >= 0:
        matrix, scales, offsets, biases = in_slot(
            slot, matrix, scales, offsets, biases,
            block_words, matrix_offset, scale_offset, offset_offset, bias_offset,
            MATRIX_BYTES, SCALE_BYTES, OFFSET_BYTES,
        )  # fmt: skip
        middle += pair.to(tl.int64) * n_columns
        value = _dot(
            matrix, scales, offsets, row, valid, middle, n_columns,
            CODES, GROUP, SCALE_ROWS, OFFSET, STEP,
        )  # fmt: skip
        if HAS_BIAS:
            value += tl.load(biases + row, mask=valid, other=0.0)
        value *= tl.load(weights + pair).to(tl.float32)
    tl.store(out + pair.to(tl.int64) * hidden_size + row, value, mask=valid)


@triton.jit
def unpack_kernel(
    words,  # one packed matrix
    scales, offsets,
    out,  # [n_rows, n_columns] row-major
    n_rows, n_columns, CODES: tl.constexpr, GROUP: tl.constexpr, OFFSET: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
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
    scales, out, n_rows, n_columns, GROUP: tl.constexpr, SCALE_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
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
