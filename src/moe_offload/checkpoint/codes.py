"""A matrix as a quantised checkpoint holds it: its codes, and the numbers that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

CodeKind = Literal["int", "affine", "e2m1", "fp8", "e5m2"]

# Twice what E2M1 stands for, by code: of the magnitudes, and with the signs.
E2M1_HALVES: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
E2M1_TWICE: Final = torch.tensor([*E2M1_HALVES, *(-half for half in E2M1_HALVES)])
_TABLES: Final[dict[CodeKind, Tensor]] = {
    "e2m1": E2M1_TWICE,
    "fp8": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float(),
    "e5m2": torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2).float(),
}
UNIT_COLUMNS: Final = (32, 16, 1)  # neighbours in a row that one unit may be of
_CHUNK_WEIGHTS: Final = 1 << 16  # computed at a time: what stays in a core's cache
_SAFE: Final = 1e35  # units and offsets below it overflow with no code


@dataclass(frozen=True)
class Codes:
    """W [R, C] of a quantised source: few different numbers, times units.

    `codes` uint8 [R, C]; `units` fp32 [R, ceil(C / g)], one for g = 32, 16 or 1 neighbours of a
    row; `offsets` of the same shape, of the kinds that have them. Any of them may be a view, and
    dimensions before these, of experts, stay until one is chosen.

        int     W = (code - offset) * unit
        affine  W = code * unit + offset
        e2m1    W = twice the number * unit, which is half of the scale
        fp8     W = the e4m3 number * unit; e5m2 likewise
    """

    kind: CodeKind
    codes: Tensor
    units: Tensor
    offsets: Tensor | None = None

    @property
    def unit_columns(self) -> int:
        """g; 0 where the units lie otherwise than the codes, as of a matrix that was transposed."""
        (rows, columns), units = self.codes.shape, self.units.shape
        fitting = (g for g in UNIT_COLUMNS if (rows, -(-columns // g)) == units)
        return next(fitting, 0)

    def values(self) -> Tensor:
        """W in fp32, by just these operations."""
        rows, columns = self.codes.shape
        group = self.unit_columns
        out = torch.empty(rows, columns)
        step = max(1, _CHUNK_WEIGHTS // columns)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            numbers = self._numbers(self.codes[part])
            padded = torch.nn.functional.pad(numbers, (0, -columns % group))
            groups, units = padded.unflatten(1, (-1, group)), self.units[part][..., None]
            if self.kind == "int" and self.offsets is not None:
                groups.sub_(self.offsets[part][..., None])
            groups.mul_(units)
            if self.kind == "affine" and self.offsets is not None:
                groups.add_(self.offsets[part][..., None])
            out[part] = padded[:, :columns]
        return out

    def map(self, change: Callable[[Tensor], Tensor]) -> Codes:
        """With the same change to codes, units and offsets."""
        return joined([self], lambda parts: change(parts[0]))

    def _numbers(self, codes: Tensor) -> Tensor:
        table = _TABLES.get(self.kind)
        return codes.float() if table is None else look_up(table, codes)

    def is_finite(self) -> bool:
        """Whether every weight is a finite number."""
        if self.kind == "fp8" and int((self.codes & 127).max()) == 127:
            return False
        beside = [one for one in (self.units, self.offsets) if one is not None]
        small = all(bool((one.abs() < _SAFE).all()) for one in beside)
        return (small and self.kind != "e5m2") or bool(self.values().isfinite().all())


def joined(parts: Sequence[Codes], join: Callable[[list[Tensor]], Tensor]) -> Codes:
    """What `join` makes of all codes, of all units and of all offsets, whose kind is the same."""
    offsets = [part.offsets for part in parts if part.offsets is not None]
    return Codes(
        parts[0].kind,
        join([part.codes for part in parts]),
        join([part.units for part in parts]),
        join(offsets) if offsets else None,
    )


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select is ten times as fast as an index in brackets."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


@dataclass(frozen=True)
class Grid:
    """What one matrix of a quantised checkpoint asks of a format that is to hold it exactly.

    Its numbers are whole from `low` to `high`, or those of the kind; a unit is the same in `group`
    neighbours of a row (0: in all of them) and in `rows` rows. Of `affine` the offset is a float16.
    `units` are all of the matrix, fp32; `used_units()` those of weights that are not zero, read
    when asked for. `name` is the tensor's; `is_bf16` says that bf16 holds every weight. Weights of
    one unit are at most `levels` neighbouring numbers.
    """

    name: str
    is_bf16: bool
    kind: CodeKind
    low: int
    high: int
    group: int
    units: Tensor
    used_units: Callable[[], Tensor]
    levels: int = 256
    rows: int = 1
