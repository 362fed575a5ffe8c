"""The probe that finds out which activation an experts module computes."""

from __future__ import annotations

import pytest
import torch
from tiny_models import CONFIGS, build_model
from torch import nn

from moe_offload.checkpoint.conversion import find_experts
from moe_offload.kernels.oracle import apply_activation, probe_activation


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "granitemoe"])
def test_the_probe_names_the_fused_activation(name: str) -> None:
    model = build_model(CONFIGS[name]())
    experts = model.get_submodule(find_experts(model)[0].name)
    activation, own = probe_activation(experts)
    assert activation.kind == ("clamped_swiglu" if name == "gpt_oss" else "silu")
    first = torch.randn(7, 20) * 3
    expected = apply_activation(first, activation, has_gate=True)
    torch.testing.assert_close(own(first), expected)


def test_an_unknown_gate_stays_the_models_own() -> None:
    class Experts(nn.Module):
        has_gate = True
        is_concatenated = True

        def _apply_gate(self, first: torch.Tensor) -> torch.Tensor:
            gate, up = first.chunk(2, dim=-1)
            return torch.tanh(gate) * up

    activation, own = probe_activation(Experts())
    assert activation.kind == "module"
    assert torch.equal(own(torch.tensor([[0.5, 2.0]])), torch.tanh(torch.tensor([[0.5]])) * 2)
