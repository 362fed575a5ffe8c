"""Synthetic routing for when no trace exists: every expert as popular, some reuse between tokens.

Each choice of a token is, with probability `repeat`, one of the choices of the token before it, and
otherwise drawn evenly. Whatever is made here says that it is synthetic, in its name and in its
`synthetic` field. Text whose topic moves has more to it: a recorded trace is always the better
answer.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from moe_offload.simulation.traces import Routing, RoutingPass, Trace, TraceInfo

FIT_TOKENS = 500
HIGHEST_REPEAT = 0.95

# Mean share of a token's two experts that the next token uses again. Jiang et al., "Mixtral of
# Experts" (2024), table 5: at least one repeats in about 48, 64 and 62% at layers 0, 15 and 31
# (chance: 46%). With both repeating in some 6%, the mean share is half of the sum of the two. It
# agrees with 34% measured for per-layer LRU with 2 of 8 ways, which hits just what repeats.
MIXTRAL_OVERLAP = 0.33


@dataclass(frozen=True)
class Workload:
    """A routing model of `n_layers` alike layers, each token choosing `top_k` of `n_experts`."""

    name: str
    n_layers: int
    n_experts: int
    top_k: int
    repeat: float = 0.0

    def generate(self, n_tokens: int, seed: int = 0, n_prompt_tokens: int = 0) -> Trace:
        """Make a trace of one prompt pass (if any tokens are asked for) and `n_tokens` of decode.

        The same seed gives the same trace; each layer has a generator of its own, so fewer
        layers are a prefix of more.
        """
        n_all = n_prompt_tokens + n_tokens
        layers = [self.layer(layer, n_all, seed) for layer in range(self.n_layers)]
        passes = [
            RoutingPass("decode", tuple((tokens[t],) for tokens in layers))
            for t in range(n_prompt_tokens, n_all)
        ]
        if n_prompt_tokens:
            prompt = tuple(tuple(tokens[:n_prompt_tokens]) for tokens in layers)
            passes.insert(0, RoutingPass("prefill", prompt))
        info = TraceInfo(
            f"synthetic {self.name}",
            n_layers=self.n_layers,
            top_k=self.top_k,
            n_experts=self.n_experts,
            synthetic=True,
            notes=("no model chose these experts: the routing is synthetic",),
        )
        return Trace(info, Routing(passes))

    def layer(self, layer: int, n_tokens: int, seed: int) -> list[tuple[int, ...]]:
        """One layer's choices, token after token."""
        rng = random.Random(seed * 1_000_003 + layer)
        experts = range(self.n_experts)
        tokens: list[tuple[int, ...]] = []
        for t in range(n_tokens):
            chosen: dict[int, None] = {}
            while len(chosen) < self.top_k:
                if t and rng.random() < self.repeat:
                    if t > 1:
                        rng.random()  # unused: keeps each seed's trace, which figures come from
                    left = [e for e in tokens[-1] if e not in chosen]
                    if left:
                        chosen.setdefault(rng.choice(left))
                        continue
                drawn = rng.choices(experts)[0]
                while drawn in chosen:
                    drawn = rng.choices(experts)[0]
                chosen.setdefault(drawn)
            tokens.append(tuple(chosen))
        return tokens


def even_workload(
    n_layers: int, n_experts: int, top_k: int, overlap: float | None = None
) -> Workload:
    """Every expert equally popular; None for independent tokens.

    A token shares `overlap` of its K experts with the token before it: `repeat` is found by
    bisection, 0 where chance alone gives more.
    """
    assert n_experts >= top_k
    name = f"{n_layers} layers, top-{top_k} of {n_experts}"
    workload = Workload(name, n_layers, n_experts, top_k)
    if overlap is None:
        return workload
    low, high = 0.0, HIGHEST_REPEAT
    for _ in range(6):
        middle = (low + high) / 2
        tokens = replace(workload, repeat=middle).layer(0, FIT_TOKENS, seed=1)
        low, high = (middle, high) if lag_overlap(tokens, 1) < overlap else (low, middle)
    return replace(workload, repeat=(low + high) / 2)


def typical_workload(n_layers: int, n_experts: int, top_k: int) -> Workload:
    """What to assume of a model nothing is known of but its sizes.

    Beyond chance (K of E), a token of Mixtral shares 11% of its experts with the one before, of
    Qwen3-30B-A3B (128 experts) 35% and of gpt-oss-120b 17% (measured on public traces of a
    prompt and 64-128 tokens): few experts, little reuse; many experts, about a quarter.
    """
    chance = top_k / n_experts
    beyond = 0.11 if n_experts <= 16 else 0.25
    return even_workload(n_layers, n_experts, top_k, chance + (1 - chance) * beyond)


def lag_overlap(tokens: Sequence[Sequence[int]], lag: int) -> float:
    """The mean share of a token's experts that the token `lag` before it had chosen too."""
    shares = [
        len(set(old) & set(new)) / len(new) for old, new in zip(tokens, tokens[lag:], strict=False)
    ]
    return sum(shares) / len(shares) if shares else 0.0
