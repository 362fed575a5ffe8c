"""Many cache settings on one trace: swept as a table, or searched for the fastest that fits.

`sweep` replays every N x M x policy on all cores of this machine. `choose_cache` and `tune` look
for the fastest in a memory budget. They ask the simulator, not a rule: which N x M, policy, quota
and expert format is fastest depends on the routing, the CPU, the bus and what the two take from
each other at once.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moe_offload.config import CacheOptions
from moe_offload.errors import UserError
from moe_offload.experts.cache import POLICIES, ExpertCache, make_policy, ways_within
from moe_offload.experts.costs import CostModel
from moe_offload.simulation.replay import Replay, Timeline, bound_us, most_hits, replay
from moe_offload.simulation.tiers import replay_tiers
from moe_offload.simulation.traces import Routing, RoutingPass, Trace
from moe_offload.simulation.workload import typical_workload


@dataclass(frozen=True)
class SweepRow:
    """What one setting yields; hit rates in percent of decode's cached layers.

    `hit_expert` and `bound_bypass`, the rate that no policy can exceed, count an expert once in a
    pass, however many tokens of a batch chose it; so does `all_hits`, in percent of every layer's
    experts, cached or not. `fits` says whether the GPU holds so many slots. The speeds are None
    where it does not, and all three without a machine.
    """

    n_indexes: int
    n_ways: int
    policy: str
    slots: int
    hit_one: float
    hit_two: float
    hit_expert: float
    bound_bypass: float
    all_hits: float
    fetches: int
    evictions: int
    tokens_per_s: float | None
    bound_tokens_per_s: float | None
    synthetic: bool
    fits: bool | None


def run_setting(trace: Trace, setting: CacheOptions, costs: CostModel | None = None) -> Replay:
    """Replay `trace` with one setting, on a modelled clock where `costs` are given; with bounds."""
    cache = ExpertCache(setting.n_indexes, setting.n_ways, make_policy(setting.policy))
    result = replay(trace.passes, cache, setting.quota, Timeline(costs) if costs else None)
    best = result.most_hits = most_hits(trace.passes, cache.n_indexes, setting.n_ways)
    if costs is not None:
        n = result.n_decode_passes
        step_us = bound_us(costs, trace.n_layers, best / n, (trace.n_chosen - best) / n)
        result.bound_tokens_per_s = result.n_decode_tokens / (n * step_us) * 1e6
    return result


def sweep(
    trace: Trace,
    settings: Sequence[CacheOptions],
    costs: CostModel | None = None,
    processes: int = 1,
    cache_bytes: float = 0.0,
) -> list[SweepRow]:
    """Run every setting, on so many processes; the rows keep the settings' order.

    `cache_bytes` is what the GPU has for slots, where `costs` are given.
    """
    row = partial(_row, trace, costs, cache_bytes)
    if processes <= 1 or len(settings) < 2 * processes:
        return [row(setting) for setting in settings]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        # Four chunks a process: the trace travels with each, and slow settings spread.
        return pool.map(row, settings, chunksize=-(-len(settings) // (4 * processes)))


def _row(
    trace: Trace, costs: CostModel | None, cache_bytes: float, setting: CacheOptions
) -> SweepRow:
    fits = None if costs is None else setting.n_slots * costs.block_bytes <= cache_bytes
    result = run_setting(trace, setting, costs)
    return SweepRow(
        setting.n_indexes,
        setting.n_ways,
        setting.policy,
        slots=setting.n_slots,
        hit_one=result.decode.at_least_one_percent,
        hit_two=result.decode.at_least_two_percent,
        hit_expert=result.found_percent,
        bound_bypass=result.bound_percent,
        all_hits=100 * result.found / trace.n_chosen,
        fetches=result.fetches,
        evictions=result.evictions,
        tokens_per_s=result.tokens_per_s if fits else None,
        bound_tokens_per_s=result.bound_tokens_per_s if fits else None,
        synthetic=trace.info.synthetic,
        fits=fits,
    )


def grid(trace: Trace) -> list[CacheOptions]:
    """The settings of a sweep: N x M x policy, each number doubling up to the model's own."""
    return [
        CacheOptions(n, m, policy=policy)
        for n in _doubling(trace.n_layers, 3)
        for m in _doubling(trace.n_experts, 5)
        for policy in POLICIES
    ]


def _doubling(limit: int, count: int) -> list[int]:
    """`limit` and its halves, `count` in all, ascending."""
    return sorted({max(1, limit >> shift) for shift in range(count)})


SEARCH_TOKENS = 64
PROMPT_TOKENS = 16
OTHER_POLICIES = ("FIFO", "LFRU", "LFU")  # tried after LRU; earlier ones win ties
# Copies slow the CPU down, which reads the same memory: then a pass's first ones alone may pay.
LESSER_QUOTAS = (32, 16, 8, 4, 2)
WORTHWHILE = 1.005  # less gain than this is noise of the routing
BUDGETS = 6
_Timed = tuple[float, CacheOptions]  # tokens/s of a cache


@dataclass(frozen=True)
class CacheChoice:
    """The fastest cache found, what it is predicted to do, and one sentence that says why."""

    cache: CacheOptions
    tokens_per_s: float
    reason: str


@dataclass(frozen=True)
class TunedSetting:
    """One point of a tuning: the fastest cache in one expert format, and its memory.

    Host memory holds `host_ways` experts of each layer or more. `on_front`: nothing found is at
    least as fast in less memory.
    """

    cache: CacheOptions
    tokens_per_s: float
    weight_format: str
    cache_bytes: int
    host_ways: int
    on_front: bool = False


def choose_cache(
    free_bytes: int,
    n_layers: int,
    n_experts: int,
    top_k: int,
    costs: CostModel,
    trace: Trace | None = None,
    ways: Sequence[int] | None = None,
    host_policy: str = "LFRU",
    quota: int = CacheOptions.quota,
) -> CacheChoice:
    """Choose N, M, policy and a quota of at most `quota` for `free_bytes` of GPU memory.

    Every way to spend the slots is tried, from many indexes of few ways to few of many, on the
    first tokens of `trace`, or without one on synthetic routing of this shape. 0 x 0 when nothing
    fits or no cache beats the CPU alone. With `ways` host memory holds so many experts of each
    layer, by `host_policy`, over the disk that `costs` know. Takes a second or two. Raises
    UserError for a trace of another shape.
    """
    if trace is None:
        source = "synthetic routing of this shape"
        workload = typical_workload(n_layers, n_experts, top_k)
        trace = workload.generate(SEARCH_TOKENS, n_prompt_tokens=PROMPT_TOKENS)
    elif trace.n_layers != n_layers or trace.n_experts > n_experts:
        raise UserError(
            f"expected a trace of {n_layers} layers and at most {n_experts} experts, found "
            f"{trace.n_layers} and {trace.n_experts} in {trace.info.model}; give a trace of "
            "this model, or none"
        )
    else:
        source = f"the trace of {trace.info.model}"
    passes = first_tokens(trace, SEARCH_TOKENS)
    first = Trace(trace.info, Routing(passes))

    def timed(setting: CacheOptions) -> _Timed:
        if ways is not None:
            return replay_tiers(first, ways, host_policy, costs, setting).tokens_per_s, setting
        cache = ExpertCache(setting.n_indexes, setting.n_ways, make_policy(setting.policy))
        return replay(passes, cache, setting.quota, Timeline(costs)).tokens_per_s, setting

    def fastest(best: _Timed, settings: Iterable[CacheOptions]) -> _Timed:
        """The first that no later one beats by a worthwhile margin."""
        for one in map(timed, settings):
            if one[0] > best[0] * WORTHWHILE:
                best = one
        return best

    n_slots = min(free_bytes // costs.block_bytes, n_layers * n_experts)
    plain = CacheOptions(policy="LRU", quota=quota)
    alone, no_cache = timed(plain)
    sizes = [
        replace(plain, n_indexes=n, n_ways=m) for n, m in layouts(n_slots, n_layers, n_experts)
    ]
    best = fastest((alone, no_cache), sizes)
    if best[1] is no_cache:
        why = "no cache: not one expert fits"
        if n_slots:
            why = f"no cache: {n_slots} experts fit, but the CPU alone is predicted to be as fast"
        return CacheChoice(no_cache, alone, why)
    best = fastest(best, [replace(best[1], policy=policy) for policy in OTHER_POLICIES])
    lesser = [replace(best[1], quota=fewer) for fewer in LESSER_QUOTAS if fewer < quota]
    per_s, found = fastest(best, lesser)
    return CacheChoice(
        found,
        per_s,
        f"{found.n_slots} of {n_slots} slots that fit; {per_s:.3g} tokens/s "
        f"predicted against {alone:.3g} without a cache, by replaying {source}",
    )


def tune(
    trace: Trace,
    memory_bytes: int,
    costs_of_format: dict[str, CostModel],
    host_bytes: int | None = None,
    host_policy: str = "LFRU",
) -> list[TunedSetting]:
    """Find the fastest cache of each expert format at several budgets up to `memory_bytes`.

    Host memory has `host_bytes` for experts, kept by `host_policy`, or room for all. A format of
    which that does not hold an expert of each layer is left out. Returns the points by memory, with
    the Pareto front of speed against memory marked.
    """
    points = []
    shape = trace.n_layers, trace.n_experts, trace.info.top_k
    for weight_format, costs in costs_of_format.items():
        n_layers, n_experts, _ = shape
        ways = [n_experts] * n_layers
        if host_bytes is not None:
            ways = ways_within(host_bytes, [costs.block_bytes] * n_layers, ways)
        if not min(ways):
            continue
        over_disk = ways if min(ways) < n_experts else None
        for step in range(BUDGETS + 1):
            budget = memory_bytes * step // BUDGETS
            choice = choose_cache(budget, *shape, costs, trace, over_disk, host_policy)
            n_bytes = choice.cache.n_slots * costs.block_bytes
            facts = choice.cache, choice.tokens_per_s, weight_format, n_bytes, min(ways)
            points.append(TunedSetting(*facts))
    fastest = 0.0
    marked = []
    points.sort(key=lambda point: (point.cache_bytes, -point.tokens_per_s))
    for point in dict.fromkeys(points):
        marked.append(replace(point, on_front=point.tokens_per_s > fastest))
        fastest = max(fastest, point.tokens_per_s)
    return marked


def layouts(n_slots: int, n_layers: int, n_experts: int) -> Iterator[tuple[int, int]]:
    """The N x M worth trying for so many slots, most indexes first.

    From all layers with the ways that allows to few layers with every expert; ways up to 8 grow
    one by one, then by a quarter.
    """
    n_ways = max(1, min(n_experts, n_slots // n_layers))
    while n_ways <= min(n_experts, n_slots):
        yield min(n_layers, n_slots // n_ways), n_ways
        if n_ways == n_experts:
            return
        n_ways = min(n_experts, n_ways + max(1, n_ways // 4))


def first_tokens(trace: Trace, n_tokens: int) -> list[RoutingPass]:
    """The passes of a trace up to its `n_tokens`th decode pass."""
    kept, left = [], n_tokens
    for one in trace.passes:
        kept.append(one)
        left -= one.phase == "decode"
        if not left:
            break
    return kept
