"""Guesses the next layer's experts from this layer's hidden state.

The residual stream changes little from layer to layer, so the next layer's own router, given
this layer's input, names most of the experts it will choose. The guess is only ever used for
fetching ahead; it never changes a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Router = Callable[[Tensor], Tensor]


def find_router(block: nn.Module, n_experts: int, hidden_size: int) -> Router | None:
    """The router of an MoE block as hidden [T, H] -> ids int64 [T, K], or None.

    A router is a direct child module that maps [T, H] to a tuple whose last tensor of integers
    is [T, K]: transformers' convention, found by trying rather than by name.
    """
    for name, child in block.named_children():
        if name == "experts":
            continue
        parameter = next(child.parameters(), None)
        if parameter is None or n_experts not in parameter.shape:
            continue
        probe = torch.zeros(1, hidden_size, dtype=parameter.dtype, device=parameter.device)
        try:
            with torch.no_grad():
                ids = _integer_output(child(probe))
        except (RuntimeError, TypeError, ValueError):
            continue
        if ids is not None:
            return _IdsOnly(child)
    return None


@dataclass(frozen=True)
class _IdsOnly:
    router: nn.Module

    def __call__(self, hidden: Tensor) -> Tensor:
        ids = _integer_output(self.router(hidden))
        assert ids is not None  # it gave some for the probe
        return ids


def _integer_output(output: Any) -> Tensor | None:
    if isinstance(output, tuple):
        for value in reversed(output):
            if isinstance(value, Tensor) and not value.is_floating_point() and value.dim() == 2:
                return value
    return None


@dataclass
class PrefetchStats:
    """What fetching ahead was worth.

    `recalled` of `chosen` experts had been guessed; `wasted_bytes` were copied for a guess and
    evicted, or left at the end, without one hit.
    """

    chosen: int = 0
    recalled: int = 0
    fetched: int = 0
    used: int = 0
    block_bytes: int = 0
    _unused_slots: dict[int, tuple[int, int]] = field(default_factory=dict)
    _guessed: dict[int, frozenset[int]] = field(default_factory=dict)

    @property
    def recall(self) -> float:
        """Share of chosen experts that had been guessed; 0 when none was chosen."""
        return self.recalled / self.chosen if self.chosen else 0.0

    @property
    def wasted_bytes(self) -> int:
        return (self.fetched - self.used) * self.block_bytes

    def guess(self, layer: int, experts: Iterable[int]) -> None:
        self._guessed[layer] = frozenset(experts)

    def fetch(self, slot: int, layer: int, expert: int) -> None:
        """A guessed expert's copy into `slot` began."""
        self.fetched += 1
        self._unused_slots[slot] = (layer, expert)

    def observe(self, layer: int, slots: dict[int, int], chosen: Iterable[int]) -> None:
        """The layer's real choice: `slots` maps those that hit to their slots."""
        guessed = self._guessed.pop(layer, None)
        if guessed is not None:
            chosen = list(chosen)
            self.chosen += len(chosen)
            self.recalled += len(guessed.intersection(chosen))
        for expert, slot in slots.items():
            if self._unused_slots.get(slot) == (layer, expert):
                self.used += 1
                del self._unused_slots[slot]
