"""Routing taken from a trace instead of the model's routers, for runs on random weights."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from moe_offload.errors import UserError
from moe_offload.simulation.traces import Trace

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
        fill = _Fill(n_experts, top_k, torch.Generator().manual_seed(seed))
        routing, k = trace.packed, info.top_k
        self._decoded = [_tokens(*routing.decoded_bytes(layer), k) for layer in range(n_layers)]
        self._prompt = [_tokens(*routing.prompt_bytes(layer), k) for layer in range(n_layers)]
        for layer, (prompt, decoded) in enumerate(zip(self._prompt, self._decoded, strict=True)):
            counts = fill.counts(prompt, decoded)
            self._decoded[layer] = fill.filled(decoded, counts)
            own = len(prompt) > 0
            self._prompt[layer] = fill.filled(prompt, counts) if own else self._decoded[layer]
        self._next_token = 0
        self._decode = False
        self._n_tokens = 0

    def begin_pass(self, decode: bool, n_tokens: int) -> None:
        """A forward pass over `n_tokens` tokens, padding included, begins."""
        if self._decode:
            self._next_token += self._n_tokens
        self._decode, self._n_tokens = decode, n_tokens

    def rewind(self) -> None:
        """Start the trace over."""
        self._next_token, self._decode = 0, False

    def choose(self, layer: int, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The trace's ids in the place of `index` int64 [T, K]; all weights equal."""
        source = self._decoded[layer] if self._decode else self._prompt[layer]
        start = self._next_token if self._decode else 0
        rows = torch.arange(start, start + index.shape[0]) % len(source)
        ids = source[rows].long().to(index.device, non_blocking=True)  # small: no need to wait
        return ids, torch.full_like(weights, 1 / index.shape[1])


class _Fill:
    """Completes tokens to `top_k` distinct experts of `n_experts`."""

    def __init__(self, n_experts: int, top_k: int, generator: torch.Generator) -> None:
        self._n_experts = n_experts
        self._top_k = top_k
        self._generator = generator

    def counts(self, *parts: Tensor) -> Tensor:
        """How often each expert is chosen, half a time more for the unseen: fp32 [E]."""
        parts_counted = [
            torch.bincount(p.flatten().int(), minlength=self._n_experts) for p in parts
        ]
        return torch.stack(parts_counted).sum(0).float() + 0.5

    def filled(self, tokens: Tensor, counts: Tensor) -> Tensor:
        """`tokens` [T, k] with the missing choices behind them, [T, top_k] of the same dtype."""
        n_missing = self._top_k - tokens.shape[1]
        if not n_missing:
            return tokens
        chunks = []
        for chunk in tokens.split(_CHUNK_TOKENS):
            weights = counts.repeat(len(chunk), 1).scatter_(1, chunk.long(), 0.0)
            drawn = torch.multinomial(weights, n_missing, generator=self._generator)
            chunks.append(torch.cat([chunk, drawn.to(tokens.dtype)], dim=1))
        return torch.cat(chunks)


def _tokens(ids: bytearray, width: int, top_k: int) -> Tensor:
    """Packed ids as [T, top_k], in as few bytes as torch can index with."""
    if width == 1:
        flat = (
            torch.frombuffer(ids, dtype=torch.uint8) if ids else torch.empty(0, dtype=torch.uint8)
        )
    else:
        flat = torch.from_numpy(np.frombuffer(ids, dtype=np.uint16).astype(np.int32))
    return flat.view(-1, top_k)
