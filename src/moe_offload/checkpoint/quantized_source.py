"""Quantised checkpoints, read as the ordinary ones that they stand for.

A weight is computed in fp32 when it is read, one matrix at a time (of stacked experts one expert).
What these stood for before anybody quantised them is not known: the stored numbers are the model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Final

import torch
from torch import Tensor

from moe_offload.checkpoint.codes import UNIT_COLUMNS, CodeKind, Codes, Grid, joined
from moe_offload.checkpoint.quantized_layouts import E8M0, ELEMENTS, FP8, GPTQ, LAYOUTS, Layout
from moe_offload.checkpoint.quantized_settings import Settings
from moe_offload.checkpoint.source_files import LazyTensor, Quantised
from moe_offload.errors import UserError

# What activations and caches were quantised with: nothing here computes in that.
_ACTIVATIONS: Final = re.compile(r".*[._](input|output|activation|[qkv])_(global_)?scale(_ub)?")


def dequantised(tensors: Mapping[str, LazyTensor], settings: Settings) -> dict[str, LazyTensor]:
    """The checkpoint that `tensors` stand for, still unread; what is not quantised stays.

    UserError for codes without scales, or with scales of a shape that does not fit them.
    """
    layouts = [one for one in LAYOUTS if not one.methods or settings.method in one.methods]
    found: dict[str, LazyTensor] = {}
    used: set[str] = set()
    for name in tensors:
        parts = _parts_of(name, tensors, layouts)
        if parts is not None:
            layout, names = parts
            weight = _Weight(
                layout, settings, names, {role: tensors[n] for role, n in names.items()}
            )
            stem = name.removesuffix(layout.codes)
            found[stem + layout.becomes] = weight.lazy()
            used |= {name, *names.values(), f"{stem}.weight_shape"}
    rest = {
        name: tensor
        for name, tensor in tensors.items()
        if name not in used and not _ACTIVATIONS.fullmatch(name)
    }
    return rest | found


def _parts_of(
    name: str, tensors: Mapping[str, LazyTensor], layouts: list[Layout]
) -> tuple[Layout, dict[str, str]] | None:
    """The layout that a tensor of codes is of, and the names of what belongs to it by role."""
    wanted = ""
    for layout in layouts:
        if not name.endswith(layout.codes) or tensors[name].dtype not in layout.dtypes:
            continue
        stem = name.removesuffix(layout.codes)
        scale = next((stem + end for end in layout.scale if stem + end in tensors), None)
        wanted = wanted or stem + layout.scale[0]
        if scale is None or (
            layout.scale_dtypes and tensors[scale].dtype not in layout.scale_dtypes
        ):
            continue
        names = {role: stem + end for role, end in layout.optional.items() if stem + end in tensors}
        return layout, {"codes": name, "scale": scale, **names}
    if wanted:
        raise UserError(
            f"tensor {name} in {tensors[name].path} is quantised, and its scales are missing: "
            f"expected {wanted}; the checkpoint is incomplete, download it again"
        )
    return None


@dataclass(frozen=True)
class _Weight:
    """One logical weight, or a stack of them: its tensors by role, and their names."""

    layout: Layout
    settings: Settings
    names: Mapping[str, str]
    parts: Mapping[str, LazyTensor]

    def lazy(self) -> LazyTensor:
        """The weight as an ordinary tensor: bf16 where that holds it, fp32 else."""
        self._check()
        codes, (rows, columns) = self.parts["codes"], self.shape
        matrix = (columns, rows) if self.layout.form.becomes_transposed else (rows, columns)
        shape = (*codes.shape[:1], *matrix) if self.stacked else matrix
        stored = Quantised(self.kind, self._grids, self.read_codes)
        return LazyTensor(shape, self.dtype, codes.path, self._read_values, stored)

    @property
    def dtype(self) -> torch.dtype:
        """A power of two times a few bits is a bf16."""
        return torch.bfloat16 if self._has_e8m0 and self.kind != "int" else torch.float32

    @property
    def _has_e8m0(self) -> bool:
        return self.parts["scale"].dtype in E8M0

    @property
    def kind(self) -> CodeKind:
        special: dict[torch.dtype, CodeKind] = {torch.int8: "int", torch.float8_e5m2: "e5m2"}
        form = self.layout.form
        return special.get(self.parts["codes"].dtype, "fp8") if form is ELEMENTS else form.kind

    @property
    def stacked(self) -> bool:
        return len(self.parts["codes"].shape) > self.layout.form.n_dims

    @cached_property
    def bits(self) -> int:
        """Of an integer code; in some of GPTQ's layers these may be others than in most."""
        if self.layout.form is GPTQ and "zeros" in self.parts:
            rows, words = (self.parts[role].shape[-1:] for role in ("scale", "zeros"))
            for bits in (4, 8):
                if rows == tuple(32 // bits * n for n in words):
                    return bits
        return 8 if self.layout.form is ELEMENTS else self.settings.bits

    @cached_property
    def shape(self) -> tuple[int, int]:
        form = self.layout.form
        return form.shape(self.parts["codes"].shape[-form.n_dims :], self.bits)

    @cached_property
    def block(self) -> tuple[int, int]:
        """Rows and columns that share a scale: the config's, or what fits the scales' shape.

        The last block of either may be cut off: 576 rows in blocks of 128 have five.
        """
        (rows, columns), found = self.shape, self.parts["scale"].shape
        if found not in ((), (1,)) and self.stacked:
            found = found[1:]
        if found in ((), (1,)):
            return rows, columns
        scales = (*found, 1)[:2] if len(found) < 3 else found
        scales = scales[::-1] if self.layout.form.scales_transposed else scales
        usual = [(1, 16), (1, 32), (1, 64), (1, 128), (1, columns), (rows, 1)]
        if self.settings.block is None:
            usual += [(128, 128), (rows, columns)]
        for block in (self.settings.block, *usual):
            if block and self._n_blocks(block) == scales:
                return block
        codes = f"{self.names['codes']}, {rows} x {columns}"
        raise self._wrong("scale", f"a scale for each {self.settings.block or (1, 32)} of {codes}")

    def _n_blocks(self, block: tuple[int, int]) -> tuple[int, int]:
        return -(-self.shape[0] // block[0]), -(-self.shape[1] // block[1])

    def _check(self) -> None:
        codes, form = self.parts["codes"], self.layout.form
        if len(codes.shape) - form.n_dims not in (0, 1):
            raise self._wrong("codes", f"{form.n_dims} dimensions, or one more for stacked experts")
        scale, zeros = self.parts["scale"], self.parts.get("zeros", codes)
        if not (scale.dtype.is_floating_point or (scale.dtype in E8M0 and self.kind != "int")):
            raise self._wrong("scale", "floating point")
        if (zeros.dtype, len(zeros.shape)) != (codes.dtype, len(codes.shape)):
            raise self._wrong("zeros", f"{codes.dtype} of {len(codes.shape)} dimensions")
        for role, part in self.parts.items() if self.stacked else ():
            if part.shape not in ((), (1,)) and part.shape[0] != codes.shape[0]:
                raise self._wrong(role, f"{codes.shape[0]} experts")
        _ = self.block
        for role, end in self.layout.optional.items():
            is_factor = role in ("factor", "divisor")
            if role in self.parts:
                n_elements = math.prod(self.parts[role].shape[self.stacked :])
                if is_factor and n_elements != 1:
                    raise self._wrong(role, "one number")
            elif (is_factor and self.parts["scale"].dtype in FP8) or (
                role == "zeros" and self.settings.zeros_required
            ):
                stem = self.names["codes"].removesuffix(self.layout.codes)
                raise UserError(
                    f"tensor {stem + end} is missing: {self.names['codes']} in {codes.path} cannot "
                    "be read without it; the checkpoint is incomplete, download it again"
                )

    def _wrong(self, role: str, wanted: str) -> UserError:
        part = self.parts[role]
        return UserError(
            f"tensor {self.names[role]} in {part.path} has the wrong shape or dtype: expected "
            f"{wanted}, found {part.dtype} {part.shape}; download the checkpoint again"
        )

    def _read_values(self, start: int, stop: int) -> Tensor:
        found = [matrix.values().to(self.dtype) for matrix in self._matrices(start, stop)]
        return self._rows(start, stop, found)

    def read_codes(self, start: int, stop: int) -> Codes:
        """Of a slice of dimension 0."""
        return joined(self._matrices(start, stop), partial(self._rows, start, stop))

    def _matrices(self, start: int, stop: int) -> list[Codes]:
        return [self._matrix(index) for index in (range(start, stop) if self.stacked else (0,))]

    def _rows(self, start: int, stop: int, matrices: list[Tensor]) -> Tensor:
        """A slice of dimension 0 of the tensor, from the matrices that lie in it."""
        if not self.stacked:
            return matrices[0][start:stop]
        turned = self.layout.form.becomes_transposed
        found = [matrix.t() if turned else matrix for matrix in matrices]
        return torch.stack(found) if len(found) != 1 else found[0][None]

    def _read(self, role: str, index: int) -> Tensor:
        part = self.parts[role]
        if self.stacked and part.shape[:1] == self.parts["codes"].shape[:1]:
            return part.read_rows(index, index + 1)[0]
        return part.read()

    def _scales(self, index: int) -> Tensor:
        """fp32 [row blocks, column blocks]."""
        stored = self._read("scale", index)
        scales = torch.exp2(stored.float() - 127) if stored.dtype == torch.uint8 else stored.float()
        if "factor" in self.parts:
            scales = scales * self._read("factor", index).float()
        if "divisor" in self.parts:
            scales = scales / self._read("divisor", index).float()
        if not bool(scales.isfinite().all()):
            raise UserError(
                f"tensor {self.names['scale']} in {self.parts['scale'].path} holds scales that are "
                "infinite or not a number; download the checkpoint again"
            )
        scales = scales.t() if self.layout.form.scales_transposed else scales
        return scales.reshape(self._n_blocks(self.block))

    def _zeros(self, index: int) -> Tensor:
        """What is subtracted from codes, [row blocks, column blocks] or one for all."""
        form, bits = self.layout.form, self.bits
        if "zeros" not in self.parts:
            return torch.tensor([[1 << (bits - 1)]])
        stored = self._read("zeros", index)
        if self.settings.zeros_less_one:
            stored = stored + {4: 0x11111111, 8: 0x01010101}[bits]
        zeros = form.zeros(stored, bits)
        rows, columns = self._n_blocks(self.block)
        if zeros.shape[1:] != (columns,) or zeros.shape[0] < rows:
            raise self._wrong("zeros", f"a zero for each of {rows} x {columns} scales")
        return zeros[:rows]

    def _groups(self, index: int) -> Tensor | None:
        """int64 [columns], the column block of each column; None where they are in order."""
        if "groups" not in self.parts:
            return None
        groups, n_columns = self._read("groups", index).long(), self.shape[1]
        n_groups = self._n_blocks(self.block)[1]
        if groups.shape != (n_columns,) or not bool(((groups >= 0) & (groups < n_groups)).all()):
            raise self._wrong("groups", f"{n_columns} numbers of groups below {n_groups}")
        in_order = torch.equal(groups, torch.arange(n_columns) // self.block[1])
        return None if in_order else groups

    def _matrix(self, index: int) -> Codes:
        """One matrix of a stack, or the only one."""
        codes = self.layout.form.codes(self._read("codes", index), self.bits)
        offsets = None
        if self.kind == "int":
            offsets = self._per_unit(self._zeros(index), index).float()
        elif "zeros" in self.parts and bool(self._read("zeros", index).float().any()):
            raise self._wrong("zeros", "zeros of 0 beside numbers with a sign")
        return Codes(self.kind, codes, self._per_unit(self._units(index), index), offsets)

    def _units(self, index: int) -> Tensor:
        """By block; e2m1 has halves."""
        return self._scales(index) / (2 if self.kind == "e2m1" else 1)

    def _per_unit(self, per_block: Tensor, index: int) -> Tensor:
        """[R, units] of one value for each block, or [1, 1] for all."""
        (n_rows, n_columns), (rows, columns) = self.shape, self.block
        blocks = self._groups(index)
        if blocks is None:
            whole = columns >= n_columns
            group = next(g for g in UNIT_COLUMNS if whole or columns % g == 0)
            blocks = torch.arange(0, n_columns, group) // columns
        if per_block.numel() == 1:
            return per_block.expand(n_rows, len(blocks))
        per_row = per_block.repeat_interleave(rows, dim=0)[:n_rows]
        return per_row.index_select(1, blocks)

    def _grids(self) -> Iterator[Grid]:
        for index in range(self.parts["codes"].shape[0] if self.stacked else 1):
            low, high, n_codes = -12, 12, 1 << self.bits
            if self.kind == "int":
                zeros = self._zeros(index)
                low, high = -int(zeros.max()), n_codes - 1 - int(zeros.min())
            alone = self.block[1] < self.shape[1]
            yield Grid(
                name=self.names["codes"],
                is_bf16=self.dtype == torch.bfloat16,
                kind=self.kind,
                low=low,
                high=high,
                group=1 if self._groups(index) is not None else self.block[1] * alone,
                units=self._units(index),
                used_units=partial(self._used_units, index),
                levels=n_codes if self.kind == "int" else 256,
                rows=self.block[0],
            )

    def _used_units(self, index: int) -> Tensor:
        """Those of weights that are not zero."""
        matrix = self._matrix(index)
        spread = matrix.units.repeat_interleave(matrix.unit_columns, 1)[:, : self.shape[1]]
        return spread[matrix.values() != 0]
