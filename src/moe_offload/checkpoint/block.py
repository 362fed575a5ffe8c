"""One expert's block: the contiguous bytes that file, host memory, CPU kernel and GPU slot share.

Shapes, here and everywhere: `T` tokens, `K` top-k, `E` experts per layer, `L` MoE layers,
`H` hidden size, `I` expert intermediate size, `N` cache indexes, `M` cache ways. `R` is the rows
of the first matrix: `2 * I` for a gated expert (gate rows, then up rows), `I` for a gateless one.

An expert computes `down @ act(gate_up @ x + gate_up_bias) + down_bias`. Its block holds, in the
order the CPU kernel streams them: `gate_up`, its scales and bias, `down`, its scales and bias.
How a matrix lies in each weight format says `matrix.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, Literal

from torch import Tensor

from moe_offload.checkpoint.codes import Codes
from moe_offload.checkpoint.matrix import MatrixLayout
from moe_offload.checkpoint.quantization import BY_TORCH, Packer
from moe_offload.checkpoint.safetensors_file import TensorEntry
from moe_offload.config import WEIGHT_FORMATS, Scales, WeightFormat

MatrixName = Literal["gate_up", "down"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu", "module"]

MATRIX_NAMES: Final[tuple[MatrixName, ...]] = ("gate_up", "down")
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
    """Where each field of an expert's block lies; equal for all experts of a layer.

    `scales` are those of a quantised source; None for the format's own, or none.
    """

    weight_format: WeightFormat
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    fields: tuple[Field, ...]
    block_bytes: int
    scales: Scales | None = None

    def matrix(self, name: MatrixName) -> MatrixLayout:
        """How one of the two matrices is stored."""
        rows, columns = (
            (self.first_rows, self.hidden_size)
            if name == "gate_up"
            else (self.hidden_size, self.intermediate_size)
        )
        scales = self.scales or WEIGHT_FORMATS[self.weight_format].scales
        return MatrixLayout(self.weight_format, rows, columns, scales)

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
    scales: Scales | None = None,
) -> BlockLayout:
    """The layout of a block; a pure function of its arguments.

    `scales` may be a quantised source's; ValueError where the format does not have such.
    """
    own = WEIGHT_FORMATS[weight_format].scales
    scales = None if scales == own else scales
    layout = BlockLayout(
        weight_format, hidden_size, intermediate_size, has_gate, has_bias, (), 0, scales
    )
    fields = []
    offset = 0
    for name in MATRIX_NAMES:
        matrix = layout.matrix(name)
        arrays = matrix.arrays()
        if has_bias:
            arrays.append(("_bias", "float32", (matrix.n_rows,)))
        for suffix, dtype, shape in arrays:
            field = Field(f"{name}{suffix}", dtype, shape, offset)
            fields.append(field)
            offset = _round_up(offset + field.n_bytes, FIELD_ALIGNMENT)
    return replace(layout, fields=tuple(fields), block_bytes=_round_up(offset, BLOCK_ALIGNMENT))


def pack_block(
    layout: BlockLayout,
    weights: Mapping[str, Tensor | Codes],
    out: Tensor,
    packer: Packer = BY_TORCH,
) -> bool:
    """Write one expert's logical weights into `out` as the bytes of a block.

    `weights` holds `gate_up` [R, H], `down` [H, I] and, with biases, `gate_up_bias` [R] and
    `down_bias` [H], in any floating dtype; `out` is uint8 [block_bytes], padding included. Matrices
    of a quantised source may be its codes, which a format that can takes over as they are. False
    where one could not be kept: the weights are then rounded, or, with scales of the source's,
    `out` is not a block.
    """
    out.zero_()
    kept = True
    for name in MATRIX_NAMES:
        matrix, weight, arrays = layout.matrix(name), weights[name], None
        if isinstance(weight, Codes):
            arrays = matrix.take_over(weight, packer)
            kept = kept and arrays is not None
        if not kept and layout.scales is not None:
            return False  # only a source's own codes go with its scales
        if arrays is None:
            weight = weight.values() if isinstance(weight, Codes) else weight
            arrays = matrix.pack(weight, packer)
        for suffix, array in arrays.items():
            layout.field(f"{name}{suffix}").view(out).copy_(array)
        if layout.has_bias:
            layout.field(f"{name}_bias").view(out).copy_(weights[f"{name}_bias"])  # type: ignore[arg-type]
    return kept


def unpack_matrix(layout: BlockLayout, block: Tensor, name: MatrixName) -> Tensor:
    """One matrix of a block in its logical shape: a view for fp32 and bf16, fp32 else."""
    matrix = layout.matrix(name)
    arrays = {suffix: layout.field(f"{name}{suffix}").view(block) for suffix, *_ in matrix.arrays()}
    return matrix.unpack(arrays)
