"""Finds out which fused activation, if any, a model's experts module computes.

The kernels fuse a handful of activations. Rather than listing model names, the module's own gate
is run on probe values and compared with each formula; anything else stays the module's own code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_offload.checkpoint.expert_format import Activation, ActivationKind
from moe_offload.kernels.torch_experts import apply_activation

_SIMPLE: tuple[ActivationKind, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")


def probe_activation(experts: nn.Module) -> tuple[Activation, Callable[[Tensor], Tensor]]:
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
    candidates = [Activation(kind) for kind in _SIMPLE]
    if has_gate and isinstance(alpha, (int, float)) and isinstance(limit, (int, float)):
        candidates.append(Activation("clamped_swiglu", float(alpha), float(limit)))
    for candidate in candidates:
        if torch.allclose(apply_activation(probe, candidate, has_gate), expected, 1e-6, 1e-6):
            return candidate, own
    return Activation("module"), own


def _own_gate(experts: nn.Module) -> Callable[[Tensor], Tensor]:
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
