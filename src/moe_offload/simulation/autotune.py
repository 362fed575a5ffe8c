"""Chooses a cache for a memory budget by replaying routing on a modelled clock.

The search asks the simulator, not a rule: which N x M, policy and expert format is fastest here
depends on the routing, the CPU and the bus at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from moe_offload.errors import UserError
from moe_offload.experts.cost_model import CostModel
from moe_offload.experts.expert_cache import ExpertCache
from moe_offload.experts.replacement_policies import make_policy
from moe_offload.simulation.replay import replay
from moe_offload.simulation.time_model import Timeline
from moe_offload.simulation.traces import RoutingPass, Trace
from moe_offload.simulation.workload import typical_workload

SEARCH_TOKENS = 64
PROMPT_TOKENS = 16
POLICIES_TRIED = ("LRU", "FIFO", "LFRU", "LFU")  # earlier ones win ties
WORTHWHILE = 1.005  # less gain than this is noise of the routing
FORMATS = ("bf16", "int8", "int4")

_Key = TypeVar("_Key")


@dataclass(frozen=True)
class CacheChoice:
    """The fastest cache found, what it is predicted to do, and one sentence that says why."""

    n_indexes: int
    n_ways: int
    policy: str
    predicted_tokens_per_s: float
    reason: str


@dataclass(frozen=True)
class TunedSetting:
    """One point of a tuning: a cache in one expert format, its memory and its speed.

    `on_front`: nothing found is at least as fast in less memory.
    """

    weight_format: str
    n_indexes: int
    n_ways: int
    policy: str
    cache_bytes: int
    tokens_per_s: float
    on_front: bool = False


def choose_cache(
    free_bytes: int,
    block_bytes: int,
    n_layers: int,
    n_experts: int,
    top_k: int,
    cost_model: CostModel,
    trace: Trace | None = None,
) -> CacheChoice:
    """Choose N, M and policy for `free_bytes` of GPU memory.

    Every way to spend the slots is tried, from many indexes of few ways to few of many, on the
    first tokens of `trace`, or without one on synthetic routing of this shape. 0 x 0 when nothing
    fits or no cache beats the CPU alone. Takes a second or two. Raises UserError for a trace of
    another shape.
    """
    if trace is not None and (trace.n_layers != n_layers or trace.n_experts > n_experts):
        raise UserError(
            f"expected a trace of {n_layers} layers and at most {n_experts} experts, found "
            f"{trace.n_layers} and {trace.n_experts} in {trace.info.model}; give a trace of "
            "this model, or none"
        )
    n_slots = min(free_bytes // block_bytes, n_layers * n_experts)
    if trace is None:
        synthetic = typical_workload(n_layers, n_experts, top_k)
        passes = synthetic.generate(SEARCH_TOKENS, 0, PROMPT_TOKENS).passes
        source = "synthetic routing of this shape"
    else:
        passes = first_tokens(trace, SEARCH_TOKENS)
        source = f"the trace of {trace.info.model}"
    speed = _speeds(passes, cost_model)
    alone = speed(0, 0, "LRU")
    tried = [((0, 0), alone)]
    tried += [((n, m), speed(n, m, "LRU")) for n, m in layouts(n_slots, n_layers, n_experts)]
    (n_indexes, n_ways), best = _best(tried)
    if not n_indexes:
        why = "no cache: not one expert fits"
        if n_slots:
            why = f"no cache: {n_slots} experts fit, but the CPU alone is predicted to be as fast"
        return CacheChoice(0, 0, "LRU", alone, why)
    policies = [("LRU", best)]
    policies += [(p, speed(n_indexes, n_ways, p)) for p in POLICIES_TRIED if p != "LRU"]
    policy, best = _best(policies)
    return CacheChoice(
        n_indexes,
        n_ways,
        policy,
        best,
        f"{n_indexes * n_ways} of {n_slots} slots that fit; {best:.3g} tokens/s predicted against "
        f"{alone:.3g} without a cache, by replaying {source}",
    )


def tune(
    trace: Trace,
    memory_bytes: int,
    costs_of_format: dict[str, CostModel],
    budgets: int = 6,
) -> list[TunedSetting]:
    """Find the fastest cache of each expert format at several budgets up to `memory_bytes`.

    Returns the points by memory, with the Pareto front of speed against memory marked.
    """
    points: dict[tuple[str, int, int, str], TunedSetting] = {}
    for weight_format, costs in costs_of_format.items():
        for step in range(budgets + 1):
            choice = choose_cache(
                memory_bytes * step // budgets,
                costs.block_bytes,
                trace.n_layers,
                trace.n_experts,
                trace.info.top_k,
                costs,
                trace,
            )
            n, m, policy = choice.n_indexes, choice.n_ways, choice.policy
            points[weight_format, n, m, policy] = TunedSetting(
                weight_format,
                n,
                m,
                policy,
                n * m * costs.block_bytes,
                choice.predicted_tokens_per_s,
            )
    ordered = sorted(points.values(), key=lambda point: (point.cache_bytes, -point.tokens_per_s))
    fastest = 0.0
    marked = []
    for point in ordered:
        on_front = point.tokens_per_s > fastest
        fastest = max(fastest, point.tokens_per_s)
        marked.append(replace(point, on_front=on_front))
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


def first_tokens(trace: Trace, n_tokens: int) -> tuple[RoutingPass, ...]:
    """The passes of a trace up to its `n_tokens`th decode pass."""
    kept, left = [], n_tokens
    for one in trace.passes:
        kept.append(one)
        left -= one.phase == "decode"
        if not left:
            break
    return tuple(kept)


def _speeds(passes: Iterable[RoutingPass], costs: CostModel) -> Callable[[int, int, str], float]:
    def tokens_per_s(n_indexes: int, n_ways: int, policy: str) -> float:
        cache = ExpertCache(n_indexes, n_ways, make_policy(policy))
        result = replay(passes, cache, timeline=Timeline(costs))
        return result.n_decode_tokens / result.decode_us * 1e6

    return tokens_per_s


def _best(tried: list[tuple[_Key, float]]) -> tuple[_Key, float]:
    """The first that no later one beats by a worthwhile margin."""
    best = tried[0]
    for one in tried[1:]:
        if one[1] > best[1] * WORTHWHILE:
            best = one
    return best
