"""Random weights of a real model's shape: measures a machine without a download.

Speed depends on shapes, bytes and routing, not on values; the text is meaningless. The routing is
taken from a trace instead of the model's routers, whose choices would be random too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from moe_offload.checkpoint.block import BlockLayout, pack_block
from moe_offload.checkpoint.conversion import find_experts
from moe_offload.checkpoint.model_config import experts_per_token
from moe_offload.config import ModelOptions, WeightFormat
from moe_offload.errors import UserError
from moe_offload.experts.store import ExpertStore
from moe_offload.model.loader import PreparedModel, Progress, build_skeleton, fill_model
from moe_offload.model.tokenization import Message
from moe_offload.simulation.shapes import shape_config
from moe_offload.simulation.trace_files import read_trace
from moe_offload.simulation.traces import Trace
from moe_offload.simulation.workload import MIXTRAL_OVERLAP, even_workload

_CHUNK_TOKENS = 4096  # that are filled at once


class ForcedRouting:
    """Hands out a trace's choices, pass by pass; starts over when the trace ends.

    Decode pass `i` of a batch of T takes the trace's tokens `i * T` to `i * T + T - 1`. A prompt
    takes the trace's own prompt tokens where it has them, its decoded tokens else.

    A trace may keep fewer ids of a token than the model computes, its first choices. The missing
    ones are drawn, with `seed`, by how often the trace chooses each expert in that layer: the
    model then does all of its work, but the last ranks' reuse between tokens is made up. `notes`
    says so.
    """

    def __init__(
        self, trace: Trace, n_layers: int, n_experts: int, top_k: int, seed: int = 0
    ) -> None:
        info = trace.info
        if info.n_layers < n_layers or info.top_k > top_k or trace.n_experts > n_experts:
            raise UserError(
                f"the routing trace {info.model} has {info.n_layers} layers, top-{info.top_k} of "
                f"{trace.n_experts} experts; the model needs {n_layers} layers, at most "
                f"top-{top_k} of {n_experts}: use a trace of this shape"
            )
        self.info = info
        self.notes: list[str] = []
        if info.top_k < top_k:
            self.notes.append(
                f"the routing trace holds {info.top_k} of each token's {top_k} experts: the other "
                f"{top_k - info.top_k} are drawn by how often it chooses each (seed {seed})"
            )
        generator = torch.Generator().manual_seed(seed)
        self._decoded: list[Tensor] = []  # by layer [tokens, top_k]
        self._prompt: list[Tensor] = []
        for layer in range(n_layers):
            decoded, prompt = (
                torch.from_numpy(ids.astype(np.int32))  # [tokens, top_k]; torch counts no uint16
                for ids in (trace.passes.decoded(layer), trace.passes.prompted(layer))
            )
            if info.top_k < top_k:
                seen = torch.cat([prompt, decoded]).flatten().int()
                counts = torch.bincount(seen, minlength=n_experts) + 0.5  # half for the unseen
                decoded = _filled(decoded, top_k, counts, generator)
                prompt = _filled(prompt, top_k, counts, generator)
            self._decoded.append(decoded)
            self._prompt.append(prompt if len(prompt) else decoded)
        self.next_token = 0  # of the decoded ones
        self._tokens, self._start = self._prompt, 0

    def begin_pass(self, decode: bool, n_tokens: int) -> None:
        """A forward pass over `n_tokens` tokens, padding included, begins."""
        self._tokens, self._start = self._prompt, 0
        if decode:
            self._tokens, self._start = self._decoded, self.next_token
            self.next_token += n_tokens

    def choose(self, layer: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The trace's ids in the place of `index` int64 [T, K]; all weights equal."""
        tokens = self._tokens[layer]
        rows = torch.arange(self._start, self._start + len(index)) % len(tokens)
        ids = tokens[rows].long().to(index.device, non_blocking=True)  # small: no need to wait
        return ids, torch.full_like(weights, 1 / index.shape[1])


def _filled(tokens: Tensor, top_k: int, counts: Tensor, generator: torch.Generator) -> Tensor:
    """`tokens` [T, k] completed to `top_k` distinct experts, drawn by `counts` fp32 [E]."""
    n_missing = top_k - tokens.shape[1]
    chunks = []
    for chunk in tokens.split(_CHUNK_TOKENS):
        weights = counts.repeat(len(chunk), 1).scatter_(1, chunk.long(), 0.0)
        drawn = torch.multinomial(weights, n_missing, generator=generator)
        chunks.append(torch.cat([chunk, drawn.to(tokens.dtype)], dim=1))
    return torch.cat(chunks)


_N_ROUTED_TOKENS = 512  # then the made routing repeats
_N_TEMPLATES = 4  # distinct random experts; the others are copies, in memory of their own
# Drawing a random number takes ten times as long as copying one. A prime, so that rows differ.
_N_VALUES = 4_194_301
_SCALE = 0.02  # standard deviation


class DummyModel:
    """As `PreparedModel`, of random weights, always the same ones.

    With `n_stored_layers`, the experts of so many layers are made, and serve the other layers too.
    """

    dense_format: WeightFormat = "bf16"

    def __init__(self, options: ModelOptions, n_stored_layers: int | None = None) -> None:
        assert options.dummy_shape is not None
        self.name = f"random weights of {options.dummy_shape}"
        self.weight_format: WeightFormat = options.dummy_format
        self.dtype = torch.bfloat16
        fields = shape_config(options.dummy_shape, options.dummy_layers)
        self.config: PretrainedConfig = CONFIG_MAPPING[fields["model_type"]].from_dict(fields)
        self._generator = torch.Generator().manual_seed(0)
        self._values = torch.randn(_N_VALUES, generator=self._generator) * _SCALE
        skeleton = build_skeleton(self.config, self.dtype, "sdpa")
        found = find_experts(skeleton)
        self.experts_paths = [one.name for one in found]
        self.layouts = [one.block_layout(self.weight_format) for one in found]
        self.n_experts = [one.n_experts for one in found]
        self.top_k = experts_per_token(self.config) or 0  # every shape has one
        self.n_stored_layers = min(n_stored_layers or len(found), len(found))
        stored = zip(self.layouts[: self.n_stored_layers], self.n_experts, strict=False)
        self.expert_bytes = sum(layout.block_bytes * n for layout, n in stored)
        paths = tuple(self.experts_paths)
        self.dense_bytes = sum(
            tensor.nbytes
            for name, tensor in skeleton.state_dict().items()
            if not name.startswith(paths)
        )

    def load_dense(self, model: PreTrainedModel, device: torch.device, progress: Progress) -> None:
        """Random matrices of standard deviation 0.02, norms of one, biases of zero."""
        tensors = {}
        for name, meta in model.state_dict().items():
            if meta.dim() >= 2:
                tensor = self._random(meta.shape, meta.dtype)
            elif name.endswith("weight"):
                tensor = torch.ones(meta.shape, dtype=meta.dtype)
            else:
                tensor = torch.zeros(meta.shape, dtype=meta.dtype)
            tensors[name] = tensor.to(device)
            progress(tensor.nbytes)
        fill_model(model, tensors, device)

    def load_experts(self, store: ExpertStore, progress: Progress) -> None:
        """Every block its own memory; the values repeat every few experts."""
        assert len(set(self.layouts)) == 1, "every shape's layers are alike"
        templates = [self._random_block(self.layouts[0]) for _ in range(_N_TEMPLATES)]
        for layer in range(store.n_stored):
            for expert in range(store.n_experts[layer]):
                store.block(layer, expert).copy_(templates[(layer + expert) % _N_TEMPLATES])
                progress(self.layouts[0].block_bytes)

    def _random(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
        """The same random values over and over, from another place each time."""
        start = int(torch.randint(_N_VALUES, (), generator=self._generator))
        values = self._values.roll(start).to(dtype)
        tensor = torch.empty(math.prod(shape), dtype=dtype)
        for part in tensor.split(_N_VALUES):
            part.copy_(values[: len(part)])
        return tensor.view(*shape)

    def _random_block(self, layout: BlockLayout) -> Tensor:
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


ModelSource = PreparedModel | DummyModel  # where a model's weights come from


def dummy_routing(source: DummyModel, trace: Path | None, seed: int = 0) -> ForcedRouting:
    """Routing for random weights: recorded in `trace`, or made with Mixtral's reuse of experts.

    A trace of fewer choices is filled up. UserError for one of too few layers, or of more experts
    or choices than the model's.
    """
    n_layers, n_experts = len(source.n_experts), source.n_experts[0]
    if trace is not None:
        found = read_trace(trace)
    else:
        workload = even_workload(n_layers, n_experts, source.top_k, MIXTRAL_OVERLAP)
        found = workload.generate(_N_ROUTED_TOKENS, seed)
    return ForcedRouting(found, n_layers, n_experts, source.top_k, seed)


class DummyTokenizer:
    """A token per word, numbered by its letters; decodes to numbers, for there is no meaning."""

    name = "none (random weights)"
    eos_ids: frozenset[int] = frozenset()

    def __init__(self, vocabulary_size: int) -> None:
        self._vocabulary_size = vocabulary_size

    def encode(self, prompt: str | Sequence[Message], raw: bool) -> list[int]:
        del raw  # there is no template to leave out
        texts = [prompt] if isinstance(prompt, str) else [one["content"] for one in prompt]
        words = " ".join(texts).split()
        return [sum(map(ord, word)) % self._vocabulary_size for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(f" <{token}>" for token in ids)
