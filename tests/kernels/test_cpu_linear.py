"""CpuLinear against float64, in every weight format, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from cpu_oracle import TINY, U, as_quantised
from torch import Tensor, nn

from moe_offload.checkpoint import quantization
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.library import supported_isas

NATIVE = load_kernels("native")
assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)
FORMATS = ("fp32", "bf16", "int8", "int4")
SIZES = ((1, 1), (5, 33), (17, 64), (48, 31), (100, 257), (130, 96), (33, 2100))  # out, in


def make_linear(
    weight_format: str, rows: int, columns: int, bias: bool, isa: str, kernel: str = "native"
) -> tuple[CpuLinear, Tensor, Tensor]:
    """The layer, its weight in float64 and its bias in float64."""
    torch.manual_seed(rows * columns)
    linear = nn.Linear(columns, rows, bias=bias).requires_grad_(False)
    if weight_format != "fp32":
        linear = linear.bfloat16()
    offset = torch.zeros(rows) if linear.bias is None else linear.bias
    if weight_format in ("fp32", "bf16"):
        layer = CpuLinear.from_linear(linear, kernel=kernel, isa=isa)
        return layer, linear.weight.double(), offset.double()
    bits = int(weight_format[3:])
    packed, scale = quantization.quantize(linear.weight, bits)
    layer = CpuLinear.from_packed(linear, packed, scale, bits, kernel=kernel, isa=isa)
    weight = quantization.dequantize(packed, scale, rows, columns, bits)
    return layer, weight.double(), offset.double()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_a_few_units_of_float64(weight_format, isa, dtype):
    """u per product and sum; a bf16 output adds half a unit of 2^-8. Integer sums are exact, so
    the quantised formats are held to the quantised activations just as tightly."""
    for number, (rows, columns) in enumerate(SIZES):
        layer, weight, bias = make_linear(weight_format, rows, columns, number % 2 == 0, isa)
        for n_tokens in (1, 2, 4, 5, 9, 10, 11, 12, 13, 21, 33, 70, 88):
            x = torch.randn(n_tokens, columns).to(dtype)
            seen = as_quantised(x) if weight_format in ("int8", "int4") else x.double()
            want = seen @ weight.T + bias
            bound = (columns + 6) * U * (seen.abs() @ weight.abs().T + bias.abs()) + TINY
            if dtype == torch.bfloat16:
                bound = bound + 2.0**-8 * (want.abs() + bound)
            y = layer(x)
            assert y.dtype == dtype and y.shape == (n_tokens, rows)
            assert ((y.double() - want).abs() <= bound).all()


def test_any_leading_dimensions_and_strides():
    layer, weight, bias = make_linear("bf16", 20, 40, True, "auto")
    x = torch.randn(40, 3, 2, 5).bfloat16().permute(1, 2, 3, 0)
    y = layer(x)
    assert y.shape == (3, 2, 5, 20)
    assert torch.allclose(y.double(), x.double() @ weight.T + bias, rtol=2**-8, atol=1e-6)
    assert layer(x[:0]).shape == (0, 2, 5, 20)
    assert layer(x[0, 0, 0]).shape == (20,)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_a_long_prompt_is_computed_in_chunks(weight_format):
    layer, _, _ = make_linear(weight_format, 64, 256, True, "auto")
    x = torch.randn(33000, 256).bfloat16()
    whole = layer(x)
    assert torch.equal(layer(x[32900:]), whole[32900:])


@pytest.mark.parametrize("weight_format", FORMATS)
def test_torch_computes_the_same_layer_where_no_kernel_runs(weight_format):
    fallback, weight, bias = make_linear(weight_format, 30, 50, True, "auto", kernel="torch")
    x = torch.randn(4, 50)
    if weight_format != "fp32":
        x = x.bfloat16()  # torch multiplies one dtype
    want = x.double() @ weight.T + bias
    assert torch.allclose(fallback(x).double(), want, rtol=0.02, atol=0.01)
    native, _, _ = make_linear(weight_format, 30, 50, True, "auto")
    assert torch.allclose(native(x).double(), want, rtol=0.02, atol=0.02)


def test_only_what_the_kernels_read_is_accepted():
    with pytest.raises(ValueError, match="contiguous bf16 or fp32"):
        CpuLinear.from_linear(nn.Linear(4, 4).half())
    linear = nn.Linear(64, 32, bias=False)
    packed, scale = quantization.quantize(linear.weight.detach(), 8)
    with pytest.raises(ValueError, match="packed shapes"):
        CpuLinear.from_packed(nn.Linear(64, 48), packed, scale, 8)
    layer = CpuLinear.from_packed(linear, packed, scale, 8)
    assert "in_features=64, out_features=32, int8" in repr(layer)
    assert set(layer.state_dict()) == {"packed", "scale"}
