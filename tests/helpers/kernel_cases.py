"""What the CPU kernels' tests run over: instruction sets, activations, sizes; and one call."""

from __future__ import annotations

import random

import torch
from cpu_oracle import Layer, Routed
from torch import Tensor

from moe_offload.checkpoint.block import Activation
from moe_offload.kernels.bindings import load_kernels
from moe_offload.kernels.cpu_experts import CpuExperts
from moe_offload.kernels.library import supported_isas

ACTIVATIONS = (
    Activation("silu"),
    Activation("gelu"),
    Activation("gelu_tanh"),
    Activation("relu"),
    Activation("relu2"),
    Activation("clamped_swiglu", 1.702, 1.5),
)


SILU = ACTIVATIONS[0]


NATIVE = load_kernels("native")


assert NATIVE is not None
ISAS = supported_isas(NATIVE.library)


def run_experts(experts: CpuExperts, layer: Layer, routed: Routed) -> Tensor:
    n_tokens = routed.hidden.shape[0]
    guarded = torch.full((n_tokens + 2, layer.layout.hidden_size), float("nan"))
    guarded[0] = guarded[-1] = 12345.0
    before = routed.hidden.clone()
    experts.run(
        routed.hidden,
        layer.pointers,
        routed.on_cpu,
        routed.index,
        routed.weight,
        guarded[1:-1],
    )
    assert (guarded[0] == 12345.0).all() and (guarded[-1] == 12345.0).all()
    assert torch.equal(before, routed.hidden) or before.isnan().any()
    return guarded[1:-1]


def random_cases(seed: int, n: int) -> list[tuple[int, int, int, bool, bool, Activation]]:
    """(H, I, T, gate, bias, activation): odd and even sizes, all branches of tails and panels."""
    rng = random.Random(seed)
    sizes = [1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 95, 97, 128, 200, 255, 257, 300]
    tokens = [1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 24, 33, 40]
    cases = []
    for i in range(n):
        gate = rng.random() < 0.7
        kinds = ACTIVATIONS if gate else ACTIVATIONS[:-1]  # the clamped one is gated
        activation = kinds[i % len(kinds)]
        size = (rng.choice(sizes), rng.choice(sizes), rng.choice(tokens))
        cases.append((*size, gate, rng.random() < 0.5, activation))
    return cases
