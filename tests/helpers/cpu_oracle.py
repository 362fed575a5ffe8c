"""A float64 expert layer, and how far a correct kernel may be from it.

The bound is elementwise and follows the arithmetic. u = 2^-24 is fp32's unit roundoff; a sum of n
products in any order errs by at most (n + 3) u times the sum of their magnitudes. On top:
- bf16 panels (AVX512-BF16) round the middle to bf16, half a unit of 2^-8, and take subnormals as
- products through oneDNN round what they give, gate_up's and down's, to bf16 as well, before the
  bias, and the middle as above;
  zero; fp8 weights are rounded to bf16 there as well;
- int8, int4 and, for bf16 tokens, mxfp4 round activations to 127 levels of their group's largest,
  so by at most largest / 254, and groups below 1e-30 to zero. Weights are the block's own,
  dequantised; with a zero or a minimum of their own, a weight is the sum of two larger parts.
An activation passes an error on times its Lipschitz constant (1.13 for silu and the gelus) and adds
a few u of its own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_offload.checkpoint.block import (
    Activation,
    BlockLayout,
    block_layout,
    pack_block,
    unpack_matrix,
)
from moe_offload.config import WEIGHT_FORMATS, WeightFormat

U = 2.0**-24
TINY = 2.0**-126
SLOPE = 1.13


def unpack_block(layout: BlockLayout, block: Tensor) -> dict[str, Tensor]:
    """A block's logical weights in fp32: `gate_up` [R, H], `down` [H, I] and the biases."""
    weights = {"gate_up": unpack_matrix(layout, block, "gate_up").float()}
    weights["down"] = unpack_matrix(layout, block, "down").float()
    if layout.has_bias:
        weights["gate_up_bias"] = layout.field("gate_up_bias").view(block)
        weights["down_bias"] = layout.field("down_bias").view(block)
    return weights


@dataclass(frozen=True)
class Layer:
    """A few experts of random weights, as blocks and as float64 matrices."""

    layout: BlockLayout
    blocks: Tensor  # uint8 [E, block_bytes]
    weights: list[dict[str, Tensor]]

    @property
    def pointers(self) -> Tensor:
        return torch.tensor([block.data_ptr() for block in self.blocks], dtype=torch.int64)


@dataclass(frozen=True)
class Routed:
    """Tokens and their routing, as `CpuExperts.run` takes them."""

    hidden: Tensor
    on_cpu: Tensor
    index: Tensor
    weight: Tensor


def make_layer(
    weight_format: WeightFormat,
    hidden_size: int,
    intermediate_size: int,
    *,
    n_experts: int = 4,
    has_gate: bool = True,
    has_bias: bool = False,
    seed: int = 0,
) -> Layer:
    torch.manual_seed(seed)
    layout = block_layout(weight_format, hidden_size, intermediate_size, has_gate, has_bias)
    blocks = torch.zeros(n_experts, layout.block_bytes, dtype=torch.uint8)
    rows = layout.first_rows
    for block in blocks:
        weights = {
            "gate_up": torch.randn(rows, hidden_size) * hidden_size**-0.5 * 2,
            "down": torch.randn(hidden_size, intermediate_size) * intermediate_size**-0.5,
            "gate_up_bias": torch.randn(rows),
            "down_bias": torch.randn(hidden_size),
        }
        pack_block(layout, weights, block)
    return read_layer(layout, blocks)


def read_layer(layout: BlockLayout, blocks: Tensor) -> Layer:
    unpacked = [unpack_block(layout, block) for block in blocks]
    return Layer(layout, blocks, [{k: v.double() for k, v in w.items()} for w in unpacked])


def make_routing(
    layer: Layer, n_tokens: int, top_k: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Routed:
    """Random tokens, experts with repeats, about a third of the experts left to others."""
    torch.manual_seed(seed)
    n_experts = len(layer.blocks)
    on_cpu = (torch.rand(n_experts) < 0.67).to(torch.uint8)
    on_cpu[seed % n_experts] = 1
    return Routed(
        torch.randn(n_tokens, layer.layout.hidden_size).to(torch.bfloat16).to(dtype),
        on_cpu,
        torch.randint(0, n_experts, (n_tokens, top_k)),
        torch.rand(n_tokens, top_k),
    )


def group_largest(x: Tensor) -> Tensor:
    """Each element's group's largest magnitude, groups of 32 along the last axis."""
    padded = torch.nn.functional.pad(x.abs(), (0, -x.shape[-1] % 32))
    largest = padded.unflatten(-1, (-1, 32)).amax(-1, keepdim=True)
    return largest.expand(*largest.shape[:-1], 32).flatten(-2)[..., : x.shape[-1]]


def as_quantised(x: Tensor) -> Tensor:
    """The kernels' activations: fp32 steps to the nearest of 127 levels, groups of 32."""
    largest = group_largest(x.float())
    usable = largest > 1e-30
    inverse = torch.full_like(largest, 127) / largest  # 127 / largest would multiply a reciprocal
    levels = torch.where(usable, x.float() * inverse, 0.0).round()
    return levels.double() * torch.where(usable, largest / 127, 0.0).double()


def activate(
    first: Tensor, activation: Activation, has_gate: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(act(gate), up, slope of act) in the dtype of `first` [n, R]; up is 1 without a gate."""
    gate, up = first.chunk(2, -1) if has_gate else (first, torch.ones_like(first))
    slope = torch.full_like(gate, SLOPE)
    if activation.kind == "clamped_swiglu":
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(-activation.limit, activation.limit) + 1
        return gate * torch.sigmoid(activation.alpha * gate), up, slope
    if activation.kind == "relu2":
        return gate.relu().square(), up, 2 * gate.abs()
    function = {
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
        "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
        "relu": torch.relu,
    }[activation.kind]
    return function(gate), up, slope


def matrix_error(
    layout: BlockLayout, weight: Tensor, x: Tensor, x_error: Tensor, *, flush: bool
) -> Tensor:
    """Bound on the error of x @ weight.T in fp32, when x already errs by x_error."""
    n = weight.shape[1]
    if flush and layout.weight_format == "fp8":
        x_error = x_error + 2.0**-8 * (x.abs() + x_error)
    parts = weight.abs()
    if layout.scales is not None and layout.scales.offset:
        parts = parts + 4 * parts.amax()  # a level times its scale, and what is taken off
    magnitude = (x.abs() + x_error) @ parts.T
    error = x_error @ weight.abs().T + (n + 3) * U * magnitude + n * TINY * U
    if flush:
        error = error + TINY * (weight.abs().sum(1) + x.abs().sum(1, keepdim=True) + n)
    return error


def rounds_activations(layout: BlockLayout, dtype: torch.dtype) -> bool:
    """Whether the kernels round what meets the weights, for tokens of `dtype`."""
    exact = layout.weight_format == "mxfp4" and dtype == torch.float32
    return WEIGHT_FORMATS[layout.weight_format].group > 0 and not exact


def input_error(layout: BlockLayout, x: Tensor, dtype: torch.dtype) -> Tensor:
    if rounds_activations(layout, dtype):
        return group_largest(x) * (1 / 254 + 4 * U) + 1e-30
    return torch.zeros_like(x)


def expected(
    layer: Layer,
    routed: Routed,
    activation: Activation,
    *,
    bf16_panels: bool = False,
    onednn: bool = False,
) -> tuple[Tensor, Tensor]:
    """The output [T, H] in float64, and the elementwise bound on a kernel's error."""
    layout = layer.layout
    rounding = 2.0**-8 if onednn else 0.0
    bf16_panels = bf16_panels or onednn
    x, dtype = routed.hidden.double(), routed.hidden.dtype
    out, bound = torch.zeros_like(x), torch.zeros_like(x)
    zero = torch.zeros(1, dtype=torch.float64)
    for expert, weights in enumerate(layer.weights):
        if not routed.on_cpu[expert]:
            continue
        tokens, position = torch.where(routed.index == expert)
        if len(tokens) == 0:
            continue
        first_bias = weights.get("gate_up_bias", zero)
        first = x[tokens] @ weights["gate_up"].T + first_bias
        error = matrix_error(
            layout,
            weights["gate_up"],
            x[tokens],
            input_error(layout, x[tokens], dtype),
            flush=bf16_panels,
        )
        error = error + rounding * ((first - first_bias).abs() + error)
        error = error + U * (first.abs() + first_bias.abs())
        act, up, slope = activate(first, activation, layout.has_gate)
        gate_error, up_error = error.chunk(2, -1) if layout.has_gate else (error, 0 * error)
        if activation.kind == "relu2":
            slope = slope + gate_error
        gate = first.chunk(2, -1)[0] if layout.has_gate else first
        act_error = slope * gate_error + 16 * U * (act.abs() + gate.abs().clamp(max=10.0)) + TINY
        middle = act * up
        middle_error = (
            act_error * (up.abs() + up_error) + act.abs() * up_error + 2 * U * middle.abs()
        )
        if bf16_panels:
            middle_error = middle_error + 2.0**-8 * (middle.abs() + middle_error) + TINY
        middle_error = middle_error + input_error(layout, middle.abs() + middle_error, dtype)
        down_bias = weights.get("down_bias", zero)
        y = middle @ weights["down"].T + down_bias
        y_error = matrix_error(layout, weights["down"], middle, middle_error, flush=bf16_panels)
        y_error = y_error + rounding * ((y - down_bias).abs() + y_error)
        y_error = y_error + U * (y.abs() + down_bias.abs())
        share = routed.weight[tokens, position, None].double()
        out.index_add_(0, tokens, share * y)
        n_sums = routed.index.shape[1] + 1
        bound.index_add_(0, tokens, share * (y_error + n_sums * U * (y.abs() + y_error)))
    return out, bound
