"""Belady's optimum, the bound beside every policy: evict what is used again last.

Without bypass it is a policy like the others, run by the production directory, only that it knows
the future. With bypass a missed expert need not be kept at all; that is the most hits any policy
can have, whatever it evicts or refuses to admit.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from replacement_policies import ReplacementPolicy
from traces import RoutingPass

NEVER = 1 << 60


def distinct_experts(tokens: Sequence[Sequence[int]]) -> list[int]:
    """The experts of a layer in order of first choice: token by token, then by rank."""
    if len(tokens) == 1:
        return list(tokens[0])
    return list(dict.fromkeys(expert for token in tokens for expert in token))


class Belady(ReplacementPolicy):
    """Evict what is used again last. `begin_pass` tells it how far the replay has come.

    `passes` is the whole future. Experts that are never used again go first.
    """

    def __init__(self, passes: Sequence[RoutingPass]) -> None:
        self._uses: dict[tuple[int, int], list[int]] = {}
        for number, one in enumerate(passes):
            if one.phase == "decode":
                for layer, tokens in enumerate(one.ids):
                    for expert in distinct_experts(tokens):
                        self._uses.setdefault((layer, expert), []).append(number)
        self._now = -1

    def begin_pass(self, number: int) -> None:
        self._now = number

    def start(self, n_indexes: int, n_ways: int) -> None:
        self._n_ways = n_ways
        self._expert = [0] * (n_indexes * n_ways)

    def filled(self, slot: int, expert: int) -> None:
        self._expert[slot] = expert

    def victim(self, candidates: Sequence[int]) -> int:
        return max(candidates, key=self._next_use)

    def _next_use(self, slot: int) -> int:
        uses = self._uses.get((slot // self._n_ways, self._expert[slot]), [])
        following = bisect_right(uses, self._now)
        return uses[following] if following < len(uses) else NEVER


def most_hits(passes: Sequence[RoutingPass], n_indexes: int, n_ways: int) -> int:
    """The most experts of decode that any N x M cache can hit: Belady with bypass.

    An expert counts once in a pass, as `PhaseHits.expert_hits`, however many tokens chose it.

    Between two uses an expert either stays the whole time, a hit, or need not be there; at most M
    stay at once. Keeping the M that are used again first is optimal for such intervals. A
    prompt's experts may be kept without having been looked up.
    """
    hits = 0
    with_choices = [(one, one.last_choices()) for one in passes]
    for layer in range(n_indexes):
        steps = [
            (one.phase == "decode", distinct_experts(choices[layer]))
            for one, choices in with_choices
            if len(choices) > layer
        ]
        next_uses = _next_uses(steps)
        held: dict[int, int] = {}  # expert -> its next use
        for (decode, experts), following in zip(steps, next_uses, strict=True):
            if decode:
                hits += sum(expert in held for expert in experts)
            held.update(zip(experts, following, strict=True))
            if len(held) > n_ways:
                kept = sorted(held, key=held.__getitem__)[:n_ways]
                held = {expert: held[expert] for expert in kept if held[expert] < NEVER}
    return hits


def _next_uses(steps: Sequence[tuple[bool, list[int]]]) -> list[list[int]]:
    """For each step and expert, the number of the next decode step that uses it."""
    following: dict[int, int] = {}
    answer: list[list[int]] = []
    for number in range(len(steps) - 1, -1, -1):
        decode, experts = steps[number]
        answer.append([following.get(expert, NEVER) for expert in experts])
        if decode:
            following.update(dict.fromkeys(experts, number))
    return answer[::-1]
