"""Random weights of a real model's shape: measures a machine without a download.

Speed depends on shapes, bytes and routing, not on values; the text is meaningless.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from moe_offload.checkpoint.expert_format import BlockLayout, WeightFormat, block_layout, pack_block
from moe_offload.checkpoint.moe_convention import find_experts
from moe_offload.config import ModelOptions
from moe_offload.errors import UserError
from moe_offload.experts.expert_store import ExpertStore
from moe_offload.model.forced_routing import ForcedRouting
from moe_offload.model.model_loader import Progress, assign, build_skeleton, finish_model
from moe_offload.simulation.model_shapes import shape_config
from moe_offload.simulation.trace_reader import read_trace
from moe_offload.simulation.workload import MIXTRAL_OVERLAP, even_workload

_N_ROUTED_TOKENS = 512  # then the made routing repeats
_N_TEMPLATES = 4  # distinct random experts; the others are copies, in memory of their own
# Drawing a random number takes ten times as long as copying one. A prime, so that rows differ.
_N_VALUES = 4_194_301
_SCALE = 0.02  # standard deviation


class DummyModel:
    """A `ModelSource` of random weights; `seed` fixes them.

    With `n_stored_layers`, the experts of so many layers are made, and serve the other layers too.
    """

    dense_format = "bf16"

    def __init__(
        self, options: ModelOptions, seed: int = 0, n_stored_layers: int | None = None
    ) -> None:
        assert options.dummy_shape is not None
        self.name = f"random weights of {options.dummy_shape}"
        self.weight_format: WeightFormat = options.dummy_format
        self.dtype = torch.bfloat16
        fields = shape_config(options.dummy_shape, options.dummy_layers)
        self.config: PretrainedConfig = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        self._generator = torch.Generator().manual_seed(seed)
        self._values = torch.randn(_N_VALUES, generator=self._generator) * _SCALE
        skeleton = build_skeleton(self.config, self.dtype, "sdpa")
        found = find_experts(skeleton)
        self.experts_paths = [one.name for one in found]
        self.layouts: list[BlockLayout] = [
            block_layout(
                self.weight_format,
                one.hidden_size,
                one.intermediate_size,
                one.has_gate,
                one.has_bias,
            )
            for one in found
        ]
        self.n_experts = [one.n_experts for one in found]
        self.n_stored_layers = min(n_stored_layers or len(found), len(found))
        paths = tuple(self.experts_paths)
        self.dense_bytes = sum(
            tensor.numel() * tensor.element_size()
            for name, tensor in skeleton.state_dict().items()
            if not name.startswith(paths)
        )

    @property
    def top_k(self) -> int:
        """K; the field's name differs between architectures."""
        text: Any = self.config.get_text_config()
        return int(text.num_experts_per_tok)

    def load_dense(self, model: PreTrainedModel, device: torch.device, progress: Progress) -> None:
        """Random matrices of standard deviation 0.02, norms of one, biases of zero."""
        for name, meta in model.state_dict().items():
            if meta.dim() >= 2:
                tensor = self._random(meta.shape, meta.dtype)
            elif name.endswith("weight"):
                tensor = torch.ones(meta.shape, dtype=meta.dtype)
            else:
                tensor = torch.zeros(meta.shape, dtype=meta.dtype)
            assign(model, name, tensor.to(device))
            progress(tensor.nbytes)
        finish_model(model, device)

    def load_experts(self, store: ExpertStore, progress: Progress) -> None:
        """Every block its own memory; the values repeat every few experts."""
        templates = [self._random_block(self.layouts[0]) for _ in range(_N_TEMPLATES)]
        for layer in range(store.n_stored):
            if self.layouts[layer] != self.layouts[0]:
                raise UserError(f"the MoE layers of {self.name} differ in shape")
            for expert in range(store.n_experts[layer]):
                store.block(layer, expert).copy_(templates[(layer + expert) % _N_TEMPLATES])
                progress(self.layouts[0].block_bytes)

    def _random(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The same random values over and over, from another place each time."""
        start = int(torch.randint(_N_VALUES, (), generator=self._generator))
        values = self._values.roll(start).to(dtype)
        tensor = torch.empty(math.prod(shape), dtype=dtype)
        for part in tensor.split(_N_VALUES):
            part.copy_(values[: len(part)])
        return tensor.view(*shape)

    def _random_block(self, layout: BlockLayout) -> torch.Tensor:
        rows, hidden, inner = layout.first_rows, layout.hidden_size, layout.intermediate_size
        weights = {
            "gate_up": self._random((rows, hidden)),
            "down": self._random((hidden, inner)),
            "gate_up_bias": torch.zeros(rows),
            "down_bias": torch.zeros(hidden),
        }
        block = torch.empty(layout.block_bytes, dtype=torch.uint8)
        pack_block(layout, weights, block)
        return block


def dummy_routing(source: DummyModel, trace: Path | None, seed: int = 0) -> ForcedRouting:
    """Routing for random weights: recorded in `trace`, or made with Mixtral's reuse of experts.

    A trace of fewer choices is filled up. UserError for one of too few layers, or of more experts
    or choices than the model's.
    """
    n_layers, n_experts = len(source.n_experts), source.n_experts[0]
    if trace is not None:
        return ForcedRouting(read_trace(trace), n_layers, n_experts, source.top_k, seed)
    workload = even_workload(n_layers, n_experts, source.top_k, MIXTRAL_OVERLAP)
    return ForcedRouting(
        workload.generate(_N_ROUTED_TOKENS, seed), n_layers, n_experts, source.top_k
    )


class DummyTokenizer:
    """A token per word, numbered by its letters; decodes to numbers, for there is no meaning."""

    name = "none (random weights)"
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size

    def encode(self, prompt: str, raw: bool) -> list[int]:
        del raw  # there is no template to leave out
        words = prompt.split()
        return [sum(map(ord, word)) % self._vocabulary_size for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" <{token}>" for token in ids)
