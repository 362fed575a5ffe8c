"""Packing by the C++ kernels: on every instruction set the bytes of the search in torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_offload.checkpoint import quantization
from moe_offload.errors import UserError
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_quantise import KernelPacker
from moe_offload.kernels.library import open_library, supported_isas

LARGEST = {"int8": 65504.0 * 127, "int4": 65504.0 * 8, "mxfp4": 1e38}
FORMATS = tuple(LARGEST)


def any_bits(rows: int, columns: int) -> Tensor:
    """bf16 of every magnitude that has a scale, subnormal ones and both zeros among them."""
    bits = torch.randint(-(1 << 15), 1 << 15, (rows, columns), dtype=torch.int16)
    values = bits.view(torch.bfloat16)
    return torch.where(values.abs() < 5e5, values, torch.zeros_like(values))


def group_magnitudes(rows: int, columns: int) -> Tensor:
    """Gaussian groups between nothing and the largest scale."""
    powers = torch.randint(-48, 19, (rows, -(-columns // 32))).repeat_interleave(32, 1)
    return torch.randn(rows, columns).clamp_(-1.9, 1.9) * 2.0 ** powers[:, :columns]


def half_steps(rows: int, columns: int) -> Tensor:
    """Whole and half levels of powers of two: ties between levels, signs and candidates."""
    return torch.randint(-16, 17, (rows, columns)) * 0.5 * 2.0 ** torch.randint(-26, 4, (rows, 1))


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "gaussian": lambda *shape: (torch.randn(shape) * 0.02).bfloat16(),
    "any bits": any_bits,
    "groups of many magnitudes": group_magnitudes,
    "half steps": half_steps,
    "zeros of both signs": lambda *shape: torch.zeros(shape).mul_(torch.randn(shape).sign()),
    "equal": lambda *shape: torch.full(shape, -0.3),
    "two values": lambda *shape: torch.randint(0, 2, shape) * 2.0 - 1.0,
    "subnormal": lambda *shape: torch.randn(shape) * 1e-40,
    "below the smallest scale": lambda *shape: torch.randn(shape) * 2.0**-25,
    "outliers": lambda *shape: torch.randn(shape).pow_(9).clamp_(-5e5, 5e5),
}


def packers() -> dict[str, quantization.Packer]:
    isas = supported_isas(open_library())
    found = {isa: load_kernels("native", isa) for isa in isas}
    return {isa: KernelPacker(kernels) for isa, kernels in found.items() if kernels is not None}


def rounded(packer: quantization.Packer, weight: Tensor, name: str) -> tuple[Tensor, Tensor]:
    if name == "mxfp4":
        return packer.round_to_e2m1(weight)
    return packer.quantize(weight, 8 if name == "int8" else 4)


def assert_same_bytes(weight: Tensor, name: str) -> None:
    packed, scales = rounded(quantization.BY_TORCH, weight, name)
    for isa, packer in packers().items():
        found_packed, found_scales = rounded(packer, weight, name)
        assert torch.equal(found_scales.view(torch.uint8), scales.view(torch.uint8)), isa
        assert torch.equal(found_packed, packed), isa


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", MATRICES)
def test_bytes_are_those_of_the_plain_search(kind: str, name: str) -> None:
    torch.manual_seed(0)
    assert_same_bytes(MATRICES[kind](256, 192), name)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", MATRICES)
def test_bytes_of_many_matrices(kind: str, name: str) -> None:
    for seed in range(50):
        torch.manual_seed(seed)
        assert_same_bytes(MATRICES[kind](1024, 512), name)


@pytest.mark.parametrize("name", FORMATS)
def test_sizes_strides_and_dtypes(name: str) -> None:
    torch.manual_seed(1)
    for rows, columns in ((1, 1), (16, 32), (15, 31), (17, 33), (40, 70)):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            weight = torch.randn(rows, columns).to(dtype)
            assert_same_bytes(weight, name)
            assert_same_bytes(weight.t().contiguous().t(), name)
            assert_same_bytes(torch.randn(2 * rows, 3 * columns).to(dtype)[::2, ::3], name)


@pytest.mark.parametrize("name", FORMATS)
def test_the_largest_weights_have_a_scale(name: str) -> None:
    weight = torch.zeros(16, 64)
    weight[0, 0], weight[1, 40] = LARGEST[name], -LARGEST[name]
    assert_same_bytes(weight, name)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2e38])
def test_weights_without_a_scale_are_refused_alike(name: str, bad: float) -> None:
    for place in ((0, 0), (40, 50), (63, 63)):
        weight = torch.randn(64, 64)
        weight[place] = bad
        with pytest.raises(UserError) as expected:
            rounded(quantization.BY_TORCH, weight, name)
        for isa, packer in packers().items():
            with pytest.raises(UserError) as found:
                rounded(packer, weight, name)
            assert str(found.value) == str(expected.value), isa


@pytest.mark.parametrize("bits", [8, 4])
def test_levels_of_any_size_and_strides(bits: int) -> None:
    """A source's own codes; rows and columns that are no whole tiles, and views."""
    torch.manual_seed(1)
    for rows, columns in ((1, 1), (16, 32), (15, 31), (17, 33), (40, 70)):
        levels = torch.randint(0, 1 << bits, (2 * rows, 3 * columns), dtype=torch.uint8)
        plain = levels[:rows, :columns].contiguous()
        for view in (plain, plain.t().contiguous().t(), levels[::2, ::3]):
            expected = quantization.pack_levels(view, bits)
            for isa, packer in packers().items():
                assert torch.equal(packer.pack_levels(view, bits), expected), isa
