"""Matrices of quantised sources, made from random codes, and the scales that they may have."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_offload.checkpoint.block import BlockLayout, block_layout, pack_block
from moe_offload.checkpoint.codes import Codes
from moe_offload.config import WEIGHT_FORMATS, Scales

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SOURCES = [
    ("mxfp4", Scales("uint8")),
    ("fp8", Scales("float32", 128, 128)),
    ("fp8", Scales("bfloat16", 128, 128)),
    ("fp8", Scales("uint8", 32)),
    ("fp8", Scales("float32", 0)),
    *(("int4", Scales(dtype, 32)) for dtype in ("float16", "bfloat16", "float32")),
    ("int4", Scales("float16", 96)),
    ("int4", Scales("bfloat16", 128)),
    ("int8", Scales("float32", 0)),
    ("int4", Scales("float16", 128, offset="zero")),
    ("int8", Scales("bfloat16", 64, offset="zero")),
    ("int4", Scales("float32", 0, offset="zero")),
    ("int4", Scales("float16", 32, offset="minimum")),
    ("int8", Scales("float16", 32, offset="minimum")),
]


def spread(values: Tensor, scales: Scales, rows: int, columns: int) -> Tensor:
    """[rows, columns] of one value per scale."""
    by_row = values.repeat_interleave(scales.rows, 0)[:rows]
    return by_row.repeat_interleave(scales.group or columns, 1)[:, :columns]


def random_source(
    name: str, scales: Scales, rows: int, columns: int, size: float = 1.0
) -> tuple[Codes, Tensor]:
    """Random codes, and the numbers [rows, columns] that they are, by plain fp32 arithmetic.

    Scales are about `size`, E8M0's over all of its range at 0.
    """
    shape = (-(-rows // scales.rows), -(-columns // scales.group) if scales.group else 1)
    if scales.dtype == "uint8":
        middle = int(torch.tensor(size).log2()) if size else 0
        low, high = (middle - 3, middle + 1) if size else (-127, 30)
        scale = torch.ldexp(torch.ones(shape), torch.randint(low, high, shape))
    else:
        scale = (torch.randn(shape) * (size or 1.0)).to(getattr(torch, scales.dtype)).float()
    unit = spread(scale, scales, rows, columns)
    units = unit[:, ::32]
    if name == "mxfp4":
        codes = torch.randint(0, 16, (rows, columns))
        return Codes("e2m1", codes.byte(), units / 2), torch.tensor(E2M1)[codes] * unit
    if name == "fp8":
        codes = torch.randint(0, 256, (rows, columns), dtype=torch.uint8)
        codes[(codes & 127) == 127] = 0
        return Codes("fp8", codes, units), codes.view(torch.float8_e4m3fn).float() * unit
    levels = 1 << WEIGHT_FORMATS[name].bits
    level = torch.randint(0, levels, (rows, columns))
    if scales.offset == "minimum":
        minimum = spread((torch.randn(shape) * (size or 1.0)).half().float(), scales, rows, columns)
        return Codes("affine", level.byte(), units, minimum[:, ::32]), level * unit + minimum
    zero = torch.full(shape, levels / 2)
    if scales.offset:
        zero = torch.randint(0, min(levels + 1, 256), shape).float()
    zero = spread(zero, scales, rows, columns)
    return Codes("int", level.byte(), units, zero[:, ::32]), (level - zero) * unit


def source_blocks(
    name: str, scales: Scales, hidden: int, width: int, n: int
) -> tuple[BlockLayout, Tensor]:
    """Blocks of `n` gated experts with biases, every weight a source's own."""
    layout = block_layout(name, hidden, width, True, True, scales)  # type: ignore[arg-type]
    blocks = torch.zeros(n, layout.block_bytes, dtype=torch.uint8)
    largest = {"mxfp4": 6, "fp8": 448}.get(name, 1 << WEIGHT_FORMATS[name].bits)
    for block in blocks:
        size = hidden**-0.5 / largest * 2
        first, _ = random_source(name, scales, 2 * width, hidden, size)
        down, _ = random_source(name, scales, hidden, width, size)
        biases = {"gate_up_bias": torch.randn(2 * width), "down_bias": torch.randn(hidden)}
        assert pack_block(layout, {"gate_up": first, "down": down, **biases}, block)
    return layout, blocks
