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
already keeps its codes and scales (`codes.py`) where the format has such, every weight as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.codes import E2M1_TWICE, Codes, look_up
from moe_offload.checkpoint.quantization import BY_TORCH, GROUP, TILE_ROWS, Packer
from moe_offload.config import WEIGHT_FORMATS, Scales, WeightFormat

_CHUNK_WEIGHTS: Final = 1 << 20  # converted at a time
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

    def pack(self, weight: Tensor, packer: Packer = BY_TORCH) -> dict[str, Tensor]:
        """The arrays of the nearest numbers, by suffix, to W of any floating dtype.

        UserError for a weight that is not finite or too large for the format; ValueError for scales
        other than the format's own, which only a source's codes come with.
        """
        facts = WEIGHT_FORMATS[self.weight_format]
        if self.scales is None:
            return {"": weight}
        if self.scales != facts.scales:
            raise ValueError(f"only a quantised source has scales {self.scales}")
        if self.weight_format == "fp8":
            return self._pack_fp8(weight)
        if self.weight_format == "mxfp4":
            packed, scale = packer.round_to_e2m1(weight)
        else:
            packed, scale = packer.quantize(weight, facts.bits)
        return {"": packed, "_scale": scale}

    def take_over(self, source: Codes, packer: Packer = BY_TORCH) -> dict[str, Tensor] | None:
        """The arrays, by suffix, that hold a source's own numbers; None where they cannot."""
        assert self.scales is not None
        fits = source.codes.shape == (self.n_rows, self.n_columns)
        if not fits or source.unit_columns != GROUP:
            return None
        try:
            if self.weight_format == "fp8":
                if source.kind != "fp8":
                    return None
                stored = source.codes.contiguous().view(torch.float8_e4m3fn)
                return {"": stored, "_scale": self._scales_of(source)}
            levels, offsets = self._levels_of(source)
            arrays = {"": packer.pack_levels(levels, self._bits)}
            arrays["_scale"] = _tile_scales(self._scales_of(source))
            if offsets is not None:
                arrays[f"_{self.scales.offset}"] = _tile_scales(self._one_per_scale(offsets))
        except _InexactError:
            return None
        return arrays

    def _levels_of(self, source: Codes) -> tuple[Tensor, Tensor | None]:
        """Levels [R, C], and with offsets what to store of them, for each unit."""
        assert self.scales is not None
        codes, offsets, stored_offset = source.codes, source.offsets, self.scales.offset
        kinds = {"zero": "int", "minimum": "affine"}.get(stored_offset)
        if self.weight_format == "mxfp4" and source.kind == "e2m1":
            return codes, None
        if self.weight_format == "int8" and source.kind == "e2m1" and not stored_offset:
            return look_up((E2M1_TWICE + 128).to(torch.uint8), codes), None
        if offsets is None or source.kind != (kinds or "int") or self.weight_format == "mxfp4":
            raise _InexactError
        if stored_offset == "minimum":
            offsets = _stored(offsets, "float16")
        elif stored_offset:
            offsets = _whole(offsets, 255)
        else:  # the format's own zero in the place of the source's
            shift = self._levels // 2 - offsets
            offsets = None
            if bool((shift != 0).any()):
                spread = shift.repeat_interleave(GROUP, 1)[:, : self.n_columns]
                return _whole(codes + spread, self._levels - 1), None
        return _whole(codes, self._levels - 1), offsets

    def _scales_of(self, source: Codes) -> Tensor:
        """[ceil(R / rows), S] in the scales' dtype."""
        assert self.scales is not None
        twice = 2.0 if self.weight_format == "mxfp4" else 1.0
        units = self._one_per_scale(source.units) * twice
        try:
            return _stored(units, self.scales.dtype)
        except _InexactError:  # the scale of zeros may be anything
            if self.scales.rows != 1 or source.kind == "affine":
                raise
            n_scales = units.shape[1]
            group = self.scales.group or self.n_columns
            padding = n_scales * group - self.n_columns
            numbers = replace(source, units=torch.ones_like(source.units)).values()
            used = torch.nn.functional.pad(numbers != 0, (0, padding))
            used = used.unflatten(1, (n_scales, group)).any(2)
            return _stored(torch.where(used, units, 1.0), self.scales.dtype)

    def _one_per_scale(self, per_unit: Tensor) -> Tensor:
        """[ceil(R / rows), S] of [R, units]; _InexactError where a scale is to cover several."""
        assert self.scales is not None
        step = self.scales.group // GROUP or per_unit.shape[1]
        found = per_unit[:: self.scales.rows, ::step]
        spread = found.repeat_interleave(self.scales.rows, 0).repeat_interleave(step, 1)
        if not torch.equal(spread[: per_unit.shape[0], : per_unit.shape[1]], per_unit):
            raise _InexactError
        return found

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
                out[rows] = look_up(E2M1_TWICE.to(levels.device), levels).mul_(0.5).mul_(scale)
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

    def _pack_fp8(self, weight: Tensor) -> dict[str, Tensor]:
        assert self.scales is not None
        most = float(weight.abs().max()) if weight.numel() else 0.0
        quantization.require_magnitude("fp8", most, 1e38)
        largest = torch.zeros(self._scale_shape, device=weight.device)
        stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
        group = self.scales.group or self.n_columns
        for row, first in enumerate(range(0, self.n_rows, self.scales.rows)):
            rows = slice(first, min(first + self.scales.rows, self.n_rows))
            magnitude = weight[rows].float().abs_().amax(0, keepdim=True)
            padded = torch.nn.functional.pad(magnitude, (0, -self.n_columns % group))
            largest[row] = padded.view(-1, group).amax(1)
            # A block of zeros, or of weights whose scale fp32 would round to nothing, is zero.
            scale = torch.where(largest[row] < 1e-30, 0.0, largest[row] / _LARGEST_FP8)
            inverse = torch.where(scale == 0, scale, scale.reciprocal())
            levels = weight[rows].float() * self._over_columns(inverse[None])
            stored[rows] = levels.clamp_(-_LARGEST_FP8, _LARGEST_FP8).to(torch.float8_e4m3fn)
            largest[row] = scale
        return {"": stored, "_scale": largest}


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
        if not bool(inside.all()):
            raise _InexactError
        return exponent.to(torch.uint8)
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
    """uint8 of whole numbers from 0 to `largest`; _InexactError for others."""
    if n.dtype == torch.uint8 and largest == 255:
        return n
    least, most = n.aminmax()
    if not (least >= 0 and most <= largest):
        raise _InexactError
    return n.to(torch.uint8)
