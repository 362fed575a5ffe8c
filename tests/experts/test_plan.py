"""Plans, by table: who computes what, before any tensor moves."""

from __future__ import annotations

import pytest

from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.plan import Plan, Trial, plan_decode, plan_prefill


def costs(cpu_expert_us: float, gpu_expert_us: float, copy_us: float) -> CostModel:
    """A block is 1000 bytes, so that `copy_us` is its copy at 1 / copy_us bytes per ns."""
    gbps = 1000 / copy_us / 1e3
    return CostModel(
        cpu=SideCost(0, cpu_expert_us, cpu_expert_us / 4),
        gpu=SideCost(0, gpu_expert_us, gpu_expert_us / 100),
        copy_call_us=0,
        copy_gbps=gbps,
        copy_gbps_shared=gbps,
        cpu_shared_factor=1,
        block_bytes=1000,
        dense_us_per_layer=0,
    )


FAST_BUS = costs(cpu_expert_us=100, gpu_expert_us=1, copy_us=10)
SLOW_BUS = costs(cpu_expert_us=100, gpu_expert_us=1, copy_us=1000)


@pytest.mark.parametrize(
    ("mode", "model", "expected"),
    [
        ("cpu", None, Plan({3: 7}, (), (5, 1))),
        ("cpu", FAST_BUS, Plan({3: 7}, (), (5, 1))),
        ("fetch", None, Plan({3: 7}, (5, 1), ())),
        ("costs", SLOW_BUS, Plan({3: 7}, (), (5, 1))),
        ("costs", FAST_BUS, Plan({3: 7}, (5, 1), ())),
    ],
)
def test_decode(mode: str, model: CostModel | None, expected: Plan) -> None:
    counts = {5: 1, 3: 1, 1: 1}
    assert plan_decode(counts, [-1, 7, -1], mode, model) == expected  # type: ignore[arg-type]


def test_a_full_copy_queue_leaves_misses_to_the_cpu() -> None:
    waiting = plan_decode({5: 1}, [-1], "costs", FAST_BUS, backlog_us=0)
    assert waiting.waited == (5,)
    queued = plan_decode({5: 1}, [-1], "costs", FAST_BUS, backlog_us=10_000)
    assert (queued.waited, queued.cpu) == ((), (5,))


def test_prefill_without_costs_follows_the_policy() -> None:
    assert plan_prefill([2, 0, 1], {0: 4, 1: 5}, "cpu", None) == Plan({0: 4}, (), (2,))
    assert plan_prefill([2, 0, 1], {0: 4}, "fetch", FAST_BUS) == Plan({0: 4}, (2,), ())


def test_a_short_prompt_does_not_stream_the_model() -> None:
    plan = plan_prefill([1, 1, 0, 1], {}, "cpu", SLOW_BUS)
    assert (plan.waited, plan.cpu) == ((), (0, 1, 3))


def test_a_long_prompt_does_not_wait_for_the_cpu() -> None:
    plan = plan_prefill([500, 400, 0, 1], {}, "cpu", SLOW_BUS)
    assert set(plan.waited) >= {0, 1}
    assert set(plan.waited) | set(plan.cpu) == {0, 1, 3}


def test_copies_queued_before_a_prompts_layer_delay_its_own() -> None:
    free = plan_prefill([4, 4], {}, "cpu", FAST_BUS)
    assert set(free.waited) == {0, 1}
    queued = plan_prefill([4, 4], {}, "cpu", FAST_BUS, backlog_us=10_000)
    assert (queued.waited, queued.cpu) == ((), (0, 1))


def test_every_chosen_expert_is_planned_once() -> None:
    counts = [3, 0, 9, 1, 0, 200, 4, 7]
    for model in (FAST_BUS, SLOW_BUS, None):
        for mode in ("cpu", "fetch", "costs"):
            plan = plan_prefill(counts, {2: 0, 4: 1}, mode, model)  # type: ignore[arg-type]
            planned = [*plan.hits, *plan.waited, *plan.cpu]
            assert sorted(planned) == [e for e, n in enumerate(counts) if n]


@pytest.mark.parametrize(("first_s", "second_s"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_trial_keeps_the_faster(first_s: float, second_s: float) -> None:
    trial = Trial()
    ways = []
    for _ in range(100):
        ways.append(trial.is_first)
        trial.record(first_s if trial.is_first else second_s)
    assert ways[:4] == [False] * 4
    assert {True, False} <= set(ways[:36])
    assert set(ways[36:]) == {first_s < second_s}
    kept = "this" if first_s < second_s else "that"
    assert trial.line("it", "this", "that").startswith(f"it: kept {kept} (median step ")


def test_an_unfinished_trial_says_so() -> None:
    trial = Trial()
    trial.record(1.0)
    assert "undecided after 1" in trial.line("it", "this", "that")
