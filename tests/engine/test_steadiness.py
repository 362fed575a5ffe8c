"""A busy machine is told from a quiet one, by stand-ins for its clock and its CPU times."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import pytest

from moe_offload.engine.timing import MAX_OTHER_LOAD, MAX_SPREAD, QuietWatch, Steadiness

CpuTimes = namedtuple("CpuTimes", "user nice system idle iowait steal guest")


class Machine:
    """Two CPUs; each probe takes the next of `probe_s`, of which this process works all."""

    def __init__(self, probe_s: list[float], others: float, monkeypatch: pytest.MonkeyPatch):
        self.now_s = 0.0
        self.own_s = 0.0
        self.others = others
        self.probe_s = probe_s
        self.calls = 0
        monkeypatch.setattr("moe_offload.engine.timing.time.perf_counter", lambda: self.now_s)

    def probe(self) -> None:
        step_s = self.probe_s[self.calls % len(self.probe_s)]
        self.calls += 1
        self.now_s += step_s
        self.own_s += 2 * step_s * (1 - self.others)

    def cpu_count(self) -> int:
        return 2

    def cpu_times(self) -> CpuTimes:
        others_s = 2 * self.now_s * self.others
        return CpuTimes(self.own_s + others_s / 2, 0.0, 0.0, 7.0, 9.0, others_s / 2, 3.0)

    def Process(self) -> SimpleNamespace:
        return SimpleNamespace(
            cpu_times=lambda: SimpleNamespace(user=self.own_s * 0.75, system=self.own_s * 0.25)
        )


def watched(machine: Machine, n_bursts: int = 3) -> Steadiness:
    watch = QuietWatch(machine.probe, machine)
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
