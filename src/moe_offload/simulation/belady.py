"""Belady's optimum, the bound beside every policy: evict what is used again last.

Without bypass it is a policy like the others, run by the production directory, only that it knows
the future. With bypass a missed expert need not be kept at all; that is the most hits any policy
can have, whatever it evicts or refuses to admit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moe_offload.experts.replacement_policies import ReplacementPolicy
from moe_offload.simulation.packed_routing import NEVER, RoutingPass, packed


def distinct_experts(tokens: Sequence[Sequence[int]]) -> list[int]:
    """The experts of a layer in order of first choice: token by token, then by rank."""
    if len(tokens) == 1:
        return list(tokens[0])
    return list(dict.fromkeys(expert for token in tokens for expert in token))


class Belady(ReplacementPolicy):
    """Evict what is used again last. `begin_pass` tells it how far the replay has come.

    `passes` is the whole future. Experts that are never used again go first.
    """

    def __init__(self, passes: Iterable[RoutingPass]) -> None:
        self._future = packed(passes)
        self._place = 0

    def begin_pass(self, one: RoutingPass) -> None:
        """The replay of `one`, the next pass, begins: what counts is what comes after it."""
        self._place += n_decoded_ids(one)

    def start(self, n_indexes: int, n_ways: int) -> None:
        self._n_ways = n_ways
        self._expert = [0] * (n_indexes * n_ways)
        self._next = [-1] * (n_indexes * n_ways)

    def filled(self, slot: int, expert: int) -> None:
        self._expert[slot] = expert
        self._next[slot] = -1

    def victim(self, candidates: Sequence[int]) -> int:
        return max(candidates, key=self._next_use)

    def _next_use(self, slot: int) -> int:
        if self._next[slot] < self._place:
            layer = slot // self._n_ways
            self._next[slot] = self._future.next_use(layer, self._expert[slot], self._place)
        return self._next[slot]


def n_decoded_ids(one: RoutingPass) -> int:
    """The ids that a pass adds to each layer's decode."""
    return len(one.ids[0]) * len(one.ids[0][0]) if one.phase == "decode" else 0


def most_hits(passes: Iterable[RoutingPass], n_indexes: int, n_ways: int) -> int:
    """The most experts of decode that any N x M cache can hit: Belady with bypass.

    An expert counts once in a pass, as `PhaseHits.expert_hits`, however many tokens chose it.

    Between two uses an expert either stays the whole time, a hit, or need not be there; at most M
    stay at once. Keeping the M that are used again first is optimal for such intervals. A
    prompt's experts may be kept without having been looked up.
    """
    future = packed(passes)
    hits = place = 0
    held_in: list[dict[int, int]] = [{} for _ in range(n_indexes)]  # expert -> its next use
    for one in passes:
        decode = one.phase == "decode"
        place += n_decoded_ids(one)
        for layer, (held, tokens) in enumerate(zip(held_in, one.last_choices(), strict=False)):
            for expert in distinct_experts(tokens):
                hits += decode and expert in held
                held[expert] = future.next_use(layer, expert, place)
            if len(held) > n_ways:
                kept = sorted(held, key=held.__getitem__)[:n_ways]
                held_in[layer] = {expert: held[expert] for expert in kept if held[expert] < NEVER}
    return hits
