"""Belady's optimum against exhaustive search, and no policy above it."""

import functools
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.config import CacheOptions
from moe_offload.experts.cache import POLICIES, ExpertCache, make_policy
from moe_offload.simulation.replay import most_hits, replay
from moe_offload.simulation.traces import NEVER, Routing, RoutingPass, Trace, TraceInfo
from moe_offload.simulation.tuning import run_setting, sweep

UNLIMITED = 10**9


def decode_passes(steps: list[list[int]]) -> tuple[RoutingPass, ...]:
    """One layer, one token a pass."""
    return tuple(RoutingPass("decode", ((tuple(experts),),)) for experts in steps)


def hits_of(policy, passes, n_ways: int) -> int:
    return replay(passes, ExpertCache(1, n_ways, policy), UNLIMITED).decode.hits


def exhaustive(steps: list[list[int]], n_ways: int) -> int:
    """The most hits over every choice of what to keep after each step."""

    @functools.cache
    def best(number: int, held: frozenset[int]) -> int:
        if number == len(steps):
            return 0
        chosen = frozenset(steps[number])
        hits = len(held & chosen)
        union = sorted(held | chosen)
        kept = itertools.combinations(union, min(n_ways, len(union)))
        return hits + max(best(number + 1, frozenset(k)) for k in kept)

    return best(0, frozenset())


def distinct_pairs(n_experts: int, max_steps: int, top_k: int):
    step = st.lists(st.integers(0, n_experts - 1), min_size=top_k, max_size=top_k, unique=True)
    return st.lists(step, min_size=1, max_size=max_steps)


SMALL = distinct_pairs(n_experts=5, max_steps=7, top_k=2)


@settings(max_examples=150, deadline=None)
@given(steps=SMALL, n_ways=st.integers(1, 4))
def test_the_optimum_equals_exhaustive_search(steps, n_ways):
    assert most_hits(Routing(decode_passes(steps)), 1, n_ways) == exhaustive(steps, n_ways)


def next_use_by_walking(passes, layer: int, expert: int, place: int) -> int:
    """One id after the other."""
    ids = [e for one in passes if one.phase == "decode" for token in one.ids[layer] for e in token]
    return next((at for at, other in enumerate(ids) if at >= place and other == expert), NEVER)


@settings(max_examples=100, deadline=None)
@given(
    layers=st.lists(
        st.lists(distinct_pairs(n_experts=6, max_steps=3, top_k=2), min_size=12, max_size=12),
        min_size=1,
        max_size=3,
    ),
    shift=st.sampled_from([0, 254, 300]),
    kinds=st.lists(st.sampled_from(["decode", "decode", "prefill"]), min_size=12, max_size=12),
    expert=st.integers(0, 6),
)
def test_the_search_through_bytes_finds_what_a_walk_finds(layers, shift, kinds, expert):
    passes = []
    for number, kind in enumerate(kinds):
        n_tokens = min(len(of_layer[number]) for of_layer in layers)
        ids = tuple(
            tuple(tuple(e + shift for e in token) for token in of_layer[number][:n_tokens])
            for of_layer in layers
        )
        passes.append(RoutingPass(kind, ids))
    routing = Routing(passes)
    for layer, place in itertools.product(range(len(layers)), range(0, 30, 3)):
        found = routing.next_use(layer, expert + shift, place)
        assert found == next_use_by_walking(passes, layer, expert + shift, place)


def test_a_hand_worked_case():
    # Two ways. 0 and 1 come back, 2 does not: LRU lets it push them out all the same.
    steps = [[0], [1], [2], [0], [1]]
    passes = decode_passes(steps)
    assert most_hits(Routing(passes), 1, 2) == 2
    assert hits_of(make_policy("LRU"), passes, 2) == 0


@settings(max_examples=150, deadline=None)
@given(
    batches=st.lists(distinct_pairs(n_experts=8, max_steps=4, top_k=3), min_size=1, max_size=30),
    prompt=distinct_pairs(n_experts=8, max_steps=6, top_k=3),
    n_ways=st.integers(1, 8),
    quota=st.sampled_from([0, 1, 2, UNLIMITED]),
)
def test_no_policy_beats_the_optimum_in_batches(batches, prompt, n_ways, quota):
    passes = (
        RoutingPass("prefill", (tuple(map(tuple, prompt)),)),
        *(RoutingPass("decode", (tuple(map(tuple, tokens)),)) for tokens in batches),
    )
    info = TraceInfo("batched", n_layers=1, top_k=3, n_experts=8)
    trace = Trace(info, Routing(passes))
    for policy in POLICIES:
        cache = CacheOptions(1, n_ways, quota=quota, policy=policy)
        result = run_setting(trace, cache)
        assert result.found <= result.most_hits, policy
        (row,) = sweep(trace, [cache])
        assert row.hit_expert <= row.bound_bypass <= 100, policy


def test_a_batch_counts_an_expert_once():
    # Two sequences that agree: with one way the optimum keeps one of their two experts.
    batch = RoutingPass("decode", (((0, 1), (0, 1)),))
    trace = Trace(TraceInfo("batched", 1, 2, 8), Routing([batch] * 5))
    (row,) = sweep(trace, [CacheOptions(1, 1)])
    assert row.bound_bypass == pytest.approx(100 * 4 / 10)
    assert row.hit_expert == row.all_hits == pytest.approx(40)  # 0 is fetched first, and stays
    assert row.hit_one == pytest.approx(80)


def test_layers_are_bounded_one_by_one():
    passes = Routing(RoutingPass("decode", (((0, 1),), ((0, 1),), ((2, 3),))) for _ in range(4))
    assert most_hits(passes, 3, 2) == 3 * 3 * 2
    assert most_hits(passes, 1, 2) == 3 * 2
    assert most_hits(passes, 3, 1) == 3 * 3
    assert most_hits(passes, 0, 2) == 0
