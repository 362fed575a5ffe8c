"""Replays a routing trace through the production ExpertCache, in the engine's own order.

Per forward pass, layer by layer: copies that have ended become ready; in decode the layer's chosen
experts are looked up once each and its misses fetched in top-k order while the pass has quota;
in a prompt the cache is warmed with the experts of its last tokens, by the same
`ExpertCache.warm`; what the prompt copied for its own sake is known from the timeline's clock or,
without one, from the trace, where it was recorded. Without a timeline every copy ends before the
next layer begins.

A clock for replayed routing: CPU, copies and GPU overlap as they do in the dispatcher.

Each layer passes in the dispatcher's order: dense work on the GPU; hits launched, copies queued,
misses on the CPU, all at once; the layer ends when both sides have. Copies go one at a time in
the order they were queued and carry on across layers and tokens. While the CPU computes and the
bus copies, both are slower by the cost model's shared speeds; the GPU goes on at its own.

Belady's optimum, the bound beside every policy: evict what is used again last.

Without bypass it is a policy like the others, run by the production directory, only that it knows
the future. With bypass a missed expert need not be kept at all; that is the most hits any policy
can have, whatever it evicts or refuses to admit.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from moe_offload.experts.cache import ExpertCache, ReplacementPolicy
from moe_offload.experts.costs import CostModel, PrefillSplit
from moe_offload.simulation.traces import NEVER, RoutingPass, Seen, packed


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


_STAGING = -1  # a slot of no cache: the copy is waited for and used once
_NOTHING_US = 1e-6


@dataclass
class Busy:
    """How long each part has worked, in us."""

    cpu_us: float = 0.0
    gpu_us: float = 0.0
    copy_us: float = 0.0


class Timeline:
    """The modelled time of one run, and which copies have arrived by then."""

    def __init__(self, costs: CostModel) -> None:
        self.costs = costs
        self.now_us = 0.0
        self.busy = Busy()
        self._queue: deque[list[float]] = deque()  # [slot, us left at full speed]
        self._arrived: list[int] = []
        self._waited = 0  # of the queue's first copies, how many a prompt's layer waits for
        self._slowdown = costs.copy_us(shared=True) / costs.copy_us(shared=False)

    def arrived(self) -> list[int]:
        """The slots whose copies ended since the last call, in order."""
        slots, self._arrived = self._arrived, []
        return slots

    def pass_dense(self) -> None:
        """Let the attention and routing of one layer pass."""
        self.busy.gpu_us += self._pass(self.costs.dense_us_per_layer, 1.0, slows_copies=False)

    def pass_rest(self) -> None:
        """Let what a pass takes beside its layers go by: the head."""
        self.busy.gpu_us += self._pass(self.costs.step_us, 1.0, slows_copies=False)

    def pass_experts(
        self, gpu_experts: int, cpu_experts: int, slots: Sequence[int], n_tokens: int = 1
    ) -> None:
        """Let one layer's experts pass.

        `gpu_experts` hits and `cpu_experts` misses have `n_tokens` each; copies into `slots` begin
        with them. Ends when both sides have; copies may be left over.
        """
        costs = self.costs
        self.queue(slots)
        self._pass_both(
            costs.cpu.us(cpu_experts, cpu_experts * n_tokens),
            costs.gpu.us(gpu_experts, gpu_experts * n_tokens),
        )

    def split_prefill(self, counts: Sequence[int], ready: Collection[int]) -> PrefillSplit:
        """Share a prompt layer's experts as the dispatcher does, behind the copies queued by now.

        `counts[e]` is the number of tokens on expert e; `ready` experts are cached. The backlog is
        the dispatcher's: it knows how many copies have not ended, not how far the first has come.
        """
        backlog_us = len(self._queue) * self.costs.copy_us(shared=True)
        return self.costs.split_prefill(counts, ready, backlog_us)

    def pass_prefill(
        self,
        split: PrefillSplit,
        counts: Sequence[int],
        warmed: Sequence[tuple[int, int]] = (),
        in_flight: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        """Let one layer's experts of a prompt pass as `split` shares them.

        `counts[e]` is the number of tokens on expert e; the experts of `warmed`, (expert, slot),
        are to be cached; `in_flight` maps those whose copies are queued by now to their slots. As
        in the dispatcher, what the layer waits for is copied first, an expert that is to be cached
        into its slot, any other into staging; one that is in flight is not copied again.
        """
        costs = self.costs
        slot_of = dict(warmed)
        waited = split.gpu_experts[len(split.gpu_experts) - split.n_copies :]
        awaited = {in_flight[e] for e in waited if e in in_flight}
        places = [place for place, (slot, _) in enumerate(self._queue, 1) if slot in awaited]
        copied = [slot_of.get(e, _STAGING) for e in waited if e not in in_flight]
        self.queue(copied)
        self._waited = len(self._queue) if copied else max(places, default=0)
        self.queue([slot for e, slot in warmed if e not in waited])
        last = split.gpu_experts[-1:] if waited else ()  # its arithmetic, no copy hides
        on_gpu = [counts[e] for e in split.gpu_experts if e not in last]
        self._pass_both(
            costs.cpu_us([counts[e] for e in split.cpu_experts]), costs.gpu.us_of(on_gpu)
        )
        while self._waited:
            self._pass_copy(self._queue[0][1], 1.0)
        self._pass_both(0.0, costs.gpu.us_of([counts[e] for e in last]))

    def queue(self, slots: Sequence[int]) -> None:
        """Queue copies that nothing waits for, such as the warm-up after a prompt's layer."""
        for slot in slots:
            self._queue.append([slot, self.costs.copy_us(shared=False)])

    def _pass_both(self, cpu_work_us: float, gpu_work_us: float) -> None:
        """Let a layer's work pass, each side's time given for a quiet machine."""
        began_us = self.now_us
        cpu_us, gpu_us = self._pass_together(cpu_work_us, gpu_work_us)
        together_us = self.now_us - began_us
        cpu_us = self._pass(cpu_us, self.costs.cpu_shared_factor, slows_copies=True)
        gpu_us = self._pass(gpu_us, 1.0, slows_copies=False)
        self.busy.cpu_us += together_us + cpu_us
        self.busy.gpu_us += together_us + gpu_us

    def _pass_together(self, cpu_us: float, gpu_us: float) -> tuple[float, float]:
        """Let both sides work until one has ended; returns what is left of each."""
        cpu_factor = self.costs.cpu_shared_factor
        while self._queue and min(cpu_us, gpu_us) > _NOTHING_US:
            us = min(cpu_us * cpu_factor, gpu_us, self._queue[0][1] * self._slowdown)
            self._pass_copy(us / self._slowdown, self._slowdown)
            cpu_us -= us / cpu_factor
            gpu_us -= us
        us = max(0.0, min(cpu_us, gpu_us))
        self.now_us += us
        return cpu_us - us, gpu_us - us

    def _pass(self, work_us: float, factor: float, slows_copies: bool) -> float:
        """Let work pass that takes `work_us` alone and `factor` times that beside a copy.

        Returns how long it really took.
        """
        began_us = self.now_us
        copy_factor = self._slowdown if slows_copies else 1.0
        while self._queue and work_us > _NOTHING_US:
            us = min(work_us * factor, self._queue[0][1] * copy_factor)
            self._pass_copy(us / copy_factor, copy_factor)
            work_us -= us / factor
        self.now_us += max(work_us, 0.0)
        return self.now_us - began_us

    def _pass_copy(self, us: float, factor: float) -> None:
        """Let the first copy advance by `us` of its time alone, which takes `factor` times that."""
        copy = self._queue[0]
        self.now_us += us * factor
        self.busy.copy_us += us * factor
        copy[1] -= us
        if copy[1] < _NOTHING_US:
            self._queue.popleft()
            self._waited = max(0, self._waited - 1)
            if copy[0] != _STAGING:
                self._arrived.append(int(copy[0]))


def prefetch_step_us(costs: CostModel, n_layers: int, top_k: int) -> float:
    """A decode step that prefetches every layer's experts, without a cache, in us.

    The next layer's experts are known (Pre-gated MoE) and are copied while this layer computes.
    """
    compute_us = costs.dense_us_per_layer + costs.gpu.us(top_k, top_k)
    return costs.step_us + n_layers * max(top_k * costs.copy_us(shared=False), compute_us)


def bound_us(costs: CostModel, n_layers: int, hits: float, misses: float) -> float:
    """The least time of a decode step, in us: perfect prediction and full overlap.

    `hits` and `misses` are the chosen experts of one step, over all its layers, that an optimal
    cache has and lacks. The misses are shared between CPU and bus so that both end together, the
    copies begin as early as they like, and nothing slows anything else.
    """
    gpu_us, cpu_us = hits * costs.gpu.one_us(1), costs.cpu.one_us(1)
    dense_us = costs.step_us + n_layers * costs.dense_us_per_layer
    shared_us = (dense_us + misses * cpu_us) / (1 + cpu_us / costs.copy_us(shared=False))
    return max(dense_us + gpu_us, shared_us)


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
        if timeline is not None:
            timeline.pass_rest()
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
