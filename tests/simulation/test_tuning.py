"""The tuner against trying every N x M, and its answers at the edges."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_offload.errors import UserError
from moe_offload.experts.cache import ExpertCache, make_policy
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.simulation.replay import Timeline, replay
from moe_offload.simulation.tuning import choose_cache, first_tokens, layouts, tune
from moe_offload.simulation.workload import even_workload

BLOCK = 1_000_000
COSTS = CostModel(
    cpu=SideCost(20, 500, 80),
    gpu=SideCost(10, 30, 10),
    copy_call_us=5,
    copy_gbps=2,
    copy_gbps_shared=1.8,
    cpu_shared_factor=1.1,
    block_bytes=BLOCK,
    dense_us_per_layer=100,
)
TRACE = even_workload(4, 8, 2, overlap=0.4).generate(80, seed=2, n_prompt_tokens=8)


def choose(n_slots: int, costs: CostModel = COSTS, trace=TRACE):
    return choose_cache(n_slots * BLOCK + BLOCK // 2, 4, 8, 2, costs, trace)


def speed(n_indexes: int, n_ways: int, policy: str = "LRU", quota: int = 64) -> float:
    passes = first_tokens(TRACE, 64)
    cache = ExpertCache(n_indexes, n_ways, make_policy(policy))
    result = replay(passes, cache, quota, Timeline(COSTS))
    return result.n_decode_tokens / result.decode_us * 1e6


@pytest.mark.parametrize("n_slots", [1, 3, 8, 13, 20, 31])
def test_nothing_that_fits_is_much_faster(n_slots):
    choice = choose(n_slots)
    cache = choice.cache
    assert cache.n_slots <= n_slots
    every = [(n, m) for n in range(1, 5) for m in range(1, 9) if n * m <= n_slots]
    fastest = max(speed(n, m) for n, m in every)
    assert choice.tokens_per_s >= 0.97 * fastest
    assert choice.tokens_per_s == speed(cache.n_indexes, cache.n_ways, cache.policy, cache.quota)


def test_the_more_a_copy_costs_the_cpu_the_fewer_are_begun():
    """Never more than allowed; the first ones are worth it still."""
    slowed = choose(12, replace(COSTS, cpu_shared_factor=1.5))
    assert choose(12).cache.quota == 64 > slowed.cache.quota > 0
    assert choose_cache(12 * BLOCK, 4, 8, 2, COSTS, TRACE, quota=3).cache.quota <= 3


def test_room_for_everything_caches_everything():
    choice = choose(1000)
    assert (choice.cache.n_indexes, choice.cache.n_ways) == (4, 8)
    assert "32 of 32 slots" in choice.reason and TRACE.info.model in choice.reason


def test_no_room_or_no_gain_is_no_cache_and_says_why():
    assert choose(0).cache.n_indexes == 0
    assert "not one expert fits" in choose(0).reason
    slow_gpu = replace(COSTS, gpu=SideCost(10, 9000, 10))
    choice = choose(8, slow_gpu)
    assert (choice.cache.n_indexes, choice.cache.n_ways) == (0, 0)
    assert "no cache" in choice.reason


def test_an_absent_accelerator_is_never_chosen():
    infinite = float("inf")
    absent = replace(
        COSTS, gpu=SideCost(0, infinite, 0), copy_call_us=0, copy_gbps=1e-9, copy_gbps_shared=1e-9
    )
    assert choose(8, absent).cache.n_indexes == 0


def test_without_a_trace_routing_is_made_up_and_called_so():
    choice = choose_cache(12 * BLOCK, 4, 8, 2, COSTS)
    assert choice.cache.n_indexes > 0
    assert "synthetic" in choice.reason
    assert choice == choose_cache(12 * BLOCK, 4, 8, 2, COSTS)


def test_a_trace_of_another_model_is_refused():
    with pytest.raises(UserError, match="trace of 5 layers and at most 8 experts, found 4 and 8"):
        choose_cache(12 * BLOCK, 5, 8, 2, COSTS, TRACE)


@given(n_slots=st.integers(1, 700), n_layers=st.integers(1, 48), n_experts=st.integers(1, 128))
def test_layouts_fit_and_leave_little_unused(n_slots, n_layers, n_experts):
    n_slots = min(n_slots, n_layers * n_experts)
    tried = list(layouts(n_slots, n_layers, n_experts))
    assert tried and len(tried) == len(set(tried)) <= 30
    for n_indexes, n_ways in tried:
        assert 1 <= n_indexes <= n_layers and 1 <= n_ways <= n_experts
        assert n_indexes * n_ways <= n_slots
        assert n_indexes == min(n_layers, n_slots // n_ways)
    assert max(n * m for n, m in tried) >= 0.5 * n_slots


def test_the_front_is_what_nothing_dominates():
    small = replace(COSTS, block_bytes=BLOCK // 2, cpu=SideCost(20, 250, 80))
    points = tune(TRACE, 16 * BLOCK, {"bf16": COSTS, "int8": small})
    assert {point.weight_format for point in points} == {"bf16", "int8"}
    for point in points:
        assert point.cache_bytes <= 16 * BLOCK
        dominated = any(
            other is not point
            and other.cache_bytes <= point.cache_bytes
            and other.tokens_per_s >= point.tokens_per_s
            for other in points
        )
        assert point.on_front != dominated
    assert points[0].cache.n_indexes == 0
