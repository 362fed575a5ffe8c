"""The cost model against hand arithmetic and against trying every assignment."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_offload.experts.costs import CostModel, DiskCost, SideCost

# Round numbers: a copy takes 10 + 1000 us alone and 10 + 2000 us beside the CPU.
COST = CostModel(
    cpu=SideCost(call_us=20, expert_us=600, token_us=100),
    gpu=SideCost(call_us=15, expert_us=50, token_us=1),
    copy_call_us=10,
    copy_gbps=10,
    copy_gbps_shared=5,
    cpu_shared_factor=1.5,
    block_bytes=10_000_000,
    dense_us_per_layer=70,
)


def test_one_side_is_a_straight_line_and_nothing_costs_nothing():
    assert COST.cpu.us(2, 5) == 20 + 2 * 600 + 5 * 100
    assert COST.cpu.us(0, 0) == COST.cpu.us_of([]) == 0
    assert COST.cpu.us_of([1, 4]) == COST.cpu.us(2, 5)
    assert COST.copy_us(shared=False) == 1010
    assert COST.copy_us(shared=True) == 2010


def copied_of(
    cost: CostModel, counts: Sequence[int], cached: Collection[int] = ()
) -> tuple[int, ...]:
    """Of a prompt with `counts[e]` tokens on expert e."""
    chosen = {e: n for e, n in enumerate(counts) if n}
    missed = {e: n for e, n in chosen.items() if e not in cached}
    return cost.split({e: n for e, n in chosen.items() if e in cached}, missed)


def layer_us(
    cost: CostModel, counts: Sequence[int], cached: Collection[int], copied: Collection[int]
) -> float:
    """The time of a layer whose `copied` experts the GPU computes beside the cached ones."""
    chosen = [e for e, n in enumerate(counts) if n]
    on_cpu = [counts[e] for e in chosen if e not in cached and e not in copied]
    on_gpu = [counts[e] for e in chosen if e in cached or e in copied]
    cpu_us, copies_us = cost.overlap_us(cost.cpu_us(on_cpu), len(copied))
    gpu_us = cost.gpu.us_of(on_gpu)
    if copied:
        gpu_us = max(gpu_us, copies_us + cost.gpu.us(1, min(counts[e] for e in copied)))
    return max(gpu_us, cpu_us)


def test_the_cpus_sum_waits_for_a_copy_under_way():
    """As a card without mapped memory has it: it is sent behind a part of an expert."""
    waiting = replace(COST, sum_wait_us=300)
    for n_misses, copying, n_waited, later_us in (
        (2, True, 0, 300), (2, False, 0, 0), (0, True, 0, 0), (0, False, 1, 0),
    ):  # fmt: skip
        layer = 1, n_misses, copying, n_waited
        assert waiting.decode_layer_us(*layer) == COST.decode_layer_us(*layer) + later_us
    hidden = waiting.decode_layer_us(1, 1, copying=False, n_waited=3)
    assert hidden == COST.decode_layer_us(1, 1, copying=False, n_waited=3)  # by its own copies
    with pytest.raises(ValueError, match="no machine"):
        replace(COST, sum_wait_us=-1)


def test_few_tokens_cost_what_was_measured_and_many_a_straight_line():
    side = SideCost(20, 200, 10, few=((1, 600.0), (5, 700.0), (50, 700.0)))
    assert [side.one_us(n) for n in (1, 2, 5, 20, 50, 100)] == [600, 625, 700, 700, 700, 1200]
    assert side.us(2, 2) == 20 + 2 * 600
    assert side.us_of([1, 2, 100]) == 20 + 600 + 625 + 1200
    cost = replace(COST, cpu=side)
    assert cost.decode_layer_us(0, 2, copying=False) == 70 + 20 + 2 * 600
    assert cost.cpu_us([1, 2]) == 20 + 600 + 625


def test_decode_layer_overlaps_its_sides():
    assert COST.decode_layer_us(2, 0, copying=False) == 70 + 15 + 2 * 51
    assert COST.decode_layer_us(1, 1, copying=False) == 70 + 720  # max, not the sum
    assert COST.decode_layer_us(0, 2, copying=True) == 70 + 1.5 * 1420
    assert COST.decode_layer_us(0, 2, copying=False) == 70 + 1420


def test_decode_layer_waits_for_copies_one_behind_the_other():
    # Two copies of 1010 alone on the bus, and the last one's arithmetic of 66.
    assert COST.decode_layer_us(0, 0, copying=True, n_waited=2) == 70 + 2020 + 66
    # Beside them hits (66) are hidden, and so is a CPU that ends before the copy at 2010.
    assert COST.decode_layer_us(1, 1, copying=True, n_waited=1) == pytest.approx(
        70 + COST.overlap_us(720, 1)[1] + 66
    )
    # A CPU with more to do than the bus decides.
    assert COST.decode_layer_us(0, 6, copying=True, n_waited=1) == pytest.approx(
        70 + COST.overlap_us(COST.cpu.us(6, 6), 1)[0]
    )


def test_a_gpu_goes_on_at_its_own_pace_beside_the_cpu_and_copies():
    # One hit's 66 us, or 20 hits' 1035, hide behind the CPU beside a copy; 30 hits' do not.
    assert COST.decode_layer_us(1, 1, copying=True) == 70 + 720 * COST.cpu_shared_factor
    assert COST.decode_layer_us(20, 1, copying=True) == 70 + max(15 + 20 * 51, 720 * 1.5)
    assert COST.decode_layer_us(30, 1, copying=True) == 70 + 15 + 30 * 51


def test_a_layer_ends_when_what_was_read_last_is_computed():
    disk = DiskCost(gbps=COST.block_bytes / 1e6, latency_us=50)  # 1000 us for a block
    cost = replace(COST, disk=disk)
    assert disk.us(0) == 0
    assert cost.decode_layer_us(0, 2, copying=False, n_reads=0) == 70 + 1420
    assert cost.decode_layer_us(0, 2, copying=False, n_reads=2) == 70 + 50 + 2000 + 720
    assert cost.decode_layer_us(0, 20, copying=False, n_reads=1) == 70 + COST.cpu.us(20, 20)
    slow = replace(COST, disk=replace(disk, resume_us=30))
    for n_reads, later_us in ((0, 0), (1, 30), (2, 30)):
        one, other = (c.decode_layer_us(0, 2, copying=False, n_reads=n_reads) for c in (cost, slow))
        assert other == one + later_us
    with pytest.raises(ValueError, match="a disk that no machine has"):
        DiskCost(0.0, 1.0)


def test_sharing_slows_both_sides_only_while_both_run():
    assert COST.overlap_us(900, 0) == (900, 0)
    assert COST.overlap_us(0, 2) == (0, 2020)
    # Copies end first, after 2010: the CPU has done 2010 / 1.5 = 1340 of 3000 by then.
    assert COST.overlap_us(3000, 1) == pytest.approx((2010 + 1660, 2010))
    # The CPU ends first, after 1.5 * 600 = 900: half of the copies' time left is then saved.
    assert COST.overlap_us(600, 2) == pytest.approx((900, 900 + (4020 - 900) * 1010 / 2010))


def test_short_prompts_stay_off_the_bus_and_long_ones_use_both_sides():
    assert copied_of(COST, [1, 0, 1]) == ()  # 1420 < one copy
    # CPU for the few tokens of expert 4; 400, 300 and 30 tokens cost 3-40 ms there, a copy 1-2.
    assert copied_of(COST, [400, 30, 300, 0, 2]) == (0, 2, 1)


def test_double_buffering_hides_the_shorter_of_copy_and_compute():
    """Two copies and the last one's arithmetic, 2020 + 5000 us, not 2020 + 10,000."""
    slow_gpu = replace(COST, gpu=SideCost(call_us=0, expert_us=0, token_us=50))
    for cpu_us, copied in ((10_100, (0, 1)), (4_900, (0,))):
        cpu = SideCost(call_us=0, expert_us=cpu_us, token_us=0)
        assert copied_of(replace(slow_gpu, cpu=cpu, cpu_shared_factor=1.0), [100, 100]) == copied


def test_cached_experts_are_computed_where_they_are():
    assert copied_of(COST, [1, 1, 1], cached={1}) == copied_of(COST, [0, 0], cached={0}) == ()
    assert copied_of(COST, [400, 400, 1], cached={1}) == (0,)


def brute_force_us(cost: CostModel, counts: list[int], cached: set[int]) -> float:
    """The best time over every subset of experts to copy."""
    rest = [e for e, n in enumerate(counts) if n and e not in cached]
    return min(
        layer_us(cost, counts, cached, copied)
        for size in range(len(rest) + 1)
        for copied in itertools.combinations(rest, size)
    )


@settings(max_examples=200, deadline=None)
@given(
    counts=st.lists(st.integers(0, 60), min_size=1, max_size=7),
    cached=st.sets(st.integers(0, 6)),
    gbps=st.sampled_from([1.0, 10.0, 300.0]),
    token_us=st.sampled_from([0.5, 20.0, 400.0]),
)
def test_prefill_split_is_within_a_gpu_call_of_the_best_of_all(counts, cached, gbps, token_us):
    cost = replace(
        COST, copy_gbps=gbps, copy_gbps_shared=gbps, cpu=replace(COST.cpu, token_us=token_us)
    )
    copied = copied_of(cost, counts, cached)
    assert all(counts[e] and e not in cached for e in copied)
    best_us, split_us = brute_force_us(cost, counts, cached), layer_us(cost, counts, cached, copied)
    assert best_us <= split_us + 1e-6
    # Fullest-first is exact up to the arithmetic of one expert on the GPU.
    assert split_us <= best_us + cost.gpu.us(1, max(counts)) + 1e-6


def test_experts_with_many_tokens_cost_what_onednn_takes():
    cost = replace(COST, cpu_many=SideCost(0, 500, 30), cpu_many_tokens=64)
    assert cost.cpu_us([3, 63]) == COST.cpu.us(2, 66) == COST.cpu_us([3, 63])
    assert cost.cpu_us([64]) == 500 + 64 * 30
    assert cost.cpu_us([3, 64, 100]) == COST.cpu.us(1, 3) + 2 * 500 + 164 * 30
    # 200 tokens: more by the kernels than a slow copy and the GPU take, less by oneDNN.
    cost = replace(cost, copy_call_us=8000.0)
    assert copied_of(cost, [200]) == ()
    assert copied_of(replace(cost, cpu_many=None), [200]) == (0,)


@given(
    counts=st.lists(st.integers(0, 90), min_size=1, max_size=9),
    limit=st.integers(1, 70),
    gbps=st.sampled_from([1.0, 10.0, 300.0]),
)
def test_a_split_counts_each_expert_left_to_the_cpu_by_its_own_cost(counts, limit, gbps):
    cost = replace(
        COST,
        copy_gbps=gbps,
        copy_gbps_shared=gbps,
        cpu_many=SideCost(0, 500, 30),
        cpu_many_tokens=limit,
    )
    order = sorted((e for e, n in enumerate(counts) if n), key=lambda e: -counts[e])
    best_us = min(layer_us(cost, counts, (), order[:n]) for n in range(len(order) + 1))
    assert layer_us(cost, counts, (), copied_of(cost, counts)) == pytest.approx(best_us)


@pytest.mark.parametrize(
    ("gbps", "backlog_us", "misses", "expected"),
    [
        (4.0, 0.0, [1, 1], [False, False]),  # one copy 2510: the CPU does both in 1420
        (20.0, 0.0, [1, 1], [True, False]),  # copy 510 beside one on the CPU, 1080
        (200.0, 0.0, [1, 1], [True, True]),  # copies 120 in all
        (20.0, 900.0, [1, 1], [True, False]),  # 900 + 510 + 66 < 1420 + 900 / 3
        (20.0, 9000.0, [1, 1], [False, False]),  # the bus is taken
        (20.0, 0.0, [1, 9], [False, True]),  # the fuller expert is the one to copy
        (20.0, 0.0, [], []),
    ],
)
def test_waiting_for_a_copy_must_beat_the_cpu(gbps, backlog_us, misses, expected):
    cost = replace(COST, copy_gbps=gbps, copy_gbps_shared=gbps)
    copied = cost.split({}, dict(enumerate(misses)), backlog_us)
    assert [i in copied for i in range(len(misses))] == expected
