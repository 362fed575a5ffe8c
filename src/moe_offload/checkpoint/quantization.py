"""Group-wise symmetric int8 and int4, E2M1, and the packed bytes every kernel reads.

A matrix W [R, C] is cut into groups of 32 consecutive inputs of one row; each group has one
float16 scale, so `w ~= q * scale` costs 8.5 or 4.5 bits per weight. R is padded to a multiple of 16
and C to a multiple of 32 with zero weights; RB = Rpad / 16, G = Cpad / 32.

    scales  float16 [RB, G, 16]        row rb*16 + r, group g                   at [rb, g, r]
    int8    uint8   [RB, G, 8, 16, 4]  row rb*16 + r, column g*32 + s*4 + j     at [rb, g, s, r, j]
            two's complement, q in -127..127
    int4    uint8   [RB, G, 4, 16, 4]  low nibble  q + 8 of column g*32 + s*4 + j
            q in -8..7                 high nibble q + 8 of column g*32 + 16 + s*4 + j
    E2M1    as int4, its four bits in the place of q + 8; scales uint8, E8M0: 2^(byte - 127)

Sixteen rows by four columns are one 64-byte vector: `vpdpbusd` or `maddubs` with four broadcast
activation bytes accumulates sixteen rows with neither a horizontal sum nor a permutation. A scale
may be negative: int4 reaches one step further down, and the group's largest weight goes there.

The scale of each group is the best of a few candidates by squared error, then of their
least-squares refit. GGML's choice (Q8_0: max/127, Q4_0: signed max/-8) is the first candidate, so
no group is worse than round-to-nearest; on Gaussian weights the squared error is 0.81 of Q8_0's and
0.90 of Q4_0's (48 candidates would give 0.886 for int4).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from moe_offload.checkpoint.codes import E2M1_HALVES, look_up
from moe_offload.config import WEIGHT_FORMATS
from moe_offload.errors import UserError

GROUP: Final = WEIGHT_FORMATS["int8"].group
TILE_ROWS: Final = 16

_RANGE: Final = {8: (-127, 127), 4: (-8, 7)}
# A candidate scale is the group's signed extreme over one of these; the first is GGML's.
_DIVISORS: Final = {
    8: (127.0, 127.45, 126.4, 125.3, 124.3, 123.2, 122.1, 121.0),
    4: (-8.0, -8.5, -9.0, -7.5, -7.0, 7.0, 7.5, 8.0),
}
_SMALLEST_SCALE: Final = 2.0**-24  # float16's smallest subnormal
_LARGEST_SCALE: Final = 65504.0
_LARGEST_E2M1: Final = 1e38
# Above which half an E2M1 number becomes the next one.
_E2M1_EDGES: Final = (0.5, 1.5, 2.5, 3.5, 5.0, 7.0, 10.0)
_CHUNK_WEIGHTS: Final = 1 << 18  # 1 MiB in fp32: larger chunks were at most 7% faster


def packed_shapes(
    rows: int, columns: int, bits: int
) -> tuple[tuple[int, int, int, int, int], tuple[int, int, int]]:
    """Shapes of the packed weights (uint8) and of the scales (float16) of W [rows, columns]."""
    if bits not in _RANGE:
        raise ValueError(f"bits must be 8 or 4, got {bits}")
    row_blocks, groups = -(-rows // TILE_ROWS), -(-columns // GROUP)
    return (row_blocks, groups, bits, TILE_ROWS, 4), (row_blocks, groups, TILE_ROWS)


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantise W [R, C], any floating dtype and device, to `bits` 8 or 4.

    Returns the packed weights (uint8) and the scales (float16) in `packed_shapes`. Works in chunks
    of rows: scratch memory stays at a few MiB. UserError when a weight is NaN or infinite, or too
    large for a float16 scale (8.3e6 for int8, 5.2e5 for int4); a group whose largest weight is
    below half of the smallest scale (3e-8) becomes zero.
    """
    packed, scales = _empty_packed(weight, bits)
    for part, rows in _chunks(scales):
        x = _group_major(weight[rows], *scales[part].shape[:2])
        scale = search_scale(x, bits)
        scales[part] = scale
        packed[part] = _pack(round_to_levels(x, scale, bits), bits)
    return packed, scales


def dequantize(packed: Tensor, scales: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """The fp32 [rows, columns] matrix that `packed` and `scales` stand for, on their device."""
    row_blocks, groups, _ = scales.shape
    values = unpack_levels(packed, bits).float().sub_(1 << (bits - 1))
    values = values.view(row_blocks, TILE_ROWS, groups, GROUP)
    values *= scales.float().transpose(1, 2)[..., None]
    return values.view(row_blocks * TILE_ROWS, groups * GROUP)[:rows, :columns].contiguous()


def unpack_levels(packed: Tensor, bits: int) -> Tensor:
    """uint8 [Rpad, Cpad]: the levels q + 128 or q + 8 of packed tiles, padding included."""
    row_blocks, groups = packed.shape[:2]
    if bits == 8:
        levels = (packed ^ 128).permute(0, 3, 1, 2, 4)  # [RB, 16, G, 8, 4]
    else:
        nibbles = torch.stack((packed & 15, packed >> 4), dim=2)  # [RB, G, 2, 4, 16, 4]
        levels = nibbles.permute(0, 4, 1, 2, 3, 5)
    return levels.reshape(row_blocks * TILE_ROWS, groups * GROUP)


def pack_levels(levels: Tensor, bits: int) -> Tensor:
    """The tiles of such levels, uint8 [R, C], padded with level 0."""
    rows, columns = levels.shape
    (row_blocks, groups, *_), _ = packed_shapes(rows, columns, bits)
    tiles = torch.zeros(row_blocks * TILE_ROWS, groups * GROUP, dtype=torch.int32)
    tiles[:rows, :columns] = levels
    by_group = tiles.view(row_blocks, TILE_ROWS, groups, GROUP).permute(3, 0, 2, 1).contiguous()
    return _tiles(by_group ^ 128 if bits == 8 else by_group, bits)


def round_to_e2m1(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The tiles and E8M0 scales [RB, G, 16] of the nearest numbers to W [R, C].

    Of the scales that keep or just clip a group's largest the better, by squared error. UserError
    for a weight that is not finite.
    """
    packed, scales = _empty_packed(weight, 4)
    scales = scales.to(torch.uint8)
    edges = torch.tensor(_E2M1_EDGES)
    halves = torch.tensor(E2M1_HALVES)
    for part, rows in _chunks(scales):
        x = _group_major(weight[rows], *scales[part].shape[:2])
        size = x.abs()
        largest = size.amax(0)
        require_magnitude("mxfp4", float(largest.max()), _LARGEST_E2M1)
        exponent = torch.frexp(largest).exponent.clamp_(min=-120)  # |w| < 2^exponent
        best, best_exponent, best_error = torch.zeros_like(x, dtype=torch.int32), exponent, None
        for candidate in (exponent - 3, exponent - 2):
            unit = torch.ldexp(torch.ones_like(largest), candidate - 1)
            codes = torch.bucketize(size * unit.reciprocal(), edges, out_int32=True)
            error = _sum_of_group((look_up(halves, codes) * unit - size).square_())
            better = torch.ones_like(error, dtype=torch.bool)
            if best_error is not None:
                better = error < best_error
                error = torch.minimum(error, best_error)
            best_error = error
            best = torch.where(better, codes, best)
            best_exponent = torch.where(better, candidate, best_exponent)
        packed[part] = _tiles(best | (torch.signbit(x).int() << 3), 4)
        scales[part] = (best_exponent + 127).to(torch.uint8)
    return packed, scales


class Packer:
    """How matrices become tiles: here by torch. The C++ kernels give the same bytes, faster."""

    def quantize(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        return quantize(weight, bits)

    def round_to_e2m1(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return round_to_e2m1(weight)

    def pack_levels(self, levels: Tensor, bits: int) -> Tensor:
        return pack_levels(levels, bits)


BY_TORCH: Final = Packer()


def require_magnitude(weight_format: str, largest: float, limit: float) -> None:
    """UserError for weights of a magnitude that a format does not reach, or that are no numbers."""
    if not largest <= limit:
        raise UserError(
            f"{weight_format} needs finite weights of magnitude at most {limit:.3g}, found "
            f"{largest}: check the checkpoint, or prepare it with --expert-dtype bf16"
        )


def _empty_packed(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    rows, columns = weight.shape
    packed_shape, scale_shape = packed_shapes(rows, columns, bits)
    return (
        torch.empty(packed_shape, dtype=torch.uint8, device=weight.device),
        torch.empty(scale_shape, dtype=torch.float16, device=weight.device),
    )


def _chunks(scales: Tensor) -> Iterator[tuple[slice, slice]]:
    """Row blocks, and the rows in them, a few at a time."""
    row_blocks, groups, _ = scales.shape
    step = max(1, _CHUNK_WEIGHTS // (groups * GROUP * TILE_ROWS))
    for start in range(0, row_blocks, step):
        stop = min(start + step, row_blocks)
        yield slice(start, stop), slice(start * TILE_ROWS, stop * TILE_ROWS)


def _group_major(chunk: Tensor, row_blocks: int, groups: int) -> Tensor:
    """fp32 [32, row_blocks, groups, 16]: a group's weights down the first axis.

    Reductions over a group then run along whole vectors; over a last axis of 32 they cost 30x.
    """
    padded = torch.zeros(row_blocks * TILE_ROWS, groups * GROUP, device=chunk.device)
    padded[: chunk.shape[0], : chunk.shape[1]] = chunk
    return padded.view(row_blocks, TILE_ROWS, groups, GROUP).permute(3, 0, 2, 1).contiguous()


def search_scale(x: Tensor, bits: int, importance: Tensor | float = 1.0) -> Tensor:
    """The fp16-exact fp32 scale [RB, G, 16] of the groups of `x` [32, RB, G, 16].

    `importance` [32, 1, 1, 1] says what the squared error of each column in a group counts.
    """
    high, low = x.amax(0), x.amin(0)
    extreme = torch.where(high > -low, high, low)
    largest = float(extreme.abs().max())
    limit = _LARGEST_SCALE * max(abs(level) for level in _RANGE[bits])
    require_magnitude(f"int{bits}", largest, limit)
    best = _representable(extreme / _DIVISORS[bits][0])
    best_error = _squared_error(x, best, bits, importance)
    for divisor in _DIVISORS[bits][1:]:
        scale = _representable(extreme / divisor)
        error = _squared_error(x, scale, bits, importance)
        best = torch.where(error < best_error, scale, best)
        best_error = torch.minimum(error, best_error)
    q = round_to_levels(x, best, bits)
    weighted = q * importance
    products = _sum_of_group(x * weighted)
    refit = _representable(products / _sum_of_group(q.mul_(weighted)).clamp_(min=1e-6))
    best = torch.where(_squared_error(x, refit, bits, importance) < best_error, refit, best)
    return torch.where(extreme.abs() < _SMALLEST_SCALE / 2, torch.zeros_like(best), best)


def _representable(scale: Tensor) -> Tensor:
    """The nearest nonzero finite float16, in fp32."""
    magnitude = scale.abs().clamp_(_SMALLEST_SCALE, _LARGEST_SCALE)
    return torch.copysign(magnitude.half().float(), scale)


def round_to_levels(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """The nearest levels, as fp32 whole numbers; a zero scale gives zeros."""
    inverse = torch.where(scale == 0, scale, scale.reciprocal())
    return (x * inverse).round_().clamp_(*_RANGE[bits])


def _squared_error(x: Tensor, scale: Tensor, bits: int, importance: Tensor | float) -> Tensor:
    steps = x * scale.reciprocal()
    rounded = steps.round().clamp_(*_RANGE[bits])
    terms = steps.sub_(rounded).square_().mul_(importance)
    return _sum_of_group(terms).mul_(scale).mul_(scale)


def _sum_of_group(terms: Tensor) -> Tensor:
    """The sum over the first axis, in halves: torch's own order is not the same on every CPU."""
    halves = terms.view(2, GROUP // 2, *terms.shape[1:])
    total = halves[:, 0] + 0.0
    for i in range(1, GROUP // 2):
        total += halves[:, i]
    return total.sum(0)


def _pack(q: Tensor, bits: int) -> Tensor:
    """The tiles of the levels q [32, RB, G, 16], fp32 whole numbers with their signs."""
    levels = q.to(torch.int32)
    return _tiles(levels & 255 if bits == 8 else levels + 8, bits)


def _tiles(codes: Tensor, bits: int) -> Tensor:
    """uint8 [RB, G, bits, 16, 4] from int32 [32, RB, G, 16], the bytes or nibbles to store."""
    _, row_blocks, groups, _ = codes.shape
    if bits == 4:
        codes = codes[:16] | (codes[16:] << 4)
    # Four bytes make one int32 before the transposition: moving words, not bytes, is 2x faster.
    by_column = codes.view(bits, 4, row_blocks, groups, TILE_ROWS)
    words = by_column[:, 0] | (by_column[:, 1] << 8)
    words |= by_column[:, 2] << 16
    words |= by_column[:, 3] << 24
    tiles = words.permute(1, 2, 0, 3).contiguous().view(torch.uint8)
    return tiles.view(row_blocks, groups, bits, TILE_ROWS, 4)
