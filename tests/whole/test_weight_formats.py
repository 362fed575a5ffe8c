"""Every row of the table of weight formats has its bytes, its kernels and its choices."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from cpu_oracle import expected, make_layer, make_routing, unpack_block
from kernel_cases import SILU, run_experts

from moe_offload.checkpoint.block import block_layout, pack_block
from moe_offload.commands import prepare
from moe_offload.config import DENSE_FORMATS, WEIGHT_FORMATS, WeightFormat, smaller_format
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.library import FORMAT_CODES
from moe_offload.simulation.shapes import load_shape

KERNELS_HEADER = Path(prepare.__file__).parents[1] / "kernels" / "cpp" / "kernels.h"


def test_the_type_and_the_table_name_the_same_formats() -> None:
    assert get_args(WeightFormat) == tuple(WEIGHT_FORMATS)


def test_codes_are_those_of_the_kernels() -> None:
    body = re.search(r"enum WeightFormat[^{]*\{([^}]*)\}", KERNELS_HEADER.read_text())
    assert body is not None
    found = re.findall(r"k(\w+) = (\d+)", body[1])
    assert {name.lower(): int(code) for name, code in found} == FORMAT_CODES


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_block_takes_the_bits_the_table_says(name: WeightFormat) -> None:
    layout = block_layout(name, 128, 256)
    n_weights = 3 * 128 * 256
    n_bits = sum(field.n_bytes for field in layout.fields) * 8
    assert n_bits == n_weights * WEIGHT_FORMATS[name].bits_per_weight


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_a_simulated_block_is_as_large_as_a_stored_one(name: WeightFormat) -> None:
    shape = load_shape("mixtral-8x7b")
    stored = block_layout(name, shape.hidden, shape.intermediate)
    assert shape.block_bytes(name) == stored.block_bytes


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_the_cpu_kernels_compute_it(name: WeightFormat) -> None:
    """Within the bound that the format's rounding of activations and fp32 sums give."""
    layer = make_layer(name, 64, 32, has_gate=True, has_bias=False, seed=0)
    routed = make_routing(layer, 3, 2, torch.float32, seed=0)
    out = run_experts(CpuExperts(layer.layout, SILU, kernel="native"), layer, routed)
    wanted, bound = expected(layer, routed, SILU)
    assert ((out.double() - wanted).abs() <= bound).all()


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
def test_packing_keeps_what_the_bits_can_hold(name: WeightFormat) -> None:
    torch.manual_seed(0)
    layout = block_layout(name, 64, 32)
    weights = {"gate_up": torch.randn(64, 64), "down": torch.randn(64, 32)}
    block = torch.empty(layout.block_bytes, dtype=torch.uint8)
    pack_block(layout, weights, block)
    step = 2.0 ** -(min(WEIGHT_FORMATS[name].bits, 24) // 2)  # coarser than any of them rounds
    for field, found in unpack_block(layout, block).items():
        assert (found - weights[field]).norm() < step * weights[field].norm()


def test_triton_kernels_are_tested_in_every_format() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    import interpreted_kernels

    assert {case.weight_format for case in interpreted_kernels.CASES} == set(WEIGHT_FORMATS)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        *(("--expert-dtype", name) for name in WEIGHT_FORMATS),
        *(("--dense-dtype", name) for name in DENSE_FORMATS),
    ],
)
def test_it_can_be_prepared(
    name: str, flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The choice is taken: what is missed is the source."""
    paths = ["--input-path", str(tmp_path / "none"), "--output-path", str(tmp_path / "out")]
    assert prepare.main([*paths, flag, name]) == 2
    assert "found nothing" in capsys.readouterr().err


def test_each_format_but_the_smallest_has_a_smaller_one() -> None:
    names = ["fp32"]
    while (smaller := smaller_format(names[-1])) is not None:
        names.append(smaller)
    bits = [WEIGHT_FORMATS[name].bits for name in names]
    assert bits == sorted({facts.bits for facts in WEIGHT_FORMATS.values()})[::-1]
