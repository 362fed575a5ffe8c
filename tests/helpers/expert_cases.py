"""Random experts, routings and their oracle, for the tests of everything that computes experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from quantised_matrices import source_blocks
from torch import Tensor

from moe_offload.checkpoint.block import Activation, BlockLayout, block_layout, pack_block
from moe_offload.config import Scales
from moe_offload.kernels.oracle import ActivationModule, expert_ffn


def random_blocks(layout: BlockLayout, n: int, seed: int = 0) -> Tensor:
    """uint8 [n, block_bytes] of weights that keep an output near its input's magnitude."""
    torch.manual_seed(seed)
    if layout.scales is not None:
        sizes = layout.hidden_size, layout.intermediate_size
        return source_blocks(layout.weight_format, layout.scales, *sizes, n)[1]
    blocks = torch.empty(n, layout.block_bytes, dtype=torch.uint8)
    hidden, width = layout.hidden_size, layout.intermediate_size
    for block in blocks:
        weights = {
            "gate_up": torch.randn(layout.first_rows, hidden) * hidden**-0.5,
            "down": torch.randn(hidden, width) * width**-0.5,
            "gate_up_bias": torch.randn(layout.first_rows),
            "down_bias": torch.randn(hidden),
        }
        pack_block(layout, weights, block)
    return blocks


@dataclass(frozen=True)
class Case:
    """A layer's experts and one call of it; `name` identifies it in a test's id."""

    weight_format: str
    hidden_size: int
    intermediate_size: int
    kind: str = "silu"
    has_gate: bool = True
    has_bias: bool = False
    n_tokens: int = 3
    top_k: int = 3
    n_experts: int = 4
    scales: Scales | None = None  # a source's, of gated experts with biases

    @property
    def name(self) -> str:
        flags = f"{'gated' if self.has_gate else 'gateless'}{'-bias' if self.has_bias else ''}"
        size = f"H{self.hidden_size}-I{self.intermediate_size}-T{self.n_tokens}"
        scales = ""
        if self.scales is not None:
            scales = f"-{self.scales.dtype}-{self.scales.group}{self.scales.offset}"
        return f"{self.weight_format}-{size}-{self.kind}-{flags}{scales}"

    def layout(self) -> BlockLayout:
        return block_layout(
            self.weight_format,
            self.hidden_size,
            self.intermediate_size,
            self.has_gate,
            self.has_bias,
            self.scales,
        )

    def activation(self) -> Activation:
        return Activation(self.kind, alpha=1.702, limit=0.7)

    def act_module(self) -> ActivationModule | None:
        return softsign_gate if self.kind == "module" else None

    def routing(self, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """hidden fp32 [T, H], slot of pair int64 [T, K] with some -1, weights fp32 [T, K]."""
        torch.manual_seed(seed)
        slots = torch.randint(-1, self.n_experts, (self.n_tokens, self.top_k))
        weights = torch.rand(self.n_tokens, self.top_k)
        return torch.randn(self.n_tokens, self.hidden_size), slots, weights

    def oracle(self, blocks: Tensor, hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
        """Pair by pair through the torch oracle, summed in float64."""
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for token, row in enumerate(slots.tolist()):
            for k, slot in enumerate(row):
                if slot >= 0:
                    y = expert_ffn(
                        self.layout(),
                        blocks[slot],
                        hidden[token, None],
                        self.activation(),
                        self.act_module(),
                    )
                    out[token] += float(weights[token, k]) * y[0].double()
        return out.float()


def softsign_gate(first: Tensor) -> Tensor:
    """Stands for a model's own gate."""
    gate, up = first.chunk(2, dim=-1)
    return torch.nn.functional.softsign(gate) * up
