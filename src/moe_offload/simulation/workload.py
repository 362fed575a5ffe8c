"""Synthetic routing for when no trace exists: expert popularity, and reuse between tokens.

Each choice of a token is, with a layer's probability `repeat`, one of the choices of an earlier
token (how long ago: geometric with mean `memory_tokens`), and otherwise drawn by popularity. Both
are fitted to how many experts a token shares with the one, the second and the eighth before it.
Whatever is made here says that it is synthetic, in its name and in its `synthetic` field.

How like: per-layer LRU hit rates of a fit are within 2 points of its source at top-2 of 8
(Mixtral's statistics), but 5 to 12 points off for the 128 experts of Qwen3-30B-A3B: two numbers
are too few for text whose topic moves. A recorded trace is always the better answer.
"""

from __future__ import annotations

import json
import random
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from textwrap import shorten

from moe_offload.errors import UserError
from moe_offload.simulation.traces import RoutingPass, Trace, TraceInfo

MEMORIES = (1.0, 4.0, 16.0)  # mean lags that a fit tries, in tokens
FIT_TOKENS = 500
HIGHEST_REPEAT = 0.95
LAGS = (1, 2, 8)

# Mean share of a token's two experts that the next token uses again. Jiang et al., "Mixtral of
# Experts" (2024), table 5: at least one repeats in about 48, 64 and 62% at layers 0, 15 and 31
# (chance: 46%). With both repeating in some 6%, the mean share is half of the sum of the two. It
# agrees with 34% measured for per-layer LRU with 2 of 8 ways, which hits just what repeats.
MIXTRAL_OVERLAP = 0.33


@dataclass(frozen=True)
class Workload:
    """A routing model of L layers: `popularity` [L][E], any positive scale; `repeat` [L]."""

    name: str
    top_k: int
    popularity: tuple[tuple[float, ...], ...]
    repeat: tuple[float, ...]
    memory_tokens: float = 1.0

    def generate(self, n_tokens: int, seed: int = 0, n_prompt_tokens: int = 0) -> Trace:
        """Make a trace of one prompt pass (if any tokens are asked for) and `n_tokens` of decode.

        The same seed gives the same trace; each layer has a generator of its own, so fewer
        layers are a prefix of more.
        """
        n_all = n_prompt_tokens + n_tokens
        layers = [self._layer(layer, n_all, seed) for layer in range(len(self.popularity))]
        passes = [
            RoutingPass("decode", tuple((tokens[t],) for tokens in layers))
            for t in range(n_prompt_tokens, n_all)
        ]
        if n_prompt_tokens:
            prompt = tuple(tuple(tokens[:n_prompt_tokens]) for tokens in layers)
            passes.insert(0, RoutingPass("prefill", prompt))
        info = TraceInfo(
            f"synthetic {self.name}",
            n_layers=len(layers),
            top_k=self.top_k,
            n_experts=len(self.popularity[0]),
            synthetic=True,
            notes=("no model chose these experts: the routing is synthetic",),
        )
        return Trace(info, tuple(passes))

    def _layer(self, layer: int, n_tokens: int, seed: int) -> list[tuple[int, ...]]:
        rng = random.Random(seed * 1_000_003 + layer)
        popularity = self.popularity[layer]
        experts = range(len(popularity))
        cumulative = list(accumulate(popularity))
        repeat, forget = self.repeat[layer], 1 / self.memory_tokens
        tokens: list[tuple[int, ...]] = []
        for t in range(n_tokens):
            chosen: dict[int, None] = {}
            while len(chosen) < self.top_k:
                if t and rng.random() < repeat:
                    lag = 1
                    while lag < t and rng.random() > forget:
                        lag += 1
                    left = [e for e in tokens[t - lag] if e not in chosen]
                    if left:
                        chosen.setdefault(rng.choice(left))
                        continue
                drawn = rng.choices(experts, cum_weights=cumulative)[0]
                while drawn in chosen:
                    drawn = rng.choices(experts, cum_weights=cumulative)[0]
                chosen.setdefault(drawn)
            tokens.append(tuple(chosen))
        return tokens


def even_workload(
    n_layers: int, n_experts: int, top_k: int, overlap: float | None = None
) -> Workload:
    """Every expert equally popular; `overlap` as in `with_overlap`, None for independent tokens."""
    assert n_experts >= top_k
    name = f"{n_layers} layers, top-{top_k} of {n_experts}"
    one_layer = Workload(name, top_k, ((1.0,) * n_experts,), (0.0,))
    if overlap is not None:
        one_layer = with_overlap(one_layer, [overlap])
    return replace(
        one_layer,
        popularity=one_layer.popularity * n_layers,
        repeat=one_layer.repeat * n_layers,
    )


def typical_workload(n_layers: int, n_experts: int, top_k: int) -> Workload:
    """What to assume of a model nothing is known of but its sizes.

    Beyond chance (K of E), a token of Mixtral shares 11% of its experts with the one before, of
    Qwen3-30B-A3B (128 experts) 35% and of gpt-oss-120b 17% (measured on public traces of a
    prompt and 64-128 tokens): few experts, little reuse; many experts, about a quarter.
    """
    chance = top_k / n_experts
    beyond = 0.11 if n_experts <= 16 else 0.25
    return even_workload(n_layers, n_experts, top_k, chance + (1 - chance) * beyond)


def popularity_workload(path: Path, top_k: int, overlap: float = MIXTRAL_OVERLAP) -> Workload:
    """A workload with the popularity in a JSON file, {"expert_popularity": [L][E] counts}.

    Such a file knows nothing of sequences: `overlap` is taken for every layer. Raises UserError.
    """
    try:
        document = json.loads(path.read_text())
        if not isinstance(document, dict) or "expert_popularity" not in document:
            keys = ", ".join(document) if isinstance(document, dict) else ""
            raise ValueError(f"no such entry{keys and ' beside '}{shorten(keys, 60)}")
        counts = document["expert_popularity"]
        popularity = tuple(tuple(max(float(n), 1e-9) for n in layer) for layer in counts)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f'expected {path} to hold {{"expert_popularity": [layers][experts]}}, found '
            f"{error.strerror if isinstance(error, OSError) else error}; give such a file or a "
            "trace"
        ) from None
    if not popularity or {len(layer) for layer in popularity} != {len(popularity[0])}:
        raise UserError(f"expected {path} to have as many experts in every layer; correct it")
    workload = Workload(path.name.split(".")[0], top_k, popularity, (0.0,) * len(popularity))
    return with_overlap(workload, [overlap] * len(popularity))


def fit_workload(trace: Trace) -> Workload:
    """Fit popularity, repetition and memory to the decoded tokens of a trace."""
    counts: list[Counter[int]] = [Counter() for _ in range(trace.n_layers)]
    recent: list[deque[tuple[int, ...]]] = [deque(maxlen=max(LAGS)) for _ in counts]
    shares = {lag: [_Mean() for _ in counts] for lag in LAGS}
    for one in trace.passes:
        if one.phase == "decode":
            for layer, tokens in enumerate(one.ids):
                for token in tokens:
                    counts[layer].update(token)
                    for lag in LAGS:
                        if len(recent[layer]) >= lag:
                            shares[lag][layer].add(_shared(recent[layer][-lag], token))
                    recent[layer].append(token)
    # Half a count for the unseen: a short trace has not shown every expert.
    popularity = tuple(
        tuple(of_layer[e] + 0.5 for e in range(trace.n_experts)) for of_layer in counts
    )
    plain = Workload(
        f"fit of {trace.info.model}", trace.info.top_k, popularity, (0.0,) * trace.n_layers
    )
    targets = [mean.value for mean in shares[1]]
    wanted = [_mean([mean.value for mean in shares[lag]]) for lag in LAGS]

    def misfit(fit: Workload) -> float:
        reached = [_mean(_overlaps(fit, lag)) for lag in LAGS]
        return sum(abs(a - b) for a, b in zip(reached, wanted, strict=True))

    fits = [with_overlap(replace(plain, memory_tokens=memory), targets) for memory in MEMORIES]
    return min(fits, key=misfit)


def with_overlap(workload: Workload, overlaps: Sequence[float]) -> Workload:
    """Set each layer's `repeat`, by bisection, so that a token shares `overlaps[layer]` of its K
    experts with the token before it; 0 where popularity alone gives more."""
    lows, highs = [0.0] * len(overlaps), [HIGHEST_REPEAT] * len(overlaps)
    for _ in range(6):
        middles = [(low + high) / 2 for low, high in zip(lows, highs, strict=True)]
        reached = _overlaps(replace(workload, repeat=tuple(middles)), 1)
        for layer, target in enumerate(overlaps):
            (lows if reached[layer] < target else highs)[layer] = middles[layer]
    return replace(workload, repeat=tuple((a + b) / 2 for a, b in zip(lows, highs, strict=True)))


def lag_overlap(tokens: Sequence[Sequence[int]], lag: int) -> float:
    """The mean share of a token's experts that the token `lag` before it had chosen too."""
    pairs = zip(tokens, tokens[lag:], strict=False)
    return _mean([_shared(old, new) for old, new in pairs])


def _shared(old: Sequence[int], new: Sequence[int]) -> float:
    return len(set(old) & set(new)) / len(new)


def _overlaps(workload: Workload, lag: int) -> list[float]:
    return [
        lag_overlap(workload._layer(layer, FIT_TOKENS, seed=1), lag)
        for layer in range(len(workload.popularity))
    ]


@dataclass
class _Mean:
    total: float = 0.0
    count: int = 0

    def add(self, value: float) -> None:
        self.total += value
        self.count += 1

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
