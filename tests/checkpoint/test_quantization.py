"""int8 and int4: the packed bytes against a plain loop, the error against GGML's rounding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.quantization import dequantize, packed_shapes, quantize
from moe_offload.errors import UserError

BITS = (8, 4)


def unpack_by_loop(packed: Tensor, scales: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """The documented index formulas, one weight at a time."""
    weight = torch.zeros(rows, columns)
    tiles, scale = packed.tolist(), scales.float().tolist()
    for row in range(rows):
        for column in range(columns):
            rb, r = divmod(row, 16)
            g, within = divmod(column, 32)
            if bits == 8:
                byte = tiles[rb][g][within // 4][r][within % 4]
                q = byte - 256 if byte > 127 else byte
            else:
                byte = tiles[rb][g][within % 16 // 4][r][within % 4]
                q = (byte & 15 if within < 16 else byte >> 4) - 8
            weight[row, column] = q * scale[rb][g][r]
    return weight


def ggml_round_to_nearest(weight: Tensor, bits: int) -> Tensor:
    """GGML's Q8_0 and Q4_0 on rows of whole groups, written from the formats' definition."""
    x = weight.float().view(-1, 32)
    if bits == 8:
        d = x.abs().amax(1, keepdim=True) / 127
        levels = torch.round(torch.where(d == 0, 0, x / d))
    else:
        d = x.gather(1, x.abs().argmax(1, keepdim=True)) / -8
        levels = torch.floor(torch.where(d == 0, 0, x / d) + 8.5).clamp(max=15) - 8
    return (levels * d.half().float()).view_as(weight)


def squared_error(weight: Tensor, approximation: Tensor) -> float:
    return float((weight.double() - approximation.double()).square().sum())


def round_trip(weight: Tensor, bits: int) -> Tensor:
    return dequantize(*quantize(weight, bits), *weight.shape, bits)


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 50), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_dequantize_follows_the_documented_layout(bits, rows, columns, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed, scales = quantize(weight, bits)
    assert (tuple(packed.shape), tuple(scales.shape)) == packed_shapes(rows, columns, bits)
    assert packed.dtype == torch.uint8
    assert scales.dtype == torch.float16
    expected = unpack_by_loop(packed, scales, rows, columns, bits)
    torch.testing.assert_close(
        dequantize(packed, scales, rows, columns, bits), expected, rtol=0, atol=0
    )


@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 50), columns=st.integers(1, 100), seed=st.integers(0, 99))
def test_every_weight_is_at_its_nearest_level(bits, rows, columns, seed):
    """Within half a step of the group, unless the search clipped it on purpose."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    packed, scales = quantize(weight, bits)
    step = scales.float().abs().transpose(1, 2).reshape(-1, scales.shape[1])
    step = step.repeat_interleave(32, dim=1)[:rows, :columns]
    error = (dequantize(packed, scales, rows, columns, bits) - weight).abs()
    reach = step * (127 if bits == 8 else 7)
    assert (error <= step * 0.5001 + (weight.abs() - reach).clamp(min=0)).all()


@pytest.mark.parametrize("bits", BITS)
def test_padding_is_zero_weights(bits):
    packed, scales = quantize(torch.randn(17, 33), bits)
    whole = dequantize(packed, scales, 32, 64, bits)
    assert (whole[17:] == 0).all()
    assert (whole[:, 33:] == 0).all()
    assert (scales.transpose(1, 2).reshape(32, 2)[17:] == 0).all()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("weights", ["gaussian", "student_t", "laplace", "one_outlier"])
def test_error_is_below_ggml_round_to_nearest(bits, weights):
    torch.manual_seed(0)
    weight = {
        "gaussian": lambda: torch.randn(256, 512),
        "student_t": lambda: torch.distributions.StudentT(3.0).sample((256, 512)),
        "laplace": lambda: torch.distributions.Laplace(0.0, 1.0).sample((256, 512)),
        # Groups of the outlier dominate, and no scale serves them and it.
        "one_outlier": lambda: torch.randn(256, 512).index_fill(1, torch.tensor([7]), 40.0),
    }[weights]()
    weight = (weight * 0.02).bfloat16().float()
    ours = weight - round_trip(weight, bits)
    ggml = weight - ggml_round_to_nearest(weight, bits)
    per_group = [e.view(-1, 32).square().sum(1) for e in (ours, ggml)]
    assert (per_group[0] <= per_group[1] * 1.0001 + 1e-12).all()
    assert per_group[0].sum() < 0.99 * per_group[1].sum()


@pytest.mark.parametrize("bits", BITS)
def test_search_reaches_the_measured_gain_on_gaussian_weights(bits):
    torch.manual_seed(1)
    weight = torch.randn(512, 1024) * 0.02
    ratio = squared_error(weight, round_trip(weight, bits)) / squared_error(
        weight, ggml_round_to_nearest(weight, bits)
    )
    assert ratio < {8: 0.83, 4: 0.91}[bits]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_source_dtype_and_strides_do_not_matter(bits, dtype):
    weight = torch.randn(40, 70).to(dtype)
    expected = quantize(weight.float(), bits)
    strided = torch.empty(70, 40, dtype=dtype).t().copy_(weight)
    for source in (weight, strided):
        packed, scales = quantize(source, bits)
        assert torch.equal(packed, expected[0])
        assert torch.equal(scales, expected[1])


@pytest.mark.parametrize("bits", BITS)
def test_chunks_of_rows_do_not_change_the_bytes(bits, monkeypatch):
    weight = torch.randn(100, 96)
    whole = quantize(weight, bits)
    monkeypatch.setattr(quantization, "_CHUNK_WEIGHTS", 1)
    tiled = quantize(weight, bits)
    assert torch.equal(whole[0], tiled[0])
    assert torch.equal(whole[1], tiled[1])


@pytest.mark.parametrize("bits", BITS)
def test_zero_groups_stay_zero_beside_others(bits):
    weight = torch.randn(20, 96)
    weight[3] = 0
    weight[:, 32:64] = 0
    approximation = round_trip(weight, bits)
    assert (approximation[3] == 0).all()
    assert (approximation[:, 32:64] == 0).all()
    assert (approximation[4, :32] != 0).any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("magnitude", [1e-12, 2.9e-8, 3.1e-8, 1e-7, 1e-6, 1e-5, 1e-4])
def test_tiny_weights_are_no_worse_than_ggml_and_never_worse_than_zero(bits, magnitude):
    """Below float16's normal range scales are coarse, down to none at all."""
    torch.manual_seed(2)
    weight = torch.randn(16, 64) * magnitude
    approximation = round_trip(weight, bits)
    error = squared_error(weight, approximation)
    assert error <= squared_error(weight, ggml_round_to_nearest(weight, bits)) * 1.0001
    assert error <= squared_error(weight, torch.zeros(16, 64))
    if magnitude <= 1e-7:
        assert (approximation - weight).abs().max() <= 2.0**-25 * 1.001


@pytest.mark.parametrize("bits", BITS)
def test_largest_representable_weights_survive(bits):
    limit = 65504.0 * {8: 127, 4: 8}[bits]
    weight = torch.zeros(16, 32)
    weight[0, 0], weight[1, 1] = limit, -limit
    approximation = round_trip(weight, bits)
    assert torch.isfinite(approximation).all()
    # int4 keeps only one sign's extreme level, so +max or -max may use 7 steps of the 8.
    torch.testing.assert_close(approximation, weight, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e7])
def test_weights_without_a_scale_are_refused(bits, bad):
    weight = torch.randn(64, 64)
    weight[40, 50] = bad
    with pytest.raises(UserError, match=rf"int{bits} needs finite weights .* --expert-dtype bf16"):
        quantize(weight, bits)


def test_other_widths_are_refused():
    with pytest.raises(ValueError, match="bits must be 8 or 4, got 3"):
        packed_shapes(16, 32, 3)


def test_bits_per_weight_are_as_promised():
    for bits, expected in ((8, 8.5), (4, 4.5)):
        packed, scales = quantize(torch.zeros(64, 128), bits)
        assert (packed.nbytes + scales.nbytes) * 8 / (64 * 128) == expected
