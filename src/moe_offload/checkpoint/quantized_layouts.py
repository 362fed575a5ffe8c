"""How quantised weights are published: the tensors of one and the form that its codes have.

`LAYOUTS` is the table. A weight is `(codes - zeros) * scales`. Its scales are one for each block of
rows x columns, or one for each group of columns that a `g_idx` names.

    form       codes of W [R, C]                 zeros                  published as
    elements   fp8 or int8 [R, C]                int8                   FP8, MXFP8, int8
    nibbles    e2m1, bytes [R, C/2]              -                      NVFP4, MXFP4, DeepSeek V4
    blocks     e2m1, uint8 [R, C/32, 16]         -                      gpt-oss, where it is W^T
    columns    int32 [R, C/n]                    int32 [R/n, groups]    compressed-tensors
    gptq       int32 [C/n, R]                    int32 [groups, R/n]    GPTQ
    awq        int32 [C, R/8]                    int32 [groups, R/8]    AWQ

n is 32 / bits. The first code is in the lowest bits; of awq's eight the order is 0 2 4 6 1 3 5 7.
Scales of a byte are powers of two, 2^(byte - 127) (E8M0).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_offload.checkpoint.codes import CodeKind

E8M0: Final = (torch.uint8, torch.float8_e8m0fnu)
FP8: Final = (torch.float8_e4m3fn, torch.float8_e5m2)
_BYTES: Final = (torch.uint8, torch.int8)
_AWQ_PLACES: Final = (0, 4, 1, 5, 2, 6, 3, 7)  # where row r of eight lies in a word


def _unpack(words: Tensor, bits: int) -> Tensor:
    """uint8 [..., n * 32 / bits] from int32 [..., n], or from bytes: the lowest bits come first."""
    found: Tensor = words.contiguous().view(torch.uint8)
    if bits == 8:
        return found
    low = found.to(torch.int16)
    pairs: Tensor = (low << 4).bitwise_or_(low).bitwise_and_(0x0F0F)
    return pairs.view(torch.uint8)  # little-endian: the low one first


def _unpack_awq(words: Tensor, _: int) -> Tensor:
    """uint8 [R, C] from int32 [C, R/8]."""
    by_row = words.t().contiguous()
    codes = torch.empty(len(by_row), 8, len(words), dtype=torch.uint8)
    for row, place in enumerate(_AWQ_PLACES):
        codes[:, row] = (by_row >> (4 * place)).bitwise_and_(15)
    return codes.flatten(0, 1)


def _elements(codes: Tensor, _: int) -> Tensor:
    """Bytes of fp8 as they are; of int8 without a sign, 128 more."""
    found = codes.view(torch.uint8)
    return found ^ 128 if codes.dtype == torch.int8 else found


@dataclass(frozen=True)
class Form:
    """How codes lie: `shape` is of what `codes` makes of a tensor, given the bits of a code."""

    kind: CodeKind
    shape: Callable[[tuple[int, ...], int], tuple[int, int]]
    codes: Callable[[Tensor, int], Tensor]
    zeros: Callable[[Tensor, int], Tensor] = lambda stored, bits: stored
    n_dims: int = 2
    scales_transposed: bool = False
    becomes_transposed: bool = False


ELEMENTS: Final = Form(
    "fp8",
    lambda shape, bits: (shape[0], shape[1]),
    _elements,
    _elements,
)
_NIBBLES: Final = Form(
    "e2m1",
    lambda shape, bits: (shape[0], shape[1] * 2),
    lambda packed, bits: _unpack(packed, 4),
)
_BLOCKS: Final = Form(
    "e2m1",
    lambda shape, bits: (shape[0], shape[1] * shape[2] * 2),
    lambda blocks, bits: _unpack(blocks.flatten(1), 4),
    n_dims=3,
    becomes_transposed=True,
)
_COLUMNS: Final = Form(
    "int",
    lambda shape, bits: (shape[0], shape[1] * 32 // bits),
    _unpack,
    lambda zeros, bits: _unpack(zeros.t(), bits).t(),
)
GPTQ: Final = Form(
    "int",
    lambda shape, bits: (shape[1], shape[0] * 32 // bits),
    lambda words, bits: _unpack(words.t(), bits),
    lambda zeros, bits: _unpack(zeros, bits).t(),
    scales_transposed=True,
)
_AWQ: Final = Form(
    "int",
    lambda shape, bits: (shape[1] * 8, shape[0]),
    _unpack_awq,
    _unpack_awq,
    scales_transposed=True,
)


@dataclass(frozen=True)
class Layout:
    """A row of the table: the names' ends, after a common stem, of the tensors of one weight.

    `codes` are of one of `dtypes`; `scale` is whichever is there. `factor` multiplies the scales,
    `divisor` divides them. `methods` limits it to these values of "quant_method".
    """

    codes: str
    dtypes: tuple[torch.dtype, ...]
    scale: tuple[str, ...]
    becomes: str
    form: Form
    zeros: str = ""
    groups: str = ""
    factor: str = ""
    divisor: str = ""
    scale_dtypes: tuple[torch.dtype, ...] = ()
    methods: tuple[str, ...] = ()

    @property
    def optional(self) -> dict[str, str]:
        ends = {role: getattr(self, role) for role in ("zeros", "groups", "factor", "divisor")}
        return {role: end for role, end in ends.items() if end}


_WEIGHT_SCALES: Final = (".weight_scale_inv", ".weight_scale", ".scale", ".qscale_weight")
LAYOUTS: Final = (
    Layout("_blocks", (torch.uint8,), ("_scales",), "", _BLOCKS),
    Layout(
        ".weight_packed", (torch.int32,), (".weight_scale",), ".weight", _COLUMNS,
        zeros=".weight_zero_point", groups=".weight_g_idx",
    ),
    Layout(
        ".weight_packed", (torch.uint8,), (".weight_scale",), ".weight", _NIBBLES,
        divisor=".weight_global_scale",
    ),
    Layout(
        ".qweight", (torch.int32,), (".scales",), ".weight", GPTQ,
        zeros=".qzeros", groups=".g_idx", methods=("gptq",),
    ),
    Layout(
        ".qweight", (torch.int32,), (".scales",), ".weight", _AWQ,
        zeros=".qzeros", methods=("awq",),
    ),
    Layout(".weight", _BYTES, _WEIGHT_SCALES, ".weight", _NIBBLES, scale_dtypes=E8M0),
    Layout(
        ".weight", (torch.uint8,), (".weight_scale",), ".weight", _NIBBLES,
        factor=".weight_scale_2",
    ),
    Layout(
        ".weight", (*FP8, torch.int8), _WEIGHT_SCALES, ".weight", ELEMENTS,
        zeros=".weight_zero_point",
    ),
    Layout("_proj", FP8, ("_proj_scale_inv", "_proj_scale"), "_proj", ELEMENTS),
)  # fmt: skip
