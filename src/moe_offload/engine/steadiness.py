"""Whether a machine was quiet while it was measured: what another program took is not its speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil

_BURST_S = 0.04
_MIN_TIMINGS = 5
_MIN_TIMING_S = 5e-3  # shorter ones measure how threads wake up; several calls are timed as one
# A quiet machine stays below both by a factor of two or more; one competing thread on two cores
# exceeds them by as much (docs/PERFORMANCE.md, "Calibration").
MAX_SPREAD = 0.25
MAX_OTHER_LOAD = 0.10


@dataclass(frozen=True)
class Steadiness:
    """How quiet it was.

    `spread` is the interquartile range of one timing repeated all along, as a share of its median;
    `other_load` the share of all CPUs' time that went to other programs, or to other machines on
    the same host.
    """

    spread: float
    other_load: float

    @property
    def is_quiet(self) -> bool:
        return self.spread <= MAX_SPREAD and self.other_load <= MAX_OTHER_LOAD

    def __str__(self) -> str:
        return (
            f"timings spread {100 * self.spread:.0f}%, other programs used "
            f"{100 * self.other_load:.0f}% of the CPUs"
        )


class QuietWatch:
    """Watches a measurement from its construction on; `burst()` in between, `result()` at the end.

    `probe` is the work that is timed; `source` the psutil module or a stand-in.
    """

    def __init__(self, probe: Callable[[], object], source: Any = psutil) -> None:
        self._probe = probe
        self._source = source
        self._process = source.Process()
        self._times_s: list[float] = []
        self._n_calls = 0
        self._started_s = time.perf_counter()
        self._busy_s, self._own_s = self._cpu_s()

    def burst(self) -> None:
        """Time the probe for a moment; call it at the start, the end, and between."""
        self._probe()  # what ran before has left the caches cold
        if not self._n_calls:
            started_s = time.perf_counter()
            while time.perf_counter() < started_s + _MIN_TIMING_S:
                self._probe()
                self._n_calls += 1
        ends_s = time.perf_counter() + _BURST_S
        timings = 0
        while timings < _MIN_TIMINGS or time.perf_counter() < ends_s:
            before_s = time.perf_counter()
            for _ in range(self._n_calls):
                self._probe()
            self._times_s.append(time.perf_counter() - before_s)
            timings += 1

    def result(self) -> Steadiness:
        """What was seen so far, over all bursts."""
        low_s, median_s, high_s = np.percentile(self._times_s, (25, 50, 75))
        busy_s, own_s = self._cpu_s()
        all_s = (time.perf_counter() - self._started_s) * (self._source.cpu_count() or 1)
        others_s = (busy_s - self._busy_s) - (own_s - self._own_s)
        return Steadiness(
            spread=float((high_s - low_s) / median_s) if median_s > 0 else 0.0,
            other_load=min(1.0, max(0.0, others_s / all_s)),
        )

    def _cpu_s(self) -> tuple[float, float]:
        """CPU seconds used by the whole machine, and by this process."""
        machine = self._source.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user and nice already
        busy_s = sum(seconds for name, seconds in machine.items() if name not in idle)
        own = self._process.cpu_times()
        return busy_s, own.user + own.system
