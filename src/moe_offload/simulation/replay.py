"""Replays a routing trace through the production ExpertCache, in the engine's own order.

Per forward pass, layer by layer: copies that have ended become ready; in decode the layer's chosen
experts are looked up once each and its misses fetched in top-k order while the pass has quota;
in a prompt the cache is warmed with the experts of its last tokens, by the same
`ExpertCache.warm`; what the prompt copied for its own sake is known from the clock or, without
one, from the trace, where it was recorded. Without a clock every copy ends before the next layer
begins.

Beside every policy stands a bound that knows the future: `most_hits`, Belady's optimum.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain

from moe_offload.experts.cache import ExpertCache, HitCounts
from moe_offload.experts.costs import CostModel
from moe_offload.experts.plan import Plan, plan_prefill
from moe_offload.simulation.traces import NEVER, Routing, RoutingPass, distinct_experts


def most_hits(routing: Routing, n_indexes: int, n_ways: int) -> int:
    """The most experts of decode that any N x M cache can hit, in the unit of `Replay.found`.

    A missed expert need not be kept at all (bypass), so no policy exceeds it, whatever it evicts.
    Between two uses an expert either stays the whole time, a hit, or need not be there; at most M
    stay at once. Keeping the M that are used again first is optimal for such intervals. A
    prompt's experts may be kept without having been looked up.
    """
    hits = place = 0
    held_in: list[dict[int, int]] = [{} for _ in range(n_indexes)]  # expert -> its next use
    for one in routing:
        decode = one.phase == "decode"
        place += len(one.ids[0]) * routing.top_k if decode else 0
        for layer, (held, tokens) in enumerate(zip(held_in, one.ids, strict=False)):
            for expert in distinct_experts(tokens):
                hits += decode and expert in held
                held[expert] = routing.next_use(layer, expert, place)
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
    """The modelled time of one run, and which copies have arrived by then.

    Each layer passes in the dispatcher's order: dense work on the GPU; hits launched, copies
    queued, misses on the CPU, all at once; the layer ends when both sides have, and the CPU's sum
    has come past a copy that is under way. Copies go one at a
    time in the order they were queued and carry on across layers and tokens. While the CPU
    computes and the bus copies, both are slower by the cost model's shared speeds; the GPU goes on
    at its own.
    """

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
        self._pass_both(0.0, self.costs.dense_us_per_layer)

    def pass_rest(self) -> None:
        """Let what a pass takes beside its layers go by: the head."""
        self._pass_both(0.0, self.costs.step_us)

    def pass_experts(
        self, gpu_experts: int, cpu_experts: int, slots: Sequence[int], n_tokens: int = 1
    ) -> None:
        """Let one layer's experts pass.

        `gpu_experts` hits and `cpu_experts` misses have `n_tokens` each; copies into `slots` begin
        with them.
        """
        costs = self.costs
        self.queue(slots)
        self._pass_both(
            costs.cpu.us(cpu_experts, cpu_experts * n_tokens),
            costs.gpu.us(gpu_experts, gpu_experts * n_tokens),
        )

    @property
    def backlog_us(self) -> float:
        """The queued copies, each whole: how far the first has come the dispatcher cannot know."""
        return len(self._queue) * self.costs.copy_us(shared=True)

    def pass_prefill(
        self,
        plan: Plan,
        counts: Sequence[int],
        warmed: Sequence[tuple[int, int]],
        in_flight: Mapping[int, int],
    ) -> None:
        """Let one layer's experts of a prompt pass as `plan` shares them.

        `counts[e]` is the number of tokens on expert e; the experts of `warmed`, (expert, slot),
        are to be cached; `in_flight` maps those whose copies are queued by now to their slots. As
        in the dispatcher, what the layer waits for is copied first, an expert that is to be cached
        into its slot, any other into staging; one that is in flight is not copied again.
        """
        costs = self.costs
        slot_of = dict(warmed)
        waited = plan.waited
        awaited = {in_flight[e] for e in waited if e in in_flight}
        places = [place for place, (slot, _) in enumerate(self._queue, 1) if slot in awaited]
        copied = [slot_of.get(e, _STAGING) for e in waited if e not in in_flight]
        self.queue(copied)
        self._waited = len(self._queue) if copied else max(places, default=0)
        self.queue([slot for e, slot in warmed if e not in waited])
        on_gpu = [counts[e] for e in (*plan.hits, *waited[:-1])]
        self._pass_both(costs.cpu_us([counts[e] for e in plan.cpu]), costs.gpu.us_of(on_gpu))
        while self._waited:
            self._pass_copy(self._queue[0][1], 1.0)
        # The last one's arithmetic, which no copy hides.
        self._pass_both(0.0, costs.gpu.us_of([counts[e] for e in waited[-1:]]))

    def queue(self, slots: Sequence[int]) -> None:
        """Queue copies that nothing waits for, such as the warm-up after a prompt's layer."""
        for slot in slots:
            self._queue.append([slot, self.costs.copy_us(shared=False)])

    def _pass_both(self, cpu_us: float, gpu_us: float) -> None:
        """Let a layer's work pass, each side's time given for a quiet machine."""
        began_us = self.now_us
        self._pass(cpu_us, self.costs.cpu_shared_factor, self._slowdown)
        self.busy.cpu_us += self.now_us - began_us
        if cpu_us and self._queue:
            self._pass(self.costs.sum_wait_us)
        self._pass(began_us + gpu_us - self.now_us)  # what the GPU needs longer
        self.busy.gpu_us += gpu_us

    def _pass(self, work_us: float, factor: float = 1.0, copy_factor: float = 1.0) -> None:
        """Let work pass that takes `work_us` alone and `factor` times that beside a copy.

        The copies take `copy_factor` times as long beside it.
        """
        while self._queue and work_us > _NOTHING_US:
            us = min(work_us * factor, self._queue[0][1] * copy_factor)
            self._pass_copy(us / copy_factor, copy_factor)
            work_us -= us / factor
        self.now_us += max(work_us, 0.0)

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
class Replay:
    """What a replay counted, of a cache that was empty.

    `decode` and `prefill` are hits of the cached layers by token, as the engine's summary counts
    them. `looked_up` counts what decode asks the directory: an expert that several tokens of a
    pass chose counts once, and `found` of them were there. This is the unit of decode's fetches and
    of the optimum; for one sequence both units are the same. `fetches` are the engine's copies:
    with the warm-up after prompts, and with what a prompt copied, computed and did not keep.
    `hits_by_layer` has one row for each pass, as the cachehit CSV: hits of each cached layer, where
    kept. The times are modelled, and how long each part was `busy` in them: 0 without a timeline.
    What no policy can exceed, `most_hits` in the unit of `found` and
    `bound_tokens_per_s`, is computed where it is asked for (`tuning.run_setting`).
    """

    decode: HitCounts = field(default_factory=HitCounts)
    prefill: HitCounts = field(default_factory=HitCounts)
    looked_up: int = 0
    found: int = 0
    n_decode_passes: int = 0
    n_decode_tokens: int = 0
    fetches: int = 0
    evictions: int = 0
    decode_us: float = 0.0
    prefill_us: float = 0.0
    busy: Busy = field(default_factory=Busy)
    hits_by_layer: list[list[int]] = field(default_factory=list)
    most_hits: int = 0
    bound_tokens_per_s: float = 0.0

    @property
    def found_percent(self) -> float:
        """Hits in percent of what the directory was asked, each expert once in a pass."""
        return 100 * self.found / max(self.looked_up, 1)

    @property
    def bound_percent(self) -> float:
        """The hits that no policy can exceed, in the unit of `found_percent`."""
        return 100 * self.most_hits / max(self.looked_up, 1)

    @property
    def tokens_per_s(self) -> float:
        """The modelled speed of decode; 0 without a timeline."""
        return self.n_decode_tokens / self.decode_us * 1e6 if self.decode_us else 0.0


def replay(
    passes: Iterable[RoutingPass],
    cache: ExpertCache,
    quota: int = 64,
    timeline: Timeline | None = None,
    keep_layers: bool = False,
) -> Replay:
    """Run `passes` through `cache`.

    `quota` is the most fetches of one pass. With a `timeline`, copies take their modelled time
    and the times are filled; without, they are instant. `keep_layers` fills `hits_by_layer`.
    """
    result = Replay()
    for one in passes:
        began_us = timeline.now_us if timeline else 0.0
        if timeline is not None:
            timeline.pass_rest()
        if one.phase == "prefill":
            row = _replay_prefill(one, cache, quota, timeline, result)
            result.prefill_us += timeline.now_us - began_us if timeline else 0.0
        else:
            row = _replay_decode(one, cache, quota, timeline, result.decode)
            result.n_decode_passes += 1
            result.n_decode_tokens += len(one.ids[0])
            result.decode_us += timeline.now_us - began_us if timeline else 0.0
        if keep_layers:
            result.hits_by_layer.append(row)
    if timeline is not None:
        result.busy = timeline.busy
    result.looked_up = cache.hits + cache.misses
    result.found = cache.hits
    result.fetches += cache.admissions
    result.evictions = cache.evictions
    return result


def _replay_decode(
    one: RoutingPass, cache: ExpertCache, quota: int, timeline: Timeline | None, counted: HitCounts
) -> list[int]:
    row: list[int] = []
    for layer, tokens in enumerate(one.ids):
        if timeline is not None:
            _begin_layer(timeline, cache)
        elif layer >= cache.n_indexes:
            break
        experts = distinct_experts(tokens)
        slots = cache.lookup(layer, experts)
        missed = [e for e, slot in zip(experts, slots, strict=True) if slot < 0]
        fetches = cache.start_fetches(layer, missed, quota) if missed and quota else []
        quota -= len(fetches)
        cache.end_step(layer)
        if layer < cache.n_indexes:
            if len(tokens) == 1:  # as below, in a third of the time
                row.append(counted.add(len(experts) - len(missed), len(experts)))
            else:
                row.append(_count(counted, tokens, set(experts).difference(missed)))
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
    one: RoutingPass, cache: ExpertCache, quota: int, timeline: Timeline | None, result: Replay
) -> list[int]:
    row: list[int] = []
    for layer, tokens in enumerate(one.ids):
        waited: Sequence[int] = one.waited[layer] if one.waited else ()
        if timeline is not None:
            _begin_layer(timeline, cache)
        ready = cache.ready(layer)
        if timeline is not None:
            tokens_of = Counter(chain.from_iterable(tokens))
            counts = [tokens_of[expert] for expert in range(1 + max(tokens_of))]
            plan = plan_prefill(counts, ready, "cpu", timeline.costs, timeline.backlog_us)
            waited = plan.waited
            places = {expert: cache.slot_of(layer, expert) for expert in waited}
            in_flight = {expert: slot for expert, slot in places.items() if slot is not None}
        if layer < cache.n_indexes:
            row.append(_count(result.prefill, tokens, ready))
        fetches = cache.warm(layer, tokens, quota, waited)
        quota -= cache.warm_charge(fetches, waited)
        result.fetches += sum(cache.slot_of(layer, expert) is None for expert in waited)
        if timeline is not None:
            timeline.pass_prefill(plan, counts, fetches, in_flight)
        else:
            for _, slot in fetches:
                cache.mark_ready(slot)
    return row


def _begin_layer(timeline: Timeline, cache: ExpertCache) -> None:
    timeline.pass_dense()
    for slot in timeline.arrived():
        cache.mark_ready(slot)


def _count(counted: HitCounts, tokens: Sequence[Sequence[int]], ready: Collection[int]) -> int:
    """Count the tokens of one layer, of whose experts `ready` are there; returns their hits."""
    return sum(counted.add(sum(e in ready for e in token), len(token)) for token in tokens)
