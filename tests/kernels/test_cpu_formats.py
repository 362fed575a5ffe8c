"""The kernels over a quantised source's own numbers: every scale type, group, zero and minimum."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from cpu_oracle import expected, make_routing, read_layer
from kernel_cases import ISAS, SILU, run_experts
from quantised_matrices import SOURCES, source_blocks

from moe_offload.checkpoint.block import BlockLayout
from moe_offload.kernels.cpu_experts import CpuExperts

KEPT = [pytest.param(*source, id=f"{source[0]}-{number}") for number, source in enumerate(SOURCES)]


def within_bound(name: str, layer, routed, isa: str) -> torch.Tensor:
    experts = CpuExperts(layer.layout, SILU, kernel="native", isa=isa)
    out = run_experts(experts, layer, routed)
    panels = name == "fp8" and isa == "avx512_bf16" and routed.hidden.dtype == torch.bfloat16
    want, bound = expected(layer, routed, SILU, bf16_panels=panels)
    error = (out.double() - want).abs()
    assert (error <= bound).all(), float((error / bound).max())
    assert torch.equal(run_experts(experts, layer, routed), out)  # the same bits
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("name", "scales"), KEPT)
def test_a_sources_own_scales_within_the_bound_of_float64(name, scales, isa):
    torch.manual_seed(2)
    for hidden, width in ((1, 1), (45, 70), (160, 33), (300, 257)):
        layer = read_layer(*source_blocks(name, scales, hidden, width, 3))
        for n_tokens, dtype in ((1, torch.bfloat16), (7, torch.float32), (21, torch.bfloat16)):
            within_bound(name, layer, make_routing(layer, n_tokens, 2, dtype), isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["mxfp4", "fp8"])
def test_every_number_of_tokens_from_1_to_70(name, isa):
    scales = dict(SOURCES)[name] if name == "mxfp4" else SOURCES[1][1]
    torch.manual_seed(3)
    layer = read_layer(*source_blocks(name, scales, 77, 131, 1))
    for dtype in (torch.bfloat16, torch.float32):
        routed = make_routing(layer, 70, 1, dtype)
        whole = within_bound(name, layer, routed, isa)
        for n in range(1, 70):
            some = dataclasses.replace(
                routed, hidden=routed.hidden[:n], index=routed.index[:n], weight=routed.weight[:n]
            )
            out = within_bound(name, layer, some, isa)
            if name == "mxfp4" and dtype == torch.bfloat16:  # sums of integers in one order
                assert torch.equal(out, whole[:n])


@pytest.mark.parametrize("isa", ISAS)
def test_every_code_times_every_activation_sign_does_not_saturate(isa):
    """mxfp4's integer sums at their largest: codes of +-6 against levels of +-127."""

    layout, blocks = source_blocks("mxfp4", SOURCES[0][1], 64, 32, 1)
    for end in (0x77, 0xFF, 0x7F, 0xF7):
        block = blocks.clone()
        layout.field("gate_up").view(block).fill_(end)
        layer = read_layer(layout, block)
        for signs in (torch.ones(64), torch.arange(64) % 2 * 2.0 - 1):
            routed = make_routing(layer, 1, 1, torch.bfloat16)
            routed.on_cpu.fill_(1)
            routed.index.zero_()
            routed.hidden.copy_(signs * 127)
            within_bound("mxfp4", layer, routed, isa)


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("int4", {"scale_type": 3}),
        ("int4", {"scale_group": 33}),
        ("int4", {"offset_type": 1}),
        ("mxfp4", {"scale_type": 0}),
        ("mxfp4", {"scale_group": 64}),
        ("fp8", {"scale_rows": 0}),
        ("fp8", {"gate_up_scale": -1}),
    ],
)
def test_scales_that_the_kernels_do_not_read_are_refused(name, fault):
    scales = {"int4": SOURCES[5][1], "mxfp4": SOURCES[0][1], "fp8": SOURCES[1][1]}[name]
    layer = read_layer(*source_blocks(name, scales, 64, 32, 1))
    assert isinstance(layer.layout, BlockLayout)
    experts = CpuExperts(layer.layout, SILU, kernel="native")
    for field, value in fault.items():
        setattr(experts._layer, field, value)
    routed = make_routing(layer, 1, 1)
    with pytest.raises(ValueError, match="cannot be"):
        run_experts(experts, layer, routed)
