"""One expert's block: the contiguous bytes that file, host memory, CPU kernel and GPU slot share.

Shapes, here and everywhere: `T` tokens, `K` top-k, `E` experts per layer, `L` MoE layers,
`H` hidden size, `I` expert intermediate size, `N` cache indexes, `M` cache ways. `R` is the rows
of the first matrix: `2 * I` for a gated expert (gate rows, then up rows), `I` for a gateless one.

An expert computes `down @ act(gate_up @ x + gate_up_bias) + down_bias`. Its block holds, in the
order the CPU kernel streams them: `gate_up`, its scales and bias, `down`, its scales and bias.
Matrices are row-major in `fp32` and `bf16`; `int8` and `int4` use the packed tiles that
`quantization.py` describes.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.safetensors_file import TensorEntry
from moe_offload.config import WEIGHT_FORMATS, WeightFormat

ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu", "module"]

BLOCK_ALIGNMENT: Final = 4096  # a page: direct file reads and host registration want it
FIELD_ALIGNMENT: Final = 64  # a cache line: no vector load of a field's start is split


@dataclass(frozen=True)
class Activation:
    """What stands between an expert's two matrices.

    Gated experts compute `act(gate) * up`. `clamped_swiglu` is gpt-oss's: with
    `gate = min(gate, limit)` and `up = clamp(up, -limit, limit)` it is
    `(up + 1) * gate * sigmoid(alpha * gate)`. `module` calls the model's own code.
    """

    kind: ActivationKind
    alpha: float = 0.0
    limit: float = 0.0


class Field(TensorEntry):
    """One array inside a block."""

    def view(self, block: Tensor) -> Tensor:
        """The field as a view into `block` (uint8 [..., block_bytes]), shape [..., *self.shape]."""
        part = block[..., self.offset_bytes : self.offset_bytes + self.n_bytes]
        return part.view(self.torch_dtype).view(*block.shape[:-1], *self.shape)


@dataclass(frozen=True)
class BlockLayout:
    """Where each field of an expert's block lies; equal for all experts of a layer."""

    weight_format: WeightFormat
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    fields: tuple[Field, ...]
    block_bytes: int

    @property
    def first_rows(self) -> int:
        """R, the rows of `gate_up`."""
        return (2 if self.has_gate else 1) * self.intermediate_size

    @cached_property
    def _by_name(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    def field(self, name: str) -> Field:
        return self._by_name[name]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def block_layout(
    weight_format: WeightFormat,
    hidden_size: int,
    intermediate_size: int,
    has_gate: bool = True,
    has_bias: bool = False,
) -> BlockLayout:
    """The layout of a block; a pure function of its arguments."""
    facts = WEIGHT_FORMATS[weight_format]
    first_rows = (2 if has_gate else 1) * intermediate_size
    arrays: list[tuple[str, str, tuple[int, ...]]] = []
    for name, rows, columns in (
        ("gate_up", first_rows, hidden_size),
        ("down", hidden_size, intermediate_size),
    ):
        if facts.group:
            packed, scale = quantization.packed_shapes(rows, columns, facts.bits)
            arrays.append((name, facts.dtype, packed))
            arrays.append((f"{name}_scale", "float16", scale))
        else:
            arrays.append((name, facts.dtype, (rows, columns)))
        if has_bias:
            arrays.append((f"{name}_bias", "float32", (rows,)))
    fields = []
    offset = 0
    for name, dtype, shape in arrays:
        field = Field(name, dtype, shape, offset)
        fields.append(field)
        offset = _round_up(offset + field.n_bytes, FIELD_ALIGNMENT)
    return BlockLayout(
        weight_format=weight_format,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        has_gate=has_gate,
        has_bias=has_bias,
        fields=tuple(fields),
        block_bytes=_round_up(offset, BLOCK_ALIGNMENT),
    )


def pack_block(layout: BlockLayout, weights: dict[str, Tensor], out: Tensor) -> bool:
    """Write one expert's logical weights into `out` as the bytes of a block.

    `weights` holds `gate_up` [R, H], `down` [H, I] and, with biases, `gate_up_bias` [R] and
    `down_bias` [H], in any floating dtype; `out` is uint8 [block_bytes], padding included. Of a
    quantised source it also holds `gate_up_unit` and `down_unit`, of which the weights are whole
    multiples (`quantization.Grid`): a packed format that can takes these over without a rounding.
    False when one was given and could not be kept.
    """
    facts = WEIGHT_FORMATS[layout.weight_format]
    out.zero_()
    kept = True
    for name in ("gate_up", "down"):
        weight = weights[name]
        if facts.group:
            unit, taken = weights.get(f"{name}_unit"), None
            if unit is not None:
                taken = quantization.take_over(weight, unit, facts.bits)
                kept = kept and taken is not None
            packed, scale = taken or quantization.quantize(weight, facts.bits)
            layout.field(name).view(out).copy_(packed)
            layout.field(f"{name}_scale").view(out).copy_(scale)
        else:
            layout.field(name).view(out).copy_(weight)
        if layout.has_bias:
            layout.field(f"{name}_bias").view(out).copy_(weights[f"{name}_bias"])
    return kept


def unpack_matrix(layout: BlockLayout, block: Tensor, name: Literal["gate_up", "down"]) -> Tensor:
    """One matrix of a block in its logical shape: a view for fp32 and bf16, fp32 else."""
    stored, facts = layout.field(name).view(block), WEIGHT_FORMATS[layout.weight_format]
    if not facts.group:
        return stored
    rows, columns = (
        (layout.first_rows, layout.hidden_size)
        if name == "gate_up"
        else (layout.hidden_size, layout.intermediate_size)
    )
    scale = layout.field(f"{name}_scale").view(block)
    return quantization.dequantize(stored, scale, rows, columns, facts.bits)
