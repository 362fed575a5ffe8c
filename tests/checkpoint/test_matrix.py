"""Matrices in every format: stored bytes against a plain loop, exact sources bit for bit."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch
from quantised_matrices import E2M1, SOURCES, random_source, source_blocks

from moe_offload.checkpoint.block import BlockLayout, unpack_matrix
from moe_offload.checkpoint.codes import Codes
from moe_offload.checkpoint.matrix import MatrixLayout, exact_dtypes
from moe_offload.config import WEIGHT_FORMATS, Scales
from moe_offload.errors import UserError
from moe_offload.files import from_json

ROWS, COLUMNS = 37, 135  # neither is whole tiles, nor the columns whole groups of 128


@pytest.mark.parametrize(("name", "scales"), SOURCES, ids=str)
def test_a_sources_own_numbers_are_kept_bit_for_bit(name, scales):
    torch.manual_seed(1)
    source, numbers = random_source(name, scales, ROWS, COLUMNS, 0.0)
    assert torch.equal(source.values(), numbers)
    layout = MatrixLayout(name, ROWS, COLUMNS, scales)
    arrays = layout.take_over(source)
    assert arrays is not None
    assert [(s, str(a.dtype).removeprefix("torch."), a.shape) for s, a in arrays.items()] == [
        (suffix, dtype, torch.Size(shape)) for suffix, dtype, shape in layout.arrays()
    ]
    back = layout.unpack(arrays)
    assert torch.equal(back, numbers)
    if name in ("mxfp4", "fp8"):  # signs of zeros too
        assert torch.equal(back.view(torch.int32), numbers.view(torch.int32))


@pytest.mark.parametrize(("name", "scales"), SOURCES, ids=str)
def test_a_block_of_a_source_is_read_back_as_its_manifest_says(name, scales):
    torch.manual_seed(1)
    layout, blocks = source_blocks(name, scales, 45, 70, 1)
    assert (layout.scales is None) == (scales == WEIGHT_FORMATS[name].scales)
    assert from_json(BlockLayout, json.loads(json.dumps(asdict(layout)))) == layout
    torch.manual_seed(1)
    largest = {"mxfp4": 6, "fp8": 448}.get(name, 1 << WEIGHT_FORMATS[name].bits)
    _, numbers = random_source(name, scales, 140, 45, 45**-0.5 / largest * 2)
    assert torch.equal(unpack_matrix(layout, blocks[0], "gate_up"), numbers)


@pytest.mark.parametrize(("name", "scales"), SOURCES, ids=str)
def test_what_a_format_does_not_hold_is_not_taken(name, scales):
    """Units and offsets that are no scale's, more levels than there are, and other codes."""
    torch.manual_seed(1)
    source, _ = random_source(name, scales, ROWS, COLUMNS)
    layout = MatrixLayout(name, ROWS, COLUMNS, scales)
    other = source.units.clone()
    other[-1, -1] = 1.2345678
    inexact = [replace(source, units=other)] if scales.dtype != "float32" else []
    if scales.group != 32:  # one of several units that share a scale
        other = source.units.clone()
        other[1, 1] *= 2
        inexact.append(replace(source, units=other))
    if name == "int4":
        inexact.append(replace(source, codes=source.codes + 16))
    if scales.offset == "minimum":
        inexact.append(replace(source, offsets=source.units * 1.2345678))
    if name.startswith("int"):
        inexact.append(replace(source, kind="int" if scales.offset == "minimum" else "affine"))
    inexact.append(replace(source, kind="e5m2"))
    inexact.append(source.map(lambda part: part[1:]))
    inexact.append(replace(source, units=source.units.repeat_interleave(32, 1)[:, :COLUMNS]))
    for found in inexact:
        assert layout.take_over(found) is None


def test_other_formats_hold_a_sources_numbers_too():
    """E2M1 and codes with another zero in int8, another zero in int4 where it leaves room."""
    torch.manual_seed(1)
    e2m1, numbers = random_source("mxfp4", Scales("uint8"), ROWS, COLUMNS, 1.0)
    layout = MatrixLayout("int8", ROWS, COLUMNS, Scales("float16"))
    arrays = layout.take_over(e2m1)
    assert arrays is not None and torch.equal(layout.unpack(arrays), numbers)
    zeros = Scales("float16", 128, offset="zero")
    codes, numbers = random_source("int4", zeros, ROWS, COLUMNS)
    layout = MatrixLayout("int8", ROWS, COLUMNS, Scales("float16", 128))
    arrays = layout.take_over(codes)
    assert arrays is not None and torch.equal(layout.unpack(arrays), numbers)
    layout = MatrixLayout("int4", ROWS, COLUMNS, Scales("float16", 128))
    assert layout.take_over(codes) is None
    codes = replace(codes, codes=codes.codes % 2 + 7, offsets=torch.full_like(codes.units, 7.0))
    arrays = layout.take_over(codes)
    assert arrays is not None and torch.equal(layout.unpack(arrays), codes.values())


@pytest.mark.parametrize(
    ("name", "scales", "kind", "unit", "offset"),
    [
        ("mxfp4", Scales("uint8"), "e2m1", 0.0, None),
        ("fp8", Scales("uint8", 32), "fp8", 0.0, None),
        ("int8", Scales("float16", 32, offset="minimum"), "affine", 1 / 3, -1.0),
    ],
)
def test_zeros_stay_zeros(name, scales, kind, unit, offset):
    """Codes of a scale of 0, which no byte is, and steps that add up to minus their offset."""
    units, offsets = (None if one is None else torch.full((16, 1), one) for one in (unit, offset))
    source = Codes(kind, torch.full((16, 32), 3, dtype=torch.uint8), units, offsets)
    assert not source.values().any()
    layout = MatrixLayout(name, 16, 32, scales)
    arrays = layout.take_over(source)
    assert arrays is None or not layout.unpack(arrays).any()


def test_the_bytes_of_mxfp4_are_those_of_a_plain_loop():
    layout = MatrixLayout("mxfp4", 17, 40, Scales("uint8"))
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (17, 40))
    exponent = torch.randint(100, 140, (17, 2))
    scale = torch.ldexp(torch.ones(17, 2), exponent - 127).repeat_interleave(32, 1)[:, :40]
    source = Codes("e2m1", codes.byte(), scale[:, ::32] / 2)
    assert torch.equal(source.values(), torch.tensor(E2M1)[codes] * scale)
    arrays = layout.take_over(source)
    assert arrays is not None
    for row in range(32):
        for column in range(64):
            group, place = divmod(column, 32)
            byte = int(arrays[""][row // 16, group, place % 16 // 4, row % 16, place % 4])
            inside = row < 17 and column < 40
            expected = int(codes[row, column]) if inside else 0
            assert (byte >> 4 if place >= 16 else byte & 15) == expected
    for row in range(17):
        for group in range(2):
            assert arrays["_scale"][row // 16, group, row % 16] == exponent[row, group]


def test_every_code_of_fp8_and_every_exponent_survive():
    codes = torch.arange(256, dtype=torch.uint8)
    codes[(codes & 127) == 127] = 0
    layout = MatrixLayout("fp8", 1, 256, Scales("float32", 0))
    arrays = layout.take_over(Codes("fp8", codes[None], torch.full((1, 8), 0.1)))
    assert arrays is not None
    assert torch.equal(arrays[""].view(torch.uint8)[0], codes)
    every = torch.ldexp(torch.ones(255), torch.arange(255) - 127)
    assert exact_dtypes("mxfp4", every / 2) == ["uint8"]
    assert exact_dtypes("mxfp4", every * 1.5) == []
    assert exact_dtypes("int4", torch.tensor([1e-9]).bfloat16().float())[0] == "bfloat16"
    assert exact_dtypes("int4", torch.tensor([0.1])) == ["float32"]


@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
def test_rounding_goes_to_the_nearest_number_of_the_scale(name):
    torch.manual_seed(0)
    weight = torch.randn(ROWS, COLUMNS) * 0.02
    weight[3, :40] = 0
    layout = MatrixLayout(name, ROWS, COLUMNS, WEIGHT_FORMATS[name].scales)
    arrays = layout.pack(weight)
    back = layout.unpack(arrays)
    assert (back[3, :32] == 0).all()
    error = float((back - weight).norm() / weight.norm())
    assert error < {"mxfp4": 0.12, "fp8": 0.03}[name]
    if name == "mxfp4":
        scale = torch.ldexp(torch.ones(()), arrays["_scale"][0, 0, 0].int() - 127)
        table = torch.tensor(E2M1) * scale
        for column in range(32):
            nearest = (table - weight[0, column]).abs().min()
            assert abs(float(back[0, column] - weight[0, column])) <= float(nearest) * 1.0001


@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 2e38])
def test_weights_that_are_not_finite_are_refused(name, bad):
    weight = torch.zeros(16, 32)
    weight[5, 5] = bad
    with pytest.raises(UserError, match=f"{name} needs finite weights"):
        MatrixLayout(name, 16, 32, WEIGHT_FORMATS[name].scales).pack(weight)


def test_scales_that_a_format_does_not_have_are_refused():
    for name, scales in (
        ("bf16", Scales("float16")),
        ("int4", None),
        ("int4", Scales("uint8")),
        ("int4", Scales("float16", 32, 2)),
        ("mxfp4", Scales("uint8", 64)),
        ("mxfp4", Scales("float16")),
        ("fp8", Scales("float32", 128, offset="zero")),
    ):
        with pytest.raises(ValueError, match="with scales"):
            MatrixLayout(name, 16, 32, scales)
    with pytest.raises(ValueError, match="scales of 48 columns"):
        Scales("float16", 48)
    with pytest.raises(ValueError, match="only a quantised source"):
        MatrixLayout("int4", 16, 32, Scales("float32")).pack(torch.zeros(16, 32))
