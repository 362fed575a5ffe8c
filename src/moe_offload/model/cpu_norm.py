"""RMSNorm of a few tokens on the CPU in one call, where a module is found to compute it.

Models differ in where they round and in what they add to the weight. Rather than by name, a module
is recognised by what it computes: it is run on probe values with random weights and compared with
each form. Everything else, and every long prompt, stays the module's own.
"""

from __future__ import annotations

import copy
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_offload.kernels.decode_kernels import DecodeKernels, NormArguments, is_plain

FORMS: Final = {"round_then_weight": 0, "weight_then_round": 1, "one_plus_weight": 2}
# 16 tokens of Mixtral; beyond, torch's threads are worth their start.
_MAX_ELEMENTS: Final = 1 << 16
_PROBE_ROWS: Final = 16
# A sum in another order may turn the rounding of a value on the edge between two.
_EQUAL_PART: Final = 0.99


class CpuNorm:
    """The forward of a norm module: y = norm(x) over the last dimension, bf16."""

    def __init__(
        self, module: nn.Module, form: str, epsilon: float, kernels: DecodeKernels
    ) -> None:
        self.own = module.forward
        self.form = form
        self._parameters = module._parameters
        self._kernels = kernels
        weight = self._parameters["weight"]
        assert weight is not None
        self._width = weight.numel()
        self._arguments = NormArguments(
            FORMS[form], weight.dtype == torch.bfloat16, epsilon, self._width, weight.data_ptr()
        )

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        n = hidden_states.numel()
        if (
            n > _MAX_ELEMENTS
            or args
            or kwargs
            or not is_plain(hidden_states)
            or hidden_states.shape[-1] != self._width
        ):
            result: Tensor = self.own(hidden_states, *args, **kwargs)
            return result
        out = torch.empty_like(hidden_states)
        self._kernels.norm(self.arguments(), hidden_states, True, n // self._width, out)
        return out

    def arguments(self) -> NormArguments:
        """What the kernels need, with the weight's address of now: moving it may replace it."""
        weight = self._parameters["weight"]
        assert weight is not None
        self._arguments.weight = weight.data_ptr()
        return self._arguments


def use_norm_kernels(model: nn.Module, kernels: DecodeKernels) -> int:
    """Give each bf16 norm that a form describes our forward; returns how many."""
    known: dict[tuple[object, ...], str | None] = {}
    installed = 0
    for module in model.modules():
        epsilon = _epsilon(module)
        if epsilon is None:
            continue
        weight = module._parameters["weight"]
        assert weight is not None
        key = (type(module), weight.shape, weight.dtype, epsilon)
        if key not in known:
            known[key] = probe_norm(module, epsilon, kernels)
        form = known[key]
        if form is not None:
            module.forward = CpuNorm(module, form, epsilon, kernels)
            installed += 1
    return installed


def probe_norm(module: nn.Module, epsilon: float, kernels: DecodeKernels) -> str | None:
    """The form that gives what `module` gives for values of all sizes; None where none does."""
    probe = copy.deepcopy(module)
    weight = probe._parameters["weight"]
    assert weight is not None
    generator = torch.Generator().manual_seed(0)
    width = weight.numel()
    x = torch.randn(_PROBE_ROWS, width, generator=generator)
    x = (x * torch.logspace(-4, 4, _PROBE_ROWS)[:, None]).bfloat16()
    with torch.no_grad():
        weight.copy_(torch.randn(width, generator=generator))
        expected = probe(x)
        if expected.dtype != x.dtype or expected.shape != x.shape:
            return None
        for form in FORMS:
            found = CpuNorm(probe, form, epsilon, kernels)(x)
            close = torch.allclose(found.float(), expected.float(), rtol=2**-7, atol=0)
            if close and (found == expected).float().mean() >= _EQUAL_PART:
                return form
    return None


def _epsilon(module: nn.Module) -> float | None:
    """The epsilon of what may be an RMSNorm: nothing but one vector, `weight`; else None."""
    if any(module.children()) or any(True for _ in module.buffers()):
        return None
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    if list(parameters) != ["weight"] or parameters["weight"].dim() != 1:
        return None
    if parameters["weight"].dtype not in (torch.bfloat16, torch.float32):
        return None
    for name in ("variance_epsilon", "eps", "epsilon"):
        epsilon = getattr(module, name, None)
        if isinstance(epsilon, float):
            return epsilon
    return None
