"""The convention by which transformers describes a layer's experts, and its one normal form.

From transformers 5 every MoE architecture has an experts module with the flags `has_gate`,
`has_bias`, `is_transposed` and `is_concatenated` and the parameters `gate_up_proj` (or, gateless,
`up_proj`) and `down_proj`, each with the experts as first dimension. Whatever has these is
supported; there is no list of architectures.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from moe_offload.errors import UserError

FLAGS: Final = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


@dataclass(frozen=True)
class ExpertsModule:
    """The experts of one layer as the model stores them; `name` is the module's path."""

    name: str
    n_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    has_bias: bool
    is_transposed: bool
    is_concatenated: bool

    @property
    def parameters(self) -> dict[str, str]:
        """Block field -> name of the model's parameter, such as `<name>.gate_up_proj`."""
        first = f"{self.name}.{'gate_up_proj' if self.has_gate else 'up_proj'}"
        names = {"gate_up": first, "down": f"{self.name}.down_proj"}
        if self.has_bias:
            names |= {"gate_up_bias": f"{first}_bias", "down_bias": f"{self.name}.down_proj_bias"}
        return names

    def normalise(self, field: str, stored: Tensor) -> Tensor:
        """One expert's tensor in normal form, a view where possible.

        `gate_up` becomes [R, H] with the gate's rows before the up projection's, `down` [H, I],
        `gate_up_bias` [R]; interleaved rows (gate 0, up 0, gate 1, ...) are sorted apart.
        """
        if self.is_transposed and stored.dim() == 2:
            stored = stored.t()
        if self.has_gate and not self.is_concatenated and field in ("gate_up", "gate_up_bias"):
            stored = torch.cat((stored[0::2], stored[1::2]))
        return stored


def find_experts(model: nn.Module) -> tuple[ExpertsModule, ...]:
    """The experts modules of a model, which may be on the meta device, in module order.

    UserError when the model has no experts, or experts that the convention does not describe; the
    message names the flag.
    """
    found = []
    for name, module in model.named_modules():
        missing = [flag for flag in FLAGS if not hasattr(module, flag)]
        if not missing:
            found.append(_describe(name, module))
        elif name.rpartition(".")[2] == "experts":
            raise UserError(
                f"the experts of this model are not supported: {type(module).__name__} at {name} "
                f"lacks the flag {missing[0]} of transformers' experts convention"
            )
    if not found:
        raise UserError(
            f"{type(model).__name__} is not a Mixture-of-Experts model: it has no experts module; "
            "run it with transformers itself"
        )
    return tuple(found)


def _describe(name: str, module: nn.Module) -> ExpertsModule:
    if getattr(module, "has_post_expert_norm", False):
        raise UserError(
            f"the experts of this model are not supported: {type(module).__name__} at {name} has "
            "the flag has_post_expert_norm, a norm after each expert that no kernel here computes"
        )
    flags = {flag: bool(getattr(module, flag)) for flag in FLAGS}
    shapes = {key: tuple(tensor.shape) for key, tensor in module.state_dict().items()}
    first = "gate_up_proj" if flags["has_gate"] else "up_proj"
    expected = {first, "down_proj"}
    if flags["has_bias"]:
        expected |= {f"{first}_bias", "down_proj_bias"}
    if set(shapes) != expected:
        raise UserError(
            f"the experts of this model are not supported: {type(module).__name__} at {name} has "
            f"the parameters {_names(shapes)}, where its flags has_gate={flags['has_gate']} and "
            f"has_bias={flags['has_bias']} promise {_names(expected)}"
        )
    inward, outward = shapes[first], shapes["down_proj"]
    if len(inward) == 3 and len(outward) == 3:
        if flags["is_transposed"]:
            inward, outward = (inward[0], *inward[:0:-1]), (outward[0], *outward[:0:-1])
        n_experts, hidden_size, intermediate_size = outward
        rows = 2 * intermediate_size if flags["has_gate"] else intermediate_size
        if inward == (n_experts, rows, hidden_size):
            return ExpertsModule(name, n_experts, hidden_size, intermediate_size, **flags)
    raise UserError(
        f"the experts of this model are not supported: {type(module).__name__} at {name} has "
        f"{first} of shape {shapes[first]} and down_proj of shape {shapes['down_proj']}, which do "
        f"not fit its flag is_transposed={flags['is_transposed']}"
    )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
