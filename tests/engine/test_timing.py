"""Exact timings give exact cost lines; noise and busy machines are told."""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest

from moe_offload.engine import timing
from moe_offload.engine.timing import (
    MAX_OTHER_LOAD,
    MAX_SPREAD,
    SIDE_CALLS,
    BusyWatch,
    QuietWatch,
    Steadiness,
    calibrate_copy,
    calibrate_side,
    fit_side,
    medians_in_turn_us,
    slowdown,
)
from moe_offload.experts.costs import CostModel, SideCost

COSTS = CostModel(SideCost(0, 1, 1), SideCost(0, 1, 1), 0, 1, 1, 1, 4096, 0)
# Tokens of one expert -> us, as kernels that compute tiles of tokens take them.
STEPS = ((1, 300.0), (4, 310.0), (8, 600.0), (16, 900.0), (32, 1000.0), (128, 4000.0))


def costs_us(cost: SideCost) -> list[float]:
    return [cost.us_of(counts) for counts in SIDE_CALLS]


@pytest.mark.parametrize(
    "cost",
    [
        *(SideCost(20.0, 300.0, 5.0), SideCost(0.0, 300.0, 5.0), SideCost(20.0, 300.0, 0.0)),
        SideCost(20.0, 0.0, 31.25, STEPS),
    ],
)
def test_the_fit_recovers_exact_costs(cost: SideCost) -> None:
    fitted = fit_side(SIDE_CALLS, costs_us(cost))
    assert fitted.call_us == pytest.approx(cost.call_us, abs=1e-6)
    for n_tokens in (1, 2, 4, 8, 12, 16, 32, 100, 128, 1000):
        assert fitted.one_us(n_tokens) == pytest.approx(cost.one_us(n_tokens), rel=1e-9)
    assert fitted.token_us == pytest.approx(cost.token_us, abs=1e-9)


def test_the_fit_bears_noise_and_more_tokens_never_cost_less() -> None:
    rng = random.Random(1)
    for true in (
        *(SideCost(20.0, 300.0, 5.0), SideCost(0.0, 50.0, 0.1), SideCost(500.0, 5.0, 30.0)),
        SideCost(0.0, 0.0, 31.25, STEPS),
    ):
        noisy = [us * rng.uniform(0.97, 1.03) for us in costs_us(true)]
        fitted = fit_side(SIDE_CALLS, noisy)
        for measured, predicted in zip(noisy, costs_us(fitted), strict=True):
            assert predicted == pytest.approx(measured, rel=0.07)
        of_tokens_us = [fitted.one_us(n) for n in range(1, 300)]
        assert fitted.call_us >= 0 and of_tokens_us[0] > 0
        assert of_tokens_us == sorted(of_tokens_us)


@pytest.mark.parametrize("times_us", [(100, 100, 100), (102, 99, 98), (98, 101, 97)])
def test_a_launch_that_takes_as_long_whatever_it_computes_is_a_calls_cost(
    times_us: tuple[float, ...],
) -> None:
    fitted = fit_side(SIDE_CALLS, [*times_us, 101, 102, 102, 110, 200])
    for n_experts, us in zip((1, 2, 4), times_us, strict=True):
        assert fitted.us(n_experts, n_experts) == pytest.approx(us, rel=0.03)


def test_one_call_is_enough_to_cost_its_expert() -> None:
    fitted = fit_side([(1,)], [70.0])
    assert fitted.us_of((1,)) == 70.0 and fitted.us_of((1, 2)) == 210.0


def test_every_call_is_run_with_its_counts() -> None:
    seen = []
    calibrate_side(seen.append, calls=[(1,), (1, 1), (4,)], budget_s=0.0)
    assert set(seen) == {(1,), (1, 1), (4,)}


def test_the_median_ignores_an_outlier(monkeypatch: pytest.MonkeyPatch) -> None:
    durations_s = iter([9.0, 1.0, 1.0, 50.0, 1.0, 1.0])  # the first call warms up
    now_s = 0.0

    def work() -> None:
        nonlocal now_s
        now_s += next(durations_s)

    monkeypatch.setattr("moe_offload.engine.timing.time.perf_counter", lambda: now_s)
    assert medians_in_turn_us([work], budget_s=0.0) == [1e6]


def test_copies_are_measured_alone_and_beside_the_cpu() -> None:
    """Sleeping stand-ins: 2 us per KiB and 200 us a call; neither slows the other down."""
    costs = replace(COSTS, block_bytes=2**20)
    copied = []

    def copy(n_bytes: int) -> None:
        copied.append(n_bytes)
        time.sleep((200 + n_bytes / 512) / 1e6)

    cost = calibrate_copy(costs, copy, lambda: time.sleep(0.002), budget_s=0.02)
    assert max(copied) == 2**20
    assert set(copied) == {2**16, 2**18, 2**20}
    assert 0 < cost.copy_gbps_shared <= cost.copy_gbps
    assert cost.cpu_shared_factor >= 1.0
    assert cost.copy_call_us >= 0.0


def test_a_slowdown_is_the_median_of_rounds_and_leaves_out_a_disturbed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now_s, calls = 0.0, 0
    beside = threading.Event()

    def other() -> None:
        beside.set()
        time.sleep(0.0005)

    def work() -> None:
        nonlocal now_s, calls
        calls += 1
        disturbed = 10 < calls <= 13  # in the second round, alone
        now_s += (3.0 if beside.is_set() else 2.0) + (50.0 if disturbed else 0.0)

    class Clock:
        @staticmethod
        def perf_counter() -> float:
            return now_s

    original = timing._without_pause

    @contextmanager
    def without_pause(noise: Callable[[], object]) -> Iterator[None]:
        with original(noise):
            yield
        beside.clear()

    monkeypatch.setattr(timing, "time", Clock)
    monkeypatch.setattr(timing, "_without_pause", without_pause)
    assert slowdown(work, other, budget_s=8.0) == pytest.approx(1.5)


def test_a_copy_that_fails_is_not_waited_for() -> None:
    calls = 0

    def copy(n_bytes: int) -> None:
        nonlocal calls
        calls += 1
        if calls > 30:
            raise RuntimeError("the device is gone")

    with pytest.raises(RuntimeError, match="the device is gone"):
        calibrate_copy(COSTS, copy, lambda: None, budget_s=0.0)


CpuTimes = namedtuple("CpuTimes", "user nice system idle iowait steal guest")


class Machine:
    """Two CPUs; each probe takes the next of `probe_s`, of which this process works all."""

    def __init__(self, probe_s: list[float], others: float, monkeypatch: pytest.MonkeyPatch):
        self.now_s = 0.0
        self.own_s = self.others_s = 0.0
        self.others = others
        self.probe_s = probe_s
        self.calls = 0
        monkeypatch.setattr("moe_offload.engine.timing.time.perf_counter", lambda: self.now_s)
        monkeypatch.setattr(timing, "psutil", self)

    def probe(self) -> None:
        step_s = self.probe_s[self.calls % len(self.probe_s)]
        self.calls += 1
        self.now_s += step_s
        self.own_s += 2 * step_s * (1 - self.others)
        self.others_s += 2 * step_s * self.others

    def cpu_count(self) -> int:
        return 2

    def cpu_times(self) -> CpuTimes:
        half_s = self.others_s / 2
        return CpuTimes(self.own_s + half_s, 0.0, 0.0, 7.0, 9.0, half_s, 3.0)

    def Process(self) -> SimpleNamespace:
        return SimpleNamespace(
            cpu_times=lambda: SimpleNamespace(user=self.own_s * 0.75, system=self.own_s * 0.25)
        )


def watched(machine: Machine, n_bursts: int = 3) -> Steadiness:
    watch = QuietWatch(machine.probe)
    for _ in range(n_bursts):
        watch.burst()
    return watch.result()


def test_a_quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(Machine([0.010, 0.0101], 0.0, monkeypatch))
    assert seen.spread == pytest.approx(0.01, rel=0.1)
    assert seen.other_load == pytest.approx(0.0, abs=1e-9)
    assert seen.is_quiet


def test_other_programs_and_stolen_time_are_load(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(Machine([0.010], 0.4, monkeypatch))
    # Steadily slow: the spread alone would not show it.
    assert seen.spread == pytest.approx(0.0, abs=1e-9)
    assert seen.other_load == pytest.approx(0.4)
    assert not seen.is_quiet


def test_uneven_timings_are_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(Machine([0.010, 0.020], 0.0, monkeypatch))
    assert 0.5 <= seen.spread <= 1.0  # half of the calls take twice as long
    assert not seen.is_quiet


def test_short_probes_are_timed_several_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread's wake-up doubles every second call of 50 us; the sums of seventy hardly differ."""
    assert watched(Machine([50e-6, 100e-6], 0.0, monkeypatch)).is_quiet


def test_one_outlier_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times_s = [0.010] * 200
    times_s[50] = 0.300
    assert watched(Machine(times_s, 0.0, monkeypatch)).is_quiet


def test_the_limits_are_inclusive() -> None:
    assert Steadiness(MAX_SPREAD, MAX_OTHER_LOAD).is_quiet
    assert not Steadiness(MAX_SPREAD + 0.01, 0.0).is_quiet
    assert str(Steadiness(0.1234, 0.5)) == (
        "timings spread 12%, other programs used 50% of the CPUs"
    )


def test_the_real_machine_answers() -> None:
    watch = QuietWatch(lambda: sum(range(2000)))
    watch.burst()
    seen = watch.result()
    assert seen.spread >= 0
    assert 0 <= seen.other_load <= 1


def looks(
    machine: Machine, pass_s: list[float], alone_us: float | None, watch: BusyWatch
) -> list[str]:
    """What the watch says while passes of `pass_s` follow one another, over and over, for 20 s."""
    lines = []
    ends_s = machine.now_s + 20
    for step_s in itertools.cycle(pass_s):
        lines += [line for line in [watch.look(lambda: alone_us)] if line is not None]
        machine.probe_s, machine.calls = [step_s], 0
        machine.probe()
        if machine.now_s > ends_s:
            return lines
    raise AssertionError


@pytest.mark.parametrize(
    ("others", "pass_s", "alone_us", "is_told"),
    [
        (0.4, [0.2], 20e3, True),  # ten times as long as alone, and others are at work
        (0.4, [0.02] * 9 + [1.5], 20e3, False),  # others, and one prompt: a pass is as fast as ever
        (0.02, [0.2], 20e3, False),  # slow for a reason of its own, a long context
        (0.4, [0.2], None, True),
        (0.2, [0.2], None, False),  # what a pass takes is not known: only where it is plain
    ],
)
def test_a_busy_machine_is_told_once_while_running(
    others: float,
    pass_s: list[float],
    alone_us: float | None,
    is_told: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(pass_s, others, monkeypatch)
    watch = BusyWatch()
    lines = looks(machine, pass_s, alone_us, watch)
    assert len(lines) == is_told
    if is_told:
        assert "other programs use 40% of its CPUs" in lines[0]
        assert ("a decode step takes 200 ms, alone 20;" in lines[0]) == (alone_us is not None)
    assert looks(machine, pass_s, alone_us, watch) == []


def test_a_moment_of_another_programs_work_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine([0.2], 0.0, monkeypatch)
    watch = BusyWatch()
    while machine.now_s < 60:
        disturbed = machine.now_s % 8 < 1.5
        machine.others, machine.probe_s = (0.5, [0.2]) if disturbed else (0.0, [0.02])
        assert watch.look(lambda: 20e3) is None
        machine.probe()
