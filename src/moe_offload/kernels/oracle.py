"""The expert FFN in plain torch: the oracle of every kernel, and the fallback where none runs.

And which activation a model's experts module computes: the kernels fuse a handful of them. Rather
than listing model names, the module's own gate is run on probe values and compared with each
formula here; anything else stays the module's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_offload.checkpoint.block import (
    Activation,
    ActivationKind,
    BlockLayout,
    MatrixName,
    unpack_matrix,
)

ActivationModule = Callable[[Tensor], Tensor]
# What is applied to the gate, then multiplied by up where there is one.
_FUNCTIONS: Final[dict[ActivationKind, ActivationModule]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda gate: functional.relu(gate).square(),
}


def apply_activation(
    first: Tensor, activation: Activation, has_gate: bool, module: ActivationModule | None = None
) -> Tensor:
    """The value between an expert's two matrices.

    `first` [n, R] is the first matrix's output, gate columns before up columns; returns [n, I].
    `module` is the model's own gate, called with `first` for `Activation("module")`.
    """
    if activation.kind == "module":
        if module is None:
            raise ValueError("activation 'module' needs the model's own callable")
        return module(first)
    if activation.kind == "clamped_swiglu":
        gate, up = first.chunk(2, dim=-1)
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
        return (up + 1) * gate * torch.sigmoid(activation.alpha * gate)
    function = _FUNCTIONS[activation.kind]
    if not has_gate:
        return function(first)
    gate, up = first.chunk(2, dim=-1)
    return function(gate) * up


def expert_ffn(
    layout: BlockLayout,
    block: Tensor,
    x: Tensor,
    activation: Activation,
    act_module: ActivationModule | None = None,
) -> Tensor:
    """One expert's output for `x` [n, H], in x's dtype, on the block's device.

    `block` is uint8 [block_bytes]. Matrices are multiplied in x's dtype, as the model itself
    would: a bf16 input gives bf16 products with fp32 accumulation inside each.
    """
    first = _linear(layout, block, "gate_up", x)
    middle = apply_activation(first, activation, layout.has_gate, act_module)
    return _linear(layout, block, "down", middle.to(x.dtype))


def _linear(layout: BlockLayout, block: Tensor, name: MatrixName, x: Tensor) -> Tensor:
    weight = unpack_matrix(layout, block, name).to(x.dtype)
    bias = layout.field(f"{name}_bias").view(block).to(x.dtype) if layout.has_bias else None
    return functional.linear(x, weight, bias)


def experts_forward(
    layout: BlockLayout,
    blocks: dict[int, Tensor],
    hidden: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    activation: Activation,
    act_module: ActivationModule | None = None,
) -> Tensor:
    """The weighted sum over the experts of `blocks` only: fp32 [T, H].

    `hidden` [T, H], `top_k_index` int64 [T, K] and `top_k_weights` [T, K] are the router's;
    `blocks` maps an expert's id to its block. Pairs of other experts are left out.
    """
    out = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    for expert, block in blocks.items():
        tokens, position = torch.where(top_k_index == expert)
        if tokens.numel() == 0:
            continue
        y = expert_ffn(layout, block, hidden[tokens], activation, act_module)
        weights = top_k_weights[tokens, position, None].float()
        out.index_add_(0, tokens, y.float() * weights)
    return out


def probe_activation(experts: nn.Module) -> tuple[Activation, ActivationModule]:
    """The activation of a transformers experts module, and its own code as a callable.

    The callable takes the first matrix's output [n, R] in the normal form (gate columns, then
    up columns; interleaved modules are served by re-interleaving) and returns [n, I]. The probe
    covers both signs, small and large values, so a clamp is seen.
    """
    own = _own_gate(experts)
    has_gate = bool(getattr(experts, "has_gate", True))
    values = torch.cat([torch.linspace(-12, 12, 193), torch.tensor([-80.0, -1e-3, 1e-3, 80.0])])
    if has_gate:
        gate, up = torch.meshgrid(values, values, indexing="ij")
        probe = torch.cat([gate, up], dim=1)
    else:
        probe = values[None, :]
    expected = own(probe)
    alpha, limit = getattr(experts, "alpha", None), getattr(experts, "limit", None)
    candidates = [Activation(kind) for kind in _FUNCTIONS]
    if has_gate and isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        candidates.append(Activation("clamped_swiglu", float(alpha), float(limit)))
    for candidate in candidates:
        if torch.allclose(apply_activation(probe, candidate, has_gate), expected, 1e-6, 1e-6):
            return candidate, own
    return Activation("module"), own


def _own_gate(experts: nn.Module) -> ActivationModule:
    module: Any = experts
    if not getattr(experts, "has_gate", True):
        return lambda first: module.act_fn(first)
    if getattr(experts, "is_concatenated", True):
        return lambda first: module._apply_gate(first)

    def interleaved(first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=-1)
        result: Tensor = module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))
        return result

    return interleaved
