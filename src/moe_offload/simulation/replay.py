"""Replays a routing trace through the production ExpertCache, in the engine's own order.

Per forward pass, layer by layer: copies that have ended become ready; in decode the layer's chosen
experts are looked up once each and its misses fetched in top-k order while the pass has quota;
in a prompt the cache is warmed with the experts of its last tokens, by the same
`ExpertCache.warm`; what the prompt copied for its own sake is known from the timeline's clock or,
without one, from the trace, where it was recorded. Without a timeline every copy ends before the
next layer begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from moe_offload.experts.expert_cache import ExpertCache
from moe_offload.simulation.belady import Belady, distinct_experts
from moe_offload.simulation.packed_routing import RoutingPass, Seen
from moe_offload.simulation.time_model import Timeline


@dataclass
class PhaseHits:
    """Hits of the cached layers in one phase.

    `pairs` counts (token, cached layer), of which `at_least_one` and `at_least_two` found so many
    of their experts ready; `lookups` counts (token, cached layer, expert), of which `hits` hit, as
    the cachehit CSV does. `experts` counts what the directory is asked: an expert that several
    tokens of a pass chose counts once, and `expert_hits` of them were there. This is the unit of
    fetches and of the optimum. For one sequence, without a prompt, both units are the same.
    """

    pairs: int = 0
    at_least_one: int = 0
    at_least_two: int = 0
    lookups: int = 0
    hits: int = 0
    experts: int = 0
    expert_hits: int = 0

    def rates(self) -> tuple[float, float, float]:
        """At least one, at least two, per expert, in percent; 0 where there was nothing.

        The engine's summary gives the same three.
        """
        pairs = max(self.pairs, 1)
        return (
            100 * self.at_least_one / pairs,
            100 * self.at_least_two / pairs,
            100 * self.hits / max(self.lookups, 1),
        )

    @property
    def distinct_percent(self) -> float:
        """Hits in percent of what the directory is asked, each expert once in a pass."""
        return 100 * self.expert_hits / max(self.experts, 1)

    def add(self, tokens: Sequence[tuple[int, ...]], ready: Iterable[int]) -> None:
        """Count the tokens of one layer, of whose experts `ready` are there."""
        present = frozenset(ready)
        for token in tokens:
            self._add_token(sum(expert in present for expert in token), len(token))
        chosen = {expert for token in tokens for expert in token}
        self.experts += len(chosen)
        self.expert_hits += len(chosen & present)

    def add_seen(self, seen: Seen, ready: Collection[int]) -> None:
        """Count a layer of a prompt whose tokens are not known one by one: no pairs."""
        self.lookups += sum(n for _, n in seen)
        self.hits += sum(n for expert, n in seen if expert in ready)
        self.experts += len(seen)
        self.expert_hits += sum(expert in ready for expert, _ in seen)

    def add_one(self, n_hits: int, top_k: int) -> None:
        """Count a layer of one token."""
        self._add_token(n_hits, top_k)
        self.experts += top_k
        self.expert_hits += n_hits

    def _add_token(self, n_hits: int, top_k: int) -> None:
        self.pairs += 1
        self.at_least_one += n_hits >= 1
        self.at_least_two += n_hits >= 2
        self.lookups += top_k
        self.hits += n_hits


@dataclass
class Replay:
    """What a replay counted.

    `fetches` and `evictions` include the warm-up after prompts. `hits_by_layer` has one row for
    each pass, as the cachehit CSV: hits of each cached layer, where kept.
    `decode_us` is the modelled time of the decode passes, 0 without a timeline.
    """

    decode: PhaseHits = field(default_factory=PhaseHits)
    prefill: PhaseHits = field(default_factory=PhaseHits)
    n_decode_passes: int = 0
    n_decode_tokens: int = 0
    fetches: int = 0
    evictions: int = 0
    decode_us: float = 0.0
    prefill_us: float = 0.0
    hits_by_layer: list[list[int]] = field(default_factory=list)


def replay(
    passes: Iterable[RoutingPass],
    cache: ExpertCache,
    quota: int = 64,
    timeline: Timeline | None = None,
    keep_layers: bool = False,
) -> Replay:
    """Run `passes` through `cache`, whose counters go on from where they were.

    `quota` is the most fetches of one pass. With a `timeline`, copies take their modelled time
    and `decode_us` is filled; without, they are instant. `keep_layers` fills `hits_by_layer`.
    """
    result = Replay()
    policy = cache.policy
    fetched_before, evicted_before = cache.admissions, cache.evictions
    for one in passes:
        if isinstance(policy, Belady):
            policy.begin_pass(one)
        began_us = timeline.now_us if timeline else 0.0
        if one.phase == "prefill":
            row = _replay_prefill(one, cache, quota, timeline, result.prefill)
            result.prefill_us += timeline.now_us - began_us if timeline else 0.0
        else:
            row = _replay_decode(one, cache, quota, timeline, result.decode)
            result.n_decode_passes += 1
            result.n_decode_tokens += len(one.ids[0])
            result.decode_us += timeline.now_us - began_us if timeline else 0.0
        if keep_layers:
            result.hits_by_layer.append(row)
    result.fetches = cache.admissions - fetched_before
    result.evictions = cache.evictions - evicted_before
    return result


def _replay_decode(
    one: RoutingPass, cache: ExpertCache, quota: int, timeline: Timeline | None, counted: PhaseHits
) -> list[int]:
    row: list[int] = []
    for layer, tokens in enumerate(one.ids):
        if timeline is not None:
            timeline.pass_dense()
            for slot in timeline.arrived():
                cache.mark_ready(slot)
        elif layer >= cache.n_indexes:
            break
        experts = tokens[0] if len(tokens) == 1 else distinct_experts(tokens)
        slots = cache.lookup(layer, experts)
        missed = [e for e, slot in zip(experts, slots, strict=True) if slot < 0]
        fetches = cache.start_fetches(layer, missed, quota) if missed and quota else []
        quota -= len(fetches)
        cache.end_step(layer)
        if layer < cache.n_indexes:
            if len(tokens) == 1:
                n_hits = len(experts) - len(missed)
                counted.add_one(n_hits, len(experts))
                row.append(n_hits)
            else:
                hits_before = counted.hits
                counted.add(tokens, set(experts).difference(missed))
                row.append(counted.hits - hits_before)
        if timeline is None:
            for _, slot in fetches:
                cache.mark_ready(slot)
        else:
            n_tokens = max(1, round(sum(map(len, tokens)) / len(experts)))
            timeline.pass_experts(
                len(experts) - len(missed), len(missed), [slot for _, slot in fetches], n_tokens
            )
    return row


def _replay_prefill(
    one: RoutingPass, cache: ExpertCache, quota: int, timeline: Timeline | None, counted: PhaseHits
) -> list[int]:
    row: list[int] = []
    for layer, tokens in enumerate(one.last_choices()):
        seen = one.seen[layer] if one.seen else None
        waited: Sequence[int] = one.waited[layer] if one.waited else ()
        ready = cache.ready(layer)
        if timeline is not None:
            timeline.pass_dense()
            for slot in timeline.arrived():
                cache.mark_ready(slot)
            ready = cache.ready(layer)
            counts = [0] * (1 + max(expert for token in tokens for expert in token))
            for expert, n in seen or Counter(e for token in tokens for e in token).items():
                counts[expert] += n
            split = timeline.split_prefill(counts, ready)
            waited = [expert for expert in split.gpu_experts if expert not in ready]
        if layer < cache.n_indexes:
            hits_before = counted.hits
            if seen is None:
                counted.add(tokens, ready)
            else:
                counted.add_seen(seen, ready)
            row.append(counted.hits - hits_before)
        places = {expert: cache.slot_of(layer, expert) for expert in waited}
        fetches = cache.warm(layer, tokens, quota, waited)
        quota -= cache.warm_charge(fetches, waited)
        if timeline is not None:
            in_flight = {expert: slot for expert, slot in places.items() if slot is not None}
            timeline.pass_prefill(split, counts, fetches, in_flight)
        else:
            for _, slot in fetches:
                cache.mark_ready(slot)
    return row
