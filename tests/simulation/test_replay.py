"""Replays against a step-by-step retelling of the engine, and the clock against hand arithmetic."""

import random
from dataclasses import replace

import pytest

from moe_offload.experts.cache import ExpertCache, HitCounts, make_policy
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.plan import plan_prefill
from moe_offload.simulation.replay import Timeline, bound_us, prefetch_step_us, replay
from moe_offload.simulation.traces import RoutingPass
from moe_offload.simulation.workload import even_workload

UNLIMITED = 10**9


def passes_of(n_layers: int, n_tokens: int, n_experts=8, top_k=2, prompt=5, seed=3):
    workload = even_workload(n_layers, n_experts, top_k)
    return tuple(workload.generate(n_tokens, seed, prompt).passes)


def engine_hits(passes, n_indexes, n_ways, policy, quota) -> list[list[int]]:
    """The engine's sequence with instant copies, spelled out on the directory's smallest calls."""
    cache = ExpertCache(n_indexes, n_ways, make_policy(policy))
    rows = []
    for number, one in enumerate(passes):
        fetched, row = 0, []
        for layer in range(min(n_indexes, len(one.ids))):
            started = []
            each, over = divmod(quota - fetched, n_indexes - layer)
            share = each + ((layer + number + 1) * over % (n_indexes - layer) < over)
            if one.phase == "prefill":
                wanted: list[int] = []
                for token in one.ids[layer][::-1]:
                    wanted += [e for e in token if e not in wanted]
                wanted = wanted[:n_ways]
                chosen = [e for token in one.ids[layer] for e in token]
                row.append(sum(cache.slot_of(layer, e) is not None for e in chosen))
                cache.protect(layer, wanted)
                absent = [e for e in wanted if cache.slot_of(layer, e) is None]
                absent = absent[:share]
                for expert in wanted[::-1]:
                    slot = cache.slot_of(layer, expert)
                    if expert in absent:
                        started.append(cache.admit(layer, expert))
                    elif slot is not None:
                        cache.policy.hit(slot)
                fetched += len(started)
            else:
                (token,) = one.ids[layer]
                most = fetched + share
                slots = cache.lookup(layer, token)
                row.append(sum(slot >= 0 for slot in slots))
                for expert, slot in zip(token, slots, strict=True):
                    if slot < 0 and fetched < most:
                        admitted = cache.admit(layer, expert)
                        if admitted is not None:
                            started.append(admitted)
                            fetched += 1
            cache.end_step(layer)
            for slot in started:
                cache.mark_ready(slot)
        rows.append(row)
    return rows


@pytest.mark.parametrize("policy", ["FIFO", "LRU", "LFU", "LFRU", "RANDOM"])
@pytest.mark.parametrize(("n_indexes", "n_ways"), [(4, 3), (2, 8), (4, 1), (0, 0), (6, 4)])
@pytest.mark.parametrize("quota", [0, 1, 5, UNLIMITED])
def test_hits_of_each_pass_and_layer_are_the_engines(policy, n_indexes, n_ways, quota):
    passes = passes_of(n_layers=4, n_tokens=60) + passes_of(n_layers=4, n_tokens=30, seed=9)
    result = replay(
        passes, ExpertCache(n_indexes, n_ways, make_policy(policy)), quota, keep_layers=True
    )
    expected = engine_hits(passes, n_indexes, n_ways, policy, quota)
    assert result.hits_by_layer == expected
    assert result.decode.hits + result.prefill.hits == sum(map(sum, expected))
    assert result.n_decode_tokens == result.n_decode_passes == 90


def rates(hits: HitCounts) -> tuple[float, float, float]:
    return (hits.at_least_one_percent, hits.at_least_two_percent, hits.per_expert_percent)


def test_rates_of_a_hand_worked_trace():
    decode = [((0, 1),), ((0, 2),), ((0, 2),), ((3, 4),)]
    passes = [RoutingPass("decode", (tokens,)) for tokens in decode]
    result = replay(passes, ExpertCache(1, 4, make_policy("LRU")))
    # Hits 0, 1, 2, 0 of 2 each.
    assert result.decode == HitCounts(4, at_least_one=2, at_least_two=1, hits=3, misses=5)
    assert rates(result.decode) == (50.0, 25.0, 37.5)
    assert (result.looked_up, result.found, result.found_percent) == (8, 3, 37.5)
    assert (result.fetches, result.evictions) == (5, 1)
    assert rates(HitCounts()) == (0, 0, 0)


def test_prompts_count_apart_and_warm_the_cache():
    prompt = RoutingPass("prefill", (((0, 1), (2, 3)),))
    result = replay(
        [prompt, prompt, RoutingPass("decode", (((2, 3),),))], ExpertCache(1, 2, make_policy("LRU"))
    )
    assert result.decode.hits == 2
    assert (result.prefill.pairs, result.prefill.at_least_two, result.prefill.hits) == (4, 1, 2)
    assert result.fetches == 2


def test_a_batch_looks_each_expert_up_once_and_counts_by_token():
    batch = RoutingPass("decode", (((0, 1), (0, 2), (3, 4)),))
    cache = ExpertCache(1, 3, make_policy("LRU"))
    result = replay([batch, batch], cache, keep_layers=True)
    assert cache.hits + cache.misses == 2 * 5
    assert cache.hits == 3  # 0, 1 and 2 were admitted first
    assert result.hits_by_layer == [[0], [4]]  # tokens found 2, 2 and 0 of theirs
    assert result.decode.at_least_two == 2
    assert (result.decode.hits, result.decode.misses) == (4, 8)
    assert (result.looked_up, result.found) == (10, 3)
    assert rates(result.decode) == (100 * 2 / 6, 100 * 2 / 6, 100 * 4 / 12)  # the engine's unit
    assert result.found_percent == 30.0
    assert result.n_decode_tokens == 6 and result.n_decode_passes == 2


COSTS = CostModel(
    cpu=SideCost(20, 500, 80),
    gpu=SideCost(10, 30, 10),
    copy_call_us=0,
    copy_gbps=1,
    copy_gbps_shared=0.5,
    cpu_shared_factor=2.0,
    block_bytes=1_000_000,  # a copy takes 1000 us alone, 2000 us beside the CPU
    dense_us_per_layer=100,
)


def test_one_layer_takes_the_slower_side():
    timeline = Timeline(COSTS)
    timeline.pass_dense()
    timeline.pass_experts(gpu_experts=1, cpu_experts=1, slots=[])
    assert timeline.now_us == 100 + 600
    timeline.pass_experts(gpu_experts=2, cpu_experts=0, slots=[])
    assert timeline.now_us == 700 + 90
    assert (timeline.busy.cpu_us, timeline.busy.gpu_us) == (600, 100 + 50 + 90)


def test_the_cpus_sum_comes_past_a_copy_that_is_under_way():
    timeline = Timeline(replace(COSTS, sum_wait_us=50))
    timeline.pass_experts(0, 1, slots=[])
    assert timeline.now_us == 600
    timeline.pass_experts(0, 1, slots=[7])
    assert timeline.now_us == 600 + 1200 + 50
    timeline.pass_experts(1, 0, slots=[])
    assert timeline.now_us == 1850 + 50
    assert timeline.busy.cpu_us == 600 + 1200


def test_copies_go_on_across_layers_and_slow_the_cpu():
    timeline = Timeline(COSTS)
    timeline.pass_experts(0, 1, slots=[7])  # 600 of CPU work takes 1200 beside the copy
    assert timeline.now_us == 1200
    assert timeline.arrived() == []  # 1200 / 2000 of the copy done, 400 us left alone
    timeline.pass_dense()
    timeline.pass_dense()
    timeline.pass_dense()
    assert timeline.arrived() == []
    timeline.pass_dense()
    assert timeline.arrived() == [7]
    assert timeline.arrived() == []
    timeline.pass_experts(0, 1, slots=[])
    assert timeline.now_us == 1200 + 400 + 600
    assert timeline.busy.copy_us == pytest.approx(1600)


def test_a_copy_that_ends_gives_the_cpu_its_speed_back():
    timeline = Timeline(COSTS)
    timeline.queue([1, 2])
    timeline.pass_experts(0, 8, slots=[])  # 20 + 8 * 580 = 4660: 2000 done beside two copies
    assert timeline.now_us == pytest.approx(4000 + 2660)
    assert timeline.arrived() == [1, 2]


def test_a_gpu_and_its_bus_know_nothing_of_each_other():
    timeline = Timeline(replace(COSTS, gpu=SideCost(10, 300, 10)))
    timeline.queue([4])
    timeline.pass_dense()
    timeline.pass_experts(2, 0, slots=[])
    assert timeline.now_us == 100 + 630 and timeline.busy.copy_us == 730
    assert timeline.arrived() == []


def test_every_pass_takes_its_head_once():
    passes = passes_of(n_layers=3, n_tokens=4)
    cache = ExpertCache(1, 2, make_policy("LRU"))
    without, found = (
        replay(passes, cache, quota=0, timeline=Timeline(replace(COSTS, step_us=us)))
        for us in (0, 5000)
    )
    assert found.decode_us == pytest.approx(without.decode_us + 4 * 5000)
    assert found.prefill_us == pytest.approx(without.prefill_us + 5000)
    costs = replace(COSTS, step_us=5000)
    assert bound_us(costs, 3, 6, 0) == bound_us(COSTS, 3, 6, 0) + 5000
    assert prefetch_step_us(costs, 3, 2) == prefetch_step_us(COSTS, 3, 2) + 5000


def test_a_prompts_layer_waits_for_the_copies_it_computes():
    # 40 tokens on experts 0 and 1: the CPU needs 20 + 500 + 3200 for each, a copy 1000.
    timeline = Timeline(COSTS)
    timeline.queue([5])  # left over from the layer before
    plan = plan_prefill([40, 40, 0, 1], {}, "cpu", COSTS, timeline.backlog_us)
    timeline.pass_prefill(plan, [40, 40, 0, 1], warmed=[(3, 6), (0, 7)], in_flight={})
    assert plan.waited == (0, 1) and plan.cpu == (3,)
    # CPU: 600 us, 1200 beside the copies, in which 600 us of copying pass; 2400 are left to wait
    # for. Then the last expert's arithmetic, 10 + 30 + 400, while the copy into 6 begins.
    assert timeline.now_us == pytest.approx(1200 + 2400 + 440)
    assert timeline.arrived() == [5, 7]  # expert 1 went to staging
    timeline.pass_experts(13, 0, slots=[])  # 530 of the 560 left
    assert timeline.arrived() == []
    timeline.pass_experts(1, 0, slots=[])
    assert timeline.arrived() == [6]


@pytest.mark.parametrize("n_queued", range(6))
@pytest.mark.parametrize("us_passed", [0, 900])
def test_a_prompt_is_split_behind_the_dispatchers_backlog(n_queued, us_passed):
    """A queued copy counts whole, and at its speed beside the CPU, as `Accelerator.backlog_us`."""
    costs = replace(COSTS, cpu=SideCost(0, 900, 30), cpu_shared_factor=1.3)
    timeline = Timeline(replace(costs, dense_us_per_layer=us_passed))
    timeline.queue(range(n_queued))
    timeline.pass_dense()
    assert timeline.backlog_us == n_queued * costs.copy_us(shared=True)


def test_a_prompt_copies_no_expert_that_is_on_its_way():
    counts = [40, 40, 0, 1]
    timeline = Timeline(COSTS)
    timeline.queue([4, 5, 6])  # experts 0 and 1 to slots 4 and 5, another layer's to 6
    plan = plan_prefill(counts, {}, "cpu", COSTS, timeline.backlog_us)
    assert plan.waited == (0, 1) and plan.cpu == (3,)
    timeline.pass_prefill(plan, counts, warmed=(), in_flight={0: 4, 1: 5})
    # As above, but for the first two copies alone: 600 us of copying pass beside the CPU, 1400
    # after it; then the last expert's arithmetic, in which 440 us pass of the copy into 6.
    assert timeline.now_us == pytest.approx(1200 + 1400 + 440)
    assert timeline.arrived() == [4, 5]
    timeline.pass_experts(13, 0, slots=[])  # 530 of the 560 left
    assert timeline.arrived() == []
    timeline.pass_experts(1, 0, slots=[])
    assert timeline.arrived() == [6]
    assert timeline.busy.copy_us == pytest.approx(1200 + 1400 + 1000)  # three copies


def test_a_replayed_prompt_finds_the_copies_of_the_prompt_before():
    prompt = RoutingPass("prefill", (((0,),) * 40 + ((1,),) * 40,))
    timeline = Timeline(COSTS)
    cache = ExpertCache(1, 2, make_policy("LRU"))
    assert cache.admit(0, 0) == 0
    timeline.queue([0])  # begun, and nothing has waited for it
    replay([prompt], cache, 64, timeline)
    timeline.pass_experts(0, 100, slots=[])
    assert sorted(timeline.arrived()) == [0, 1]  # one copy for each expert
    assert timeline.busy.copy_us == pytest.approx(2000)


def test_latency_never_adds_hits_and_agrees_with_instant_copies_when_it_vanishes():
    passes = passes_of(n_layers=4, n_tokens=80, prompt=0)
    instant = replay(passes, ExpertCache(4, 4, make_policy("LRU")), 64)
    quick = CostModel(**{**COSTS.__dict__, "copy_gbps": 1e6, "copy_gbps_shared": 1e6})
    no_latency = replay(passes, ExpertCache(4, 4, make_policy("LRU")), 64, Timeline(quick))
    assert no_latency.decode == instant.decode
    slow = CostModel(**{**COSTS.__dict__, "copy_gbps": 0.02, "copy_gbps_shared": 0.02})
    late = replay(passes, ExpertCache(4, 4, make_policy("LRU")), 64, Timeline(slow))
    assert late.decode.hits < 0.5 * instant.decode.hits
    assert late.decode_us > no_latency.decode_us


def test_without_a_cache_a_step_is_its_layers_on_the_cpu():
    passes = passes_of(n_layers=3, n_tokens=5, prompt=0)
    result = replay(passes, ExpertCache(0, 0, make_policy("LRU")), 64, Timeline(COSTS))
    assert result.decode_us == pytest.approx(5 * 3 * (100 + 20 + 2 * 580))
    assert result.fetches == 0


def test_prefetching_is_as_fast_as_the_slower_of_bus_and_compute():
    assert prefetch_step_us(COSTS, n_layers=3, top_k=2) == 3 * 2000
    quick = CostModel(**{**COSTS.__dict__, "copy_gbps": 1e6})
    assert prefetch_step_us(quick, n_layers=3, top_k=2) == 3 * (100 + 90)


def test_no_replay_is_faster_than_the_bound():
    rng = random.Random(5)
    for _ in range(20):
        costs = CostModel(
            **{
                **COSTS.__dict__,
                "copy_gbps": rng.choice([0.2, 1, 20]),
                "copy_gbps_shared": 0.2,
                "dense_us_per_layer": rng.choice([1, 100, 3000]),
            }
        )
        passes = passes_of(n_layers=4, n_tokens=40, prompt=0, seed=rng.randrange(100))
        cache = ExpertCache(4, rng.randint(1, 8), make_policy("LFU"))
        result = replay(passes, cache, 64, Timeline(costs))
        hits = result.decode.hits / 40
        assert result.decode_us >= 40 * bound_us(costs, 4, hits, 8 - hits)
