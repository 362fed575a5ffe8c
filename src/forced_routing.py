"""Routing taken from a trace instead of the model's routers, for runs on random weights."""

from __future__ import annotations

import torch
from torch import Tensor

from errors import UserError
from traces import Trace


class ForcedRouting:
    """Hands out a trace's choices, pass by pass; starts over when the trace ends.

    Decode pass `i` of a batch of T takes the trace's tokens `i * T` to `i * T + T - 1`. A prompt
    takes the trace's own prompt tokens where it has them, its decoded tokens else.
    """

    def __init__(self, trace: Trace, n_layers: int, n_experts: int, top_k: int) -> None:
        info = trace.info
        if info.n_layers < n_layers or info.top_k != top_k or trace.n_experts > n_experts:
            raise UserError(
                f"the routing trace {info.model} has {info.n_layers} layers, top-{info.top_k} of "
                f"{trace.n_experts} experts; the model needs {n_layers} layers, top-{top_k} of "
                f"{n_experts}: use a trace of this shape"
            )
        self.info = info
        decoded = [p for p in trace.passes if p.phase == "decode"]
        prompts = [p for p in trace.passes if p.phase == "prefill" and p.ids] or decoded
        self._decoded = _by_layer([p.ids for p in decoded], n_layers)
        self._prompt = _by_layer([p.ids for p in prompts], n_layers)
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
        ids = source[rows].to(index.device, non_blocking=True)  # small: the host need not wait
        return ids, torch.full_like(weights, 1 / index.shape[1])


def _by_layer(ids: list[tuple[tuple[tuple[int, ...], ...], ...]], n_layers: int) -> list[Tensor]:
    return [
        torch.tensor([token for one in ids for token in one[layer]], dtype=torch.int64)
        for layer in range(n_layers)
    ]
