"""One matrix of an expert: the arrays that hold it in each weight format, and its numbers.

A matrix W [R, C] of `fp32`, `bf16` and `fp8` is row-major. Of `int8`, `int4` and `mxfp4` it is
tiles of 16 rows by groups of 32 columns, R and C padded with zeros (`quantization.py`); RB and G
count row blocks and groups. Beside it lie, where the format has them (`config.Scales`):

    <name>_scale      tiles: [RB, S, 16], row-major: [ceil(R / rows), S]; S scales to a row, 1 or
                      ceil(C / group)
    <name>_zero, or   the same shape; uint8
    <name>_minimum    the same shape; float16

    int8    level u in 0..255, stored as u - 128; W = (u - 128) * scale without an offset
    int4    level u in 0..15; W = (u - 8) * scale without an offset
    mxfp4   E2M1 code, tiles as those of int4: sign, then 0, 0.5, 1, 1.5, 2, 3, 4, 6; E8M0 scales
    fp8     e4m3 (fn: no infinity), finite

Numbers are those of fp32 arithmetic in the order of `config.Scales`. A source that is quantised
already keeps its codes and scales: its weights are whole multiples of a `unit`, from which the
codes are found again, and nothing is stored that does not give back every weight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.quantization import GROUP, TILE_ROWS, Quantize
from moe_offload.config import WEIGHT_FORMATS, Scales, WeightFormat
from moe_offload.errors import UserError

_CHUNK_WEIGHTS: Final = 1 << 20  # converted at a time
# Halves of E2M1's magnitudes, by code.
_E2M1: Final = (0, 1, 2, 3, 4, 6, 8, 12)
_LARGEST_FP8: Final = 448.0
# Scale types that a kernel reads, smallest first.
_SCALE_DTYPES: Final = {
    "int8": ("float16", "bfloat16", "float32"),
    "int4": ("float16", "bfloat16", "float32"),
    "mxfp4": ("uint8",),
    "fp8": ("uint8", "bfloat16", "float32"),
}


@dataclass(frozen=True)
class MatrixLayout:
    """How W [n_rows, n_columns] is stored; `scales` is None for fp32 and bf16.

    ValueError for scales that the format does not have.
    """

    weight_format: WeightFormat
    n_rows: int
    n_columns: int
    scales: Scales | None

    def __post_init__(self) -> None:
        scales, name = self.scales, self.weight_format
        if (WEIGHT_FORMATS[name].scales is None) != (scales is None):
            raise ValueError(f"{name} with scales {scales}")
        if scales is not None and (
            scales.dtype not in _SCALE_DTYPES[name]
            or (scales.offset and not name.startswith("int"))
            or (scales.rows != 1 and name != "fp8")
            or (scales.group != GROUP and name == "mxfp4")
        ):
            raise ValueError(f"{name} with scales {scales}")

    @property
    def is_tiled(self) -> bool:
        return WEIGHT_FORMATS[self.weight_format].group > 0

    @property
    def _levels(self) -> int:
        """How many an integer format has."""
        return 1 << WEIGHT_FORMATS[self.weight_format].bits

    def arrays(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """(suffix of the name, torch's dtype, shape) of each array, in order."""
        facts, scales = WEIGHT_FORMATS[self.weight_format], self.scales
        stored: tuple[int, ...] = (self.n_rows, self.n_columns)
        if self.is_tiled:
            stored, _ = quantization.packed_shapes(self.n_rows, self.n_columns, facts.bits)
        arrays = [("", facts.dtype, stored)]
        if scales is not None:
            rows, columns = self._scale_shape
            tiles = (-(-rows // TILE_ROWS), columns, TILE_ROWS)
            shape = tiles if self.is_tiled else (rows, columns)
            arrays.append(("_scale", scales.dtype, shape))
            if scales.offset:
                arrays.append((f"_{scales.offset}", scales.offset_dtype, shape))
        return arrays

    @property
    def _scale_shape(self) -> tuple[int, int]:
        assert self.scales is not None
        columns = -(-self.n_columns // self.scales.group) if self.scales.group else 1
        return -(-self.n_rows // self.scales.rows), columns

    def pack(self, weight: Tensor, quantize: Quantize = quantization.quantize) -> dict[str, Tensor]:
        """The arrays of the nearest numbers, by suffix, to W of any floating dtype.

        UserError for a weight that is not finite or too large for the format; ValueError for scales
        other than the format's own, which only a source's weights come with.
        """
        facts = WEIGHT_FORMATS[self.weight_format]
        if self.scales is None:
            return {"": weight}
        if self.scales != facts.scales:
            raise ValueError(f"only a quantised source has scales {self.scales}")
        if self.weight_format in ("int8", "int4"):
            packed, scale = quantize(weight, facts.bits)
            return {"": packed, "_scale": scale}
        largest = float(weight.abs().max()) if weight.numel() else 0.0
        if not largest < 1e38:
            raise UserError(
                f"{self.weight_format} needs finite weights of magnitude below 1e38, found "
                f"{largest}: check the checkpoint"
            )
        if self.weight_format == "fp8":
            return self._pack_fp8(weight)
        return self._in_tiles(_round_to_e2m1, weight)

    def take_over(
        self, weight: Tensor, unit: Tensor, minimum: Tensor | None = None
    ) -> dict[str, Tensor] | None:
        """The arrays, by suffix, of W fp32 [R, C] without a rounding; None where they cannot be.

        W is whole multiples of `unit` fp32 [R, C] (of mxfp4 half the scale, of fp8 e4m3 numbers
        times the scale); with `minimum` fp32 [R, C], whole multiples plus that. What one scale
        covers must have one unit and minimum.
        """
        assert self.scales is not None
        if (minimum is not None) != (self.scales.offset == "minimum"):
            return None
        try:
            if self.weight_format == "fp8":
                arrays = self._take_over_fp8(weight, unit)
            elif self.weight_format == "mxfp4":
                arrays = self._in_tiles(_find_e2m1, weight, unit)
            else:
                parts = (weight, unit) if minimum is None else (weight, unit, minimum)
                arrays = self._in_tiles(self._find_levels, *parts)
        except _InexactError:
            return None
        return arrays if torch.equal(self.unpack(arrays), weight.float()) else None

    def unpack(self, arrays: dict[str, Tensor]) -> Tensor:
        """W in fp32; as stored where the format has no scales. On the arrays' device."""
        stored = arrays[""]
        if self.scales is None:
            return stored
        if self.weight_format == "fp8":
            return stored.float().mul_(self._spread(_scale_values(arrays["_scale"])))
        out = torch.empty(self.n_rows, self.n_columns, device=stored.device)
        for blocks, rows in self._chunks():
            n = rows.stop - rows.start
            levels = quantization.unpack_levels(stored[blocks], self._bits)[:n, : self.n_columns]
            scale = self._rows_of(_scale_values(arrays["_scale"][blocks]), n)
            if self.weight_format == "mxfp4":
                out[rows] = _e2m1_halves(levels).mul_(0.5).mul_(scale)
            elif self.scales.offset == "minimum":
                minimum = self._rows_of(arrays["_minimum"][blocks].float(), n)
                out[rows] = levels.float().mul_(scale).add_(minimum)
            else:
                zero: Tensor | int = self._levels // 2
                if self.scales.offset:
                    zero = self._rows_of(arrays["_zero"][blocks].float(), n)
                out[rows] = levels.float().sub_(zero).mul_(scale)
        return out

    @property
    def _bits(self) -> int:
        return WEIGHT_FORMATS[self.weight_format].bits

    def _chunks(self) -> Iterator[tuple[slice, slice]]:
        """Row blocks, and the rows in them, a few at a time."""
        step = max(1, _CHUNK_WEIGHTS // (TILE_ROWS * self.n_columns))
        for start in range(0, -(-self.n_rows // TILE_ROWS), step):
            end = min((start + step) * TILE_ROWS, self.n_rows)
            yield slice(start, start + step), slice(start * TILE_ROWS, end)

    def _rows_of(self, tiles: Tensor, n_rows: int) -> Tensor:
        """[n_rows, C] from one value per scale, [RB, S, 16]."""
        by_row = tiles.transpose(1, 2).flatten(0, 1)[:n_rows]
        return self._over_columns(by_row)

    def _over_columns(self, by_row: Tensor) -> Tensor:
        """[n, C] from one value per scale, [n, S]."""
        assert self.scales is not None
        if not self.scales.group:
            return by_row.expand(-1, self.n_columns)
        return by_row.repeat_interleave(self.scales.group, 1)[:, : self.n_columns]

    def _spread(self, values: Tensor) -> Tensor:
        """[R, C] from one value per scale, [ceil(R / rows), S]."""
        assert self.scales is not None
        by_row = values.repeat_interleave(self.scales.rows, 0)[: self.n_rows]
        return self._over_columns(by_row)

    def _one_per_scale(self, values: Tensor) -> Tensor:
        """[n, S], the first column's of each group, of [n, C] values."""
        assert self.scales is not None
        return values[:, :: self.scales.group or self.n_columns].float()

    def _in_tiles(
        self, find: Callable[..., tuple[Tensor, dict[str, Tensor]]], *matrices: Tensor
    ) -> dict[str, Tensor]:
        """The arrays of all rows, from what `find` makes of a few: levels, and values per scale."""
        parts: dict[str, list[Tensor]] = {}
        for _, rows in self._chunks():
            chunk = [matrix[rows].float() for matrix in matrices]
            levels, scales = find(*chunk)
            parts.setdefault("", []).append(quantization.pack_levels(levels, self._bits))
            for suffix, values in scales.items():
                parts.setdefault(suffix, []).append(_tile_scales(values))
        return {suffix: torch.cat(tensors) for suffix, tensors in parts.items()}

    def _find_levels(
        self, weight: Tensor, unit: Tensor, minimum: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        assert self.scales is not None
        units = self._one_per_scale(unit)
        if minimum is None:  # the scale of zeros may be anything
            units = torch.where(self._extremes(weight.abs())[1] == 0, 0.0, units)
        scale = _stored(units, self.scales.dtype)
        step = self._over_columns(scale.float())
        inverse = torch.where(step == 0, step, step.reciprocal())
        if minimum is not None:
            lowest = _stored(self._one_per_scale(minimum), "float16")
            n = ((weight - self._over_columns(lowest.float())) * inverse).round_()
            return _whole(n, self._levels - 1), {"_scale": scale, "_minimum": lowest}
        n = (weight * inverse).round_()
        zero: Tensor | int = self._levels // 2
        if not self.scales.offset:
            return _whole(n + zero, self._levels - 1), {"_scale": scale}
        # The format's own zero where that holds the group; else the one that just does.
        smallest, largest = self._extremes(n)
        fits = (smallest >= -zero) & (largest < zero)
        own = torch.where(fits, float(zero), (-smallest).clamp_(min=0))
        levels = _whole(n + self._over_columns(own), self._levels - 1)
        return levels, {"_scale": scale, "_zero": _whole(own, 255)}

    def _extremes(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Smallest and largest of what shares a scale, [n, S] each."""
        assert self.scales is not None
        group = self.scales.group or self.n_columns
        padding = (0, -n.shape[1] % group)
        padded = torch.nn.functional.pad(n[:, None], padding, mode="replicate")[:, 0]
        groups = padded.unflatten(1, (-1, group))
        return groups.amin(2), groups.amax(2)

    def _pack_fp8(self, weight: Tensor) -> dict[str, Tensor]:
        assert self.scales is not None
        largest = torch.zeros(self._scale_shape, device=weight.device)
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        for row, first in enumerate(range(0, self.n_rows, self.scales.rows)):
            rows = slice(first, min(first + self.scales.rows, self.n_rows))
            magnitude = weight[rows].float().abs_().amax(0, keepdim=True)
            largest[row] = self._extremes(magnitude)[1]
            # A block of zeros, or of weights whose scale fp32 would round to nothing, is zero.
            scale = torch.where(largest[row] < 1e-30, 0.0, largest[row] / _LARGEST_FP8)
            inverse = torch.where(scale == 0, scale, scale.reciprocal())
            levels = weight[rows].float() * self._over_columns(inverse[None])
            stored[rows] = levels.clamp_(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn)
            largest[row] = scale
        return {"": stored, "_scale": largest}

    def _take_over_fp8(self, weight: Tensor, unit: Tensor) -> dict[str, Tensor]:
        assert self.scales is not None
        scale = _stored(self._one_per_scale(unit[:: self.scales.rows]), self.scales.dtype)
        step = self._spread(_scale_values(scale))
        levels = torch.where(step == 0, step, weight / step)
        return {"": levels.to(torch.float8_e4m3fn), "_scale": scale}


class _InexactError(Exception):
    """Numbers that a format cannot hold."""


def exact_dtypes(weight_format: WeightFormat, units: Tensor | None = None) -> list[str]:
    """The scale dtypes of a format, smallest first, that hold all of `units` fp32 exactly."""
    dtypes = _SCALE_DTYPES.get(weight_format, ())
    return [one for one in dtypes if units is None or _holds(weight_format, units, one)]


def _holds(weight_format: WeightFormat, units: Tensor, dtype: str) -> bool:
    scales = units.float() * (2.0 if weight_format == "mxfp4" else 1.0)
    try:
        return torch.equal(_scale_values(_stored(scales, dtype)), scales)
    except _InexactError:
        return False


def _stored(values: Tensor, dtype: str) -> Tensor:
    """fp32 values in a scale's dtype, exactly or _InexactError."""
    if dtype == "uint8":
        exponent = torch.frexp(values).exponent + 126  # 2^(e - 1) has exponent e
        values_back = torch.ldexp(torch.ones_like(values), exponent - 127)
        inside = (exponent >= 0) & (exponent <= 254) & (values_back == values)
        # A scale of weights that are all zero may be anything.
        if not bool((inside | (values == 0)).all()):
            raise _InexactError
        return torch.where(values == 0, 0, exponent).to(torch.uint8)
    stored = values.to(getattr(torch, dtype))
    if not torch.equal(stored.float(), values):
        raise _InexactError
    return stored


def _scale_values(stored: Tensor) -> Tensor:
    """fp32; a byte is an exponent (E8M0)."""
    if stored.dtype != torch.uint8:
        return stored.float()
    return torch.ldexp(torch.ones(stored.shape, device=stored.device), stored.int() - 127)


def _tile_scales(values: Tensor) -> Tensor:
    """[RB, S, 16] of [R, S], rows padded with zeros."""
    padded = torch.nn.functional.pad(values, (0, 0, 0, -values.shape[0] % TILE_ROWS))
    tiles: Tensor = padded.unflatten(0, (-1, TILE_ROWS)).transpose(1, 2).contiguous()
    return tiles


def _whole(n: Tensor, largest: int) -> Tensor:
    """uint8 of whole fp32 numbers from 0 to `largest`; _InexactError for others."""
    if not bool(((n >= 0) & (n <= largest)).all()):
        raise _InexactError
    return n.to(torch.uint8)


def _e2m1_halves(codes: Tensor) -> Tensor:
    """fp32 whole numbers, twice what E2M1 codes stand for; -0 stays."""
    table = torch.tensor([*_E2M1, *(-float(n) for n in _E2M1)], device=codes.device)
    return _look_up(table, codes)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table[index]; index_select is ten times as fast as an index in brackets."""
    return table.index_select(0, index.flatten().int()).view(index.shape)


def _find_e2m1(weight: Tensor, unit: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    step = unit[:, ::GROUP]
    spread = step.repeat_interleave(GROUP, 1)[:, : weight.shape[1]]
    halves = torch.where(spread == 0, spread, weight / spread).abs()
    places = torch.full((13,), 255, dtype=torch.uint8, device=weight.device)
    places[list(_E2M1)] = torch.arange(8, dtype=torch.uint8, device=weight.device)
    codes = _look_up(places, _whole(halves, 12))
    sign = torch.signbit(weight).to(codes.dtype) << 3
    return _whole(codes | sign, 15), {"_scale": _stored(step * 2, "uint8")}


def _round_to_e2m1(weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The nearest numbers; of the scales that keep or just clip a group's largest, the better."""
    n_columns = weight.shape[1]
    groups = torch.nn.functional.pad(weight, (0, -n_columns % GROUP)).unflatten(1, (-1, GROUP))
    exponent = torch.frexp(groups.abs().amax(2)).exponent.clamp_(min=-120)  # |w| < 2^exponent
    edges = torch.tensor([0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0], device=weight.device)
    halves = torch.tensor(_E2M1, dtype=torch.float32, device=weight.device)
    best = torch.zeros_like(groups, dtype=torch.uint8)
    one = torch.ones_like(groups[..., 0])
    best_exponent, best_error = exponent, one * torch.inf
    for candidate in (exponent - 3, exponent - 2):
        unit = torch.ldexp(one, candidate - 1)[..., None]
        codes = torch.bucketize(groups.abs() / unit, edges, out_int32=True)
        error = (_look_up(halves, codes) * unit - groups.abs()).square_().sum(2)
        better = error < best_error
        best = torch.where(better[..., None], codes.to(torch.uint8), best)
        best_exponent = torch.where(better, candidate, best_exponent)
        best_error = torch.minimum(error, best_error)
    codes = best | (torch.signbit(groups).to(torch.uint8) << 3)
    return codes.flatten(1)[:, :n_columns], {"_scale": (best_exponent + 127).to(torch.uint8)}
