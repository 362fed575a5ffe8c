"""What the expert kernels compute exactly: integer products, scales, activations at their limits.

Quantised formats are held to an oracle that rounds activations as the kernels do. With that
rounding shared, and sums exact inside a group, what is left is fp32 over the G groups: (G + 4) u
times the sum of magnitudes, u = 2^-24; and the levels of the middle that lie so near a tie that
such an error decides them, which may differ by one step of their group. `cpu_oracle` allows every
activation half a step in the worst direction: that bound holds for any correct int8 or int4 kernel
but is of an output's own size, so it tells little. A test here makes sure that this one is not.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from typing import get_args

import pytest
import torch
from cpu_oracle import (
    TINY,
    Layer,
    Routed,
    U,
    activate,
    as_quantised,
    expected,
    group_largest,
    make_layer,
    make_routing,
    read_layer,
    rounds_activations,
)
from torch import Tensor, nn

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.block import Activation, WeightFormat, block_layout, pack_block
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.library import supported_isas
from moe_offload.kernels.oracle import apply_activation

FORMATS: tuple[WeightFormat, ...] = get_args(WeightFormat)
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_swiglu")
SILU = Activation("silu")
CLAMPED = Activation("clamped_swiglu", 1.702, 7.0)

NATIVE = load_kernels("native")
assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)


def run(experts: CpuExperts, layer: Layer, routed: Routed) -> Tensor:
    out = torch.full((len(routed.hidden), layer.layout.hidden_size), float("nan"))
    experts.run(routed.hidden, layer.pointers, routed.on_cpu, routed.index, routed.weight, out)
    return out


def rounded(x: Tensor, x_error: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x as the kernels round it, a bound on the difference when x errs, and what lies at a tie."""
    largest = group_largest(x)
    step = torch.where(largest > 1e-30, largest / 127, 0.0)
    steps = torch.where(step > 0, x / step, 0.0)
    levels = steps.round()
    group_error = group_largest(x_error)
    step_error = group_error / 127 + 2 * U * step
    # The quotient errs by its two operands' errors and three roundings of fp32.
    off = torch.where(step > 0, (x_error + steps.abs() * step_error) / step, 0.0)
    off = off + 3 * U * steps.abs()
    undecided = ((steps - steps.floor() - 0.5).abs() <= off).double()
    return levels * step, levels.abs() * step_error + undecided * (step + step_error), undecided


def rounded_product(
    weight: Tensor, seen: Tensor, error: Tensor, bias: Tensor | float
) -> tuple[Tensor, Tensor]:
    """seen @ weight.T + bias, and the bound on its error, when what is seen errs by `error`."""
    magnitude = (seen.abs() + error) @ weight.abs().T + torch.as_tensor(bias).abs()
    groups = -(-weight.shape[1] // 32)
    return seen @ weight.T + bias, error @ weight.abs().T + (groups + 4) * U * magnitude


def rounded_expert(
    weights: dict[str, Tensor], x: Tensor, activation: Activation, has_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """One expert on float64 `x` [n, H] with rounded activations, its bound, the middle's ties."""
    tokens = as_quantised(x)  # without an error of their own, so to the bit
    first, error = rounded_product(
        weights["gate_up"], tokens, 2 * U * tokens.abs(), weights.get("gate_up_bias", 0.0)
    )
    act, up, slope = activate(first, activation, has_gate)
    gate = first.chunk(2, -1)[0] if has_gate else first
    gate_error, up_error = error.chunk(2, -1) if has_gate else (error, 0 * error)
    if activation.kind == "relu2":
        slope = slope + gate_error
    act_error = slope * gate_error + 16 * U * (act.abs() + gate.abs())
    middle_error = act_error * (up.abs() + up_error) + act.abs() * up_error
    middle_error = middle_error + 2 * U * (act * up).abs() + TINY
    middle, middle_error, undecided = rounded(act * up, middle_error)
    y, error = rounded_product(weights["down"], middle, middle_error, weights.get("down_bias", 0.0))
    return y, error, undecided


def rounded_expected(
    layer: Layer, routed: Routed, activation: Activation
) -> tuple[Tensor, Tensor, float]:
    """The output [T, H] with rounded activations, its bound, and the share of ties."""
    x = routed.hidden.double()
    out, bound = torch.zeros_like(x), torch.zeros_like(x)
    ties = []
    for expert, weights in enumerate(layer.weights):
        tokens, position = torch.where(routed.index == expert)
        if not routed.on_cpu[expert] or len(tokens) == 0:
            continue
        y, error, undecided = rounded_expert(weights, x[tokens], activation, layer.layout.has_gate)
        share = routed.weight[tokens, position, None].double()
        sums = (routed.index.shape[1] + 1) * U * (y.abs() + error)
        out.index_add_(0, tokens, share * y)
        bound.index_add_(0, tokens, share * (error + sums))
        ties.append(undecided.flatten())
    return out, bound, float(torch.cat(ties).mean()) if ties else 0.0


@dataclasses.dataclass(frozen=True)
class Reference:
    """A case and what it must give."""

    layer: Layer
    routed: Routed
    activation: Activation
    want: Tensor
    bound: Tensor


@functools.cache
def references(weight_format: WeightFormat) -> tuple[Reference, ...]:
    """Sizes from 1 to 300, T to 40, experts here and elsewhere, repeats; bf16 and fp32 tokens."""
    rng = random.Random(weight_format)
    found = []
    for seed in range(20):
        kind = KINDS[seed % len(KINDS)]
        gated = kind == "clamped_swiglu" or rng.random() < 0.7
        sizes = (rng.randint(1, 300), rng.randint(1, 300))
        layer = make_layer(
            weight_format, *sizes, has_gate=gated, has_bias=rng.random() < 0.5, seed=seed
        )
        n_tokens = rng.choice((1, 2, 3, 4, rng.randint(5, 40)))
        dtype = rng.choice((torch.float32, torch.bfloat16))
        routed = make_routing(layer, n_tokens, rng.randint(1, 4), dtype, seed)
        activation = Activation(kind, 1.702, 1.5)
        if rounds_activations(layer.layout, dtype):
            want, bound, ties = rounded_expected(layer, routed, activation)
            assert ties < 0.02
        else:
            want, bound = expected(layer, routed, activation)
        found.append(Reference(layer, routed, activation, want, bound))
    return tuple(found)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_bound_tells_a_wrong_output(weight_format):
    """It is below a tenth of the value itself for nine elements of ten and more."""
    small = [
        (reference.bound < 0.1 * reference.want.abs())[reference.want != 0].flatten()
        for reference in references(weight_format)
    ]
    assert torch.cat(small).double().mean() > 0.9


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
def test_any_size_within_the_bound(weight_format, isa):
    for number, case in enumerate(references(weight_format)):
        want, bound = case.want, case.bound
        if weight_format in ("bf16", "fp8") and isa == "avx512_bf16":
            want, bound = expected(case.layer, case.routed, case.activation, bf16_panels=True)
        experts = CpuExperts(case.layer.layout, case.activation, kernel="native", isa=isa)
        error = (run(experts, case.layer, case.routed).double() - want).abs()
        assert (error <= bound).all(), (number, float((error / bound).max()))


@functools.cache
def wide_case(weight_format: WeightFormat, n_tokens: int) -> Reference:
    """Both matrices are wider than one slice of the weights that many tokens share, and odd."""
    layer = make_layer(weight_format, 2083, 1061, n_experts=1)
    routed = make_routing(layer, n_tokens, 1)
    if rounds_activations(layer.layout, torch.float32):
        want, bound, _ = rounded_expected(layer, routed, SILU)
    else:
        want, bound = expected(layer, routed, SILU)
    return Reference(layer, routed, SILU, want, bound)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 19])
def test_matrices_of_several_slices(weight_format, isa, n_tokens):
    case = wide_case(weight_format, n_tokens)
    experts = CpuExperts(case.layer.layout, SILU, kernel="native", isa=isa)
    error = (run(experts, case.layer, case.routed).double() - case.want).abs()
    assert (error <= case.bound).all(), float((error / case.bound).max())


def packed_linear(packed: Tensor, scale: Tensor, columns: int, isa: str) -> CpuLinear:
    rows = packed.shape[0] * quantization.TILE_ROWS
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    bits = packed.shape[2]
    return CpuLinear.from_packed(linear, packed, scale, bits, kernel="native", isa=isa)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_integer_sums_of_the_largest_levels_do_not_saturate(bits, isa):
    """Every weight and every activation at the end of its range, in all signs."""
    columns = 96
    packed_shape, scale_shape = quantization.packed_shapes(32, columns, bits)
    ends = {8: (0x81, 0x7F), 4: (0x00, 0xFF, 0x0F, 0xF0)}[bits]
    signs = torch.stack((torch.ones(columns), torch.arange(columns) % 2 * 2.0 - 1))
    signs = torch.cat((signs, -signs, torch.randn(3, columns).sign()))
    for end in (*ends, None):
        if end is None:  # any byte but int8's -128, which no file holds
            packed = torch.randint(0, 256, packed_shape, dtype=torch.uint8)
            packed[packed == 0x80] = 0x81
        else:
            packed = torch.full(packed_shape, end, dtype=torch.uint8)
        scale = torch.ones(scale_shape, dtype=torch.float16)
        weight = quantization.dequantize(packed, scale, 32, columns, bits).double()
        for n_tokens in (1, 2, 3, 5, 7):
            x = 127 * signs[:n_tokens]  # levels are +-127, steps 1: every sum is a whole number
            y = packed_linear(packed, scale, columns, isa)(x)
            assert torch.equal(y.double(), x.double() @ weight.T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [8, 4])
def test_every_float16_is_a_scale(bits, isa):
    """Negative, subnormal and infinite ones, one per row and group, NaN as well."""
    packed_shape, scale_shape = quantization.packed_shapes(16 * 64, 32 * 64, bits)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    scale = every.view(scale_shape)
    packed = torch.full(packed_shape, {8: 1, 4: 0x99}[bits], dtype=torch.uint8)  # all levels 1
    for group in range(0, 64, 7):
        x = torch.zeros(1, 32 * 64)
        x[0, group * 32] = 127.0
        one = scale[:, group].flatten().double() * 127
        # Other groups contribute 0 * scale: nothing, or NaN where that scale is not finite.
        spoiled = ~scale.isfinite().all(1).flatten()
        y = packed_linear(packed, scale, 32 * 64, isa)(x)[0].double()
        assert torch.equal(y[~spoiled], one[~spoiled])
        assert not y[spoiled].isfinite().any()


VALUES = (0.0, 1e-40, 1e-20, 0.1, 1.0, 3.0, 7.0, 10.0, 20.0, 87.0, 88.0, 88.5, 89.0, 200.0)
LARGE = (1e4, 1e10, 1e20, 3e38, float("inf"))
GATES = (*VALUES, *(-v for v in VALUES), *LARGE, *(-v for v in LARGE), float("nan"))
UPS = (0.5, -3.0, 30.0, float("inf"), float("-inf"), float("nan"))
GATED = [(gate, up) for gate in GATES for up in (UPS if gate in (1.0, -1.0) else UPS[:1])]
WIDTH = 33  # a vector and a tail


@functools.cache
def biased_layer(weight_format: WeightFormat) -> Layer:
    """An expert for each pair of gate and up, which are its biases; its output is their mean."""
    layout = block_layout(weight_format, 1, WIDTH, True, True)
    blocks = torch.zeros(len(GATED), layout.block_bytes, dtype=torch.uint8)
    for block, (gate, up) in zip(blocks, GATED, strict=True):
        weights = {
            "gate_up": torch.zeros(2 * WIDTH, 1),
            "down": torch.full((1, WIDTH), 1 / WIDTH),
            "gate_up_bias": torch.tensor([gate] * WIDTH + [up] * WIDTH),
            "down_bias": torch.zeros(1),
        }
        pack_block(layout, weights, block)
    return read_layer(layout, blocks)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_from_zero_to_infinity(weight_format, kind, isa):
    """x is 0, so that gate and up are an expert's biases.

    Finite stays within 20 u of gate * up (what erf and 1 + tanh lose near zero) and NaN stays;
    what is infinite or NaN in torch stays not finite, whichever of them.
    """
    layer = biased_layer(weight_format)
    activation = Activation(kind, 1.702, 7.0)
    biases = torch.tensor(GATED, dtype=torch.float64)
    first = torch.cat((biases[:, :1].expand(-1, WIDTH), biases[:, 1:].expand(-1, WIDTH)), 1)
    middle = apply_activation(first, activation, True).float()
    want = (middle[:, 0] * layer.weights[0]["down"].sum().float()).double()
    scale = (biases[:, 0] * biases[:, 1].abs().clamp(min=1.0)).abs()
    experts = CpuExperts(layer.layout, activation, kernel="native", isa=isa)
    for repeats in (1, 20):  # few tokens for an expert, and a panel of them
        index = torch.arange(len(GATED)).repeat(repeats)[:, None]
        n_tokens = len(index)
        routed = Routed(
            torch.zeros(n_tokens, 1),
            torch.ones(len(GATED), dtype=torch.uint8),
            index,
            torch.ones(n_tokens, 1),
        )
        out = run(experts, layer, routed).view(repeats, -1).double()
        finite = want.isfinite()
        bound = (20 + WIDTH) * U * torch.where(finite, want.abs(), 0) + 1e-30
        bound = bound + 20 * U * torch.where(scale < 20, scale, 0)
        assert ((out - want).abs() <= bound)[:, finite].all()
        assert not out[:, ~finite].isfinite().any()
        assert out[:, biases.isnan().any(1)].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("n_tokens", [1, 4, 12])
def test_bf16_tokens_are_their_fp32_values(weight_format, isa, n_tokens):
    if (weight_format in ("bf16", "fp8") and isa == "avx512_bf16") or weight_format == "mxfp4":
        pytest.skip("bf16 tokens take another product there, fp32 ones the exact one")
    layer = make_layer(weight_format, 77, 50)
    routed = make_routing(layer, n_tokens, dtype=torch.bfloat16)
    experts = CpuExperts(layer.layout, SILU, kernel="native", isa=isa)
    widened = dataclasses.replace(routed, hidden=routed.hidden.float())
    assert torch.equal(run(experts, layer, routed), run(experts, layer, widened))


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("activation", [SILU, CLAMPED, Activation("relu2")], ids=lambda a: a.kind)
def test_the_torch_fallback_is_within_the_bound_of_float64(weight_format, activation):
    """Masks, repeats and ids out of range included; no activation is rounded there."""
    layer = make_layer(weight_format, 45, 70, has_bias=True)
    routed = make_routing(layer, 11, 3)
    routed.index[2] = torch.tensor([-1, 4, 1])
    routed.index[3] = 99
    routed.on_cpu.copy_(torch.tensor([1, 1, 0, 255], dtype=torch.uint8))
    experts = CpuExperts(layer.layout, activation, kernel="torch")
    out = run(experts, layer, routed).double()
    exact = dataclasses.replace(layer, layout=block_layout("fp32", 45, 70, True, True))
    want, bound = expected(exact, routed, activation)
    assert ((out - want).abs() <= bound).all() and (out[3] == 0).all()
