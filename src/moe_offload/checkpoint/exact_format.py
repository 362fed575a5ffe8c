"""Which weight format holds the experts of a quantised checkpoint without a rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Final, Literal

from moe_offload.checkpoint.codes import CodeKind, Grid
from moe_offload.checkpoint.matrix import exact_dtypes
from moe_offload.checkpoint.quantization import GROUP
from moe_offload.config import WEIGHT_FORMATS, Scales, WeightFormat

_Candidate = tuple[WeightFormat, Literal["", "zero", "minimum"]]
# By kind of grid, the smallest first.
_CANDIDATES: Final[Mapping[CodeKind, tuple[_Candidate, ...]]] = {
    "int": (("int4", ""), ("int4", "zero"), ("int8", ""), ("int8", "zero")),
    "affine": (("int4", "minimum"), ("int8", "minimum")),
    "e2m1": (("mxfp4", ""), ("int8", "")),
    "fp8": (("fp8", ""),),
    "e5m2": (),
}


class ExactFormat:
    """The formats that hold every grid shown so far, with what scales these would need."""

    def __init__(self) -> None:
        self._left: dict[_Candidate, list[str]] | None = None
        self._group, self._rows = 0, set[int]()

    def add(self, grid: Grid) -> bool:
        """Whether any format holds this grid too."""
        self._group = math.gcd(self._group, grid.group)
        self._rows.add(grid.rows)
        if self._left is None:
            self._left = {one: exact_dtypes(one[0]) for one in _CANDIDATES[grid.kind]}
        self._left = {
            one: found
            for one, dtypes in self._left.items()
            if one in _CANDIDATES[grid.kind] and (found := _scale_dtypes(one, grid, dtypes))
        }
        return bool(self._left) and self._group % GROUP == 0

    def result(self, n_rows: int) -> tuple[WeightFormat, Scales]:
        """The smallest, once `add` was always true.

        Matrices of `n_rows` rows may be stored one below another, which blocks of rows must fit.
        """
        assert self._left
        (weight_format, offset), (dtype, *_) = next(iter(self._left.items()))
        group = GROUP if weight_format == "mxfp4" else self._group
        rows = min(self._rows) if weight_format == "fp8" and len(self._rows) == 1 else 1
        rows = rows if n_rows % rows == 0 else 1
        return weight_format, Scales(dtype, group, rows, offset)  # type: ignore[arg-type]


def _scale_dtypes(candidate: _Candidate, grid: Grid, dtypes: Iterable[str]) -> list[str]:
    """Which of the dtypes hold the grid's units; none where the format does not hold its levels."""
    weight_format, offset = candidate
    half = 1 << (WEIGHT_FORMATS[weight_format].bits - 1)
    whole = weight_format.startswith("int")
    if offset and grid.levels > 2 * half:
        return []
    if whole and not offset and not (-half <= grid.low and grid.high < half):
        return []
    found = exact_dtypes(weight_format, grid.units)
    smallest = next(iter(dtypes))
    if smallest not in found and grid.kind != "fp8":  # of weights that are zero any unit is right
        found = exact_dtypes(weight_format, grid.used_units())
    return [dtype for dtype in dtypes if dtype in found]
