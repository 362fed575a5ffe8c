"""How measurements are taken: medians, lines through them, and a machine that is quiet meanwhile.

What to measure is passed in as callables, so that the same code measures native kernels, CUDA and
the emulated accelerator.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import psutil

from moe_offload.experts.costs import CostModel, SideCost

Counts = tuple[int, ...]  # the tokens of each expert of a call
# Calls over experts with so many tokens each: one token on several tells a call's cost from an
# expert's; an expert's depends on its tokens, in steps of the kernels' tiles where they are few.
SIDE_CALLS: tuple[Counts, ...] = ((1,), (1, 1), (1,) * 4, (4,), (8,), (16,), (32,), (128,))
_ROUNDS = 3
_BURST_S = 0.04
_MIN_TIMINGS = 5
_MIN_TIMING_S = 5e-3  # shorter ones measure how threads wake up; several calls are timed as one
# A quiet machine stays below both by a factor of two or more; one competing thread on two cores
# exceeds them by as much (docs/PERFORMANCE.md, "Calibration").
MAX_SPREAD = 0.25
MAX_OTHER_LOAD = 0.10
# Of a run: two windows that both found others at work and its passes slow, or only others where
# what a pass takes is not known.
_WINDOW_S = 2.0
_SLOW_PASS = 2.0
_MAX_UNKNOWN_LOAD = 0.25


def cpu_clocks() -> tuple[float, float]:
    """The time, and what others have used of the CPUs, in seconds.

    Others are other programs, and other machines on the same host.
    """
    machine, own = psutil.cpu_times()._asdict(), psutil.Process().cpu_times()
    idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user and nice already
    busy_s = sum(seconds for name, seconds in machine.items() if name not in idle)
    return time.perf_counter(), busy_s - own.user - own.system


def other_load(since: tuple[float, float]) -> float:
    """The share of all CPUs' time that went to others `since` (`cpu_clocks`)."""
    now_s, others_s = (b - a for a, b in zip(since, cpu_clocks(), strict=True))
    all_s = now_s * (psutil.cpu_count() or 1)
    return min(1.0, max(0.0, others_s / all_s)) if all_s > 0 else 0.0


class BusyWatch:
    """Notices while a run decodes that others take the CPUs which its threads wait for.

    On two cores another program's one thread has cost a run eleven twelfths of its speed: every
    barrier waits for the thread that was descheduled.
    """

    def __init__(self) -> None:
        self._starts_s: list[float] = []  # of the window's passes
        self._since = 0.0, 0.0
        self._n_busy = 0
        self._has_told = False

    def look(self, alone_us: Callable[[], float | None]) -> str | None:
        """Before each pass; a line for the user, once, when two windows in a row were busy.

        `alone_us()` is what such a pass takes on a quiet machine, None where that is not known.
        """
        if self._has_told:
            return None
        if not self._starts_s:
            self._since = cpu_clocks()
        self._starts_s.append(time.perf_counter())
        if self._starts_s[-1] < self._starts_s[0] + _WINDOW_S or len(self._starts_s) <= 3:
            return None
        load, expected_us = other_load(self._since), alone_us()
        pass_us = 1e6 * statistics.median(b - a for a, b in pairwise(self._starts_s))
        self._since, self._starts_s = cpu_clocks(), self._starts_s[-1:]
        if expected_us is None:
            is_busy, slow = load > _MAX_UNKNOWN_LOAD, ""
        else:
            is_busy = load > MAX_OTHER_LOAD and pass_us > _SLOW_PASS * expected_us
            slow = f" and a decode step takes {pass_us / 1e3:.3g} ms, alone {expected_us / 1e3:.3g}"
        self._n_busy = self._n_busy + 1 if is_busy else 0
        self._has_told = self._n_busy == 2
        if not self._has_told:
            return None
        return (
            f"this machine is busy: other programs use {100 * load:.0f}% of its CPUs{slow}; close "
            "them, or leave cores to them with a smaller OMP_NUM_THREADS"
        )


@dataclass(frozen=True)
class Steadiness:
    """How quiet it was.

    `spread` is the interquartile range of one timing repeated all along, as a share of its median;
    `other_load` the share of the CPUs' time that others used.
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

    `probe` is the work that is timed.
    """

    def __init__(self, probe: Callable[[], object]) -> None:
        self._probe = probe
        self._since = cpu_clocks()
        self._times_us: list[float] = []
        self._n_calls = 0

    def burst(self) -> None:
        """Time the probe for a moment; call it at the start, the end, and between."""
        self._probe()  # what ran before has left the caches cold
        if not self._n_calls:
            self._n_calls = len(_times_us(self._probe, _MIN_TIMING_S, 1))
        self._times_us += _times_us(self._several_calls, _BURST_S, _MIN_TIMINGS)

    def result(self) -> Steadiness:
        """What was seen so far, over all bursts."""
        low_us, median_us, high_us = np.percentile(self._times_us, (25, 50, 75))
        spread = float((high_us - low_us) / median_us) if median_us > 0 else 0.0
        return Steadiness(spread, other_load(self._since))

    def _several_calls(self) -> None:
        for _ in range(self._n_calls):
            self._probe()


def medians_in_turn_us(
    works: Sequence[Callable[[], object]], budget_s: float, n_turns: int = 5
) -> list[float]:
    """Median time of a call of each, us, over `budget_s` of calls to each and at least `n_turns`.

    They take turns, after a call each to warm up: a machine whose speed drifts is slow for each.
    """
    for work in works:
        work()
    times_us: list[list[float]] = [[] for _ in works]
    for _ in range(n_turns):
        for work, of_work_us in zip(works, times_us, strict=True):
            of_work_us += _times_us(work, budget_s / n_turns, 1)
    return [statistics.median(of_work_us) for of_work_us in times_us]


def _times_us(work: Callable[[], object], budget_s: float, min_calls: int) -> list[float]:
    times_us: list[float] = []
    now_s = started_s = time.perf_counter()
    while len(times_us) < min_calls or now_s < started_s + budget_s:
        before_s = now_s
        work()
        now_s = time.perf_counter()
        times_us.append((now_s - before_s) * 1e6)
    return times_us


def slowdown(work: Callable[[], object], beside: Callable[[], object], budget_s: float) -> float:
    """How many times longer `work` takes while `beside` runs over and over; at least 1.

    The median over rounds, each about `budget_s` alone and as long beside, so that a machine whose
    speed drifts is compared with itself. A round compares means of several calls: what comes in
    bursts slows few calls by much, which a median of calls would miss.
    """
    work()
    ratios = []
    for _ in range(_ROUNDS):
        alone_us = statistics.mean(_times_us(work, budget_s, 2))
        with _without_pause(beside):
            ratios.append(statistics.mean(_times_us(work, budget_s, 2)) / alone_us)
    return max(1.0, statistics.median(ratios))


@contextmanager
def _without_pause(work: Callable[[], object]) -> Iterator[None]:
    """`work` runs over and over on another thread, from its first completion to the exit.

    What it raises there is raised here on exit.
    """
    started, stop = threading.Event(), threading.Event()

    def loop() -> None:
        try:
            while not stop.is_set():
                work()
                started.set()
        finally:
            started.set()

    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="calibration") as thread:
        looping = thread.submit(loop)
        started.wait()
        try:
            yield
        finally:
            stop.set()
        looping.result()


def calibrate_side(
    run: Callable[[Counts], None], calls: Sequence[Counts], budget_s: float = 0.05
) -> SideCost:
    """What a call costs, and an expert by its tokens, from medians of timed calls (`fit_side`).

    `run(counts)` makes one call over len(counts) experts with so many tokens each, and returns when
    it is done. Each of `calls` is timed for about `budget_s`.
    """
    works = [partial(run, counts) for counts in calls]
    return fit_side(calls, medians_in_turn_us(works, budget_s))


def fit_side(calls: Sequence[Counts], times_us: Sequence[float]) -> SideCost:
    """The costs that the timed calls show.

    Calls with one token an expert, which decode makes, tell a call's cost from an expert's; those
    over one expert with more tokens add a point each, never below one with fewer tokens. Beyond
    the last point the line through the last two goes on.
    """
    of_call = dict(zip(calls, times_us, strict=True))
    ones = {len(counts): us for counts, us in of_call.items() if max(counts) == 1}
    # Flat: a GPU's launch may take as long whatever it computes.
    call_us, one_us = fit_line([*ones], [*ones.values()], flat=True)
    few = [(1, one_us)]
    for n in sorted(counts[0] for counts in calls if len(counts) == 1 and counts[0] > 1):
        few.append((n, max(few[-1][1], of_call[n,] - call_us)))
    (tokens, us), (more_tokens, more_us) = few[-2:] if few[1:] else [(0, 0.0), few[0]]
    token_us = (more_us - us) / (more_tokens - tokens)
    return SideCost(call_us, more_us - token_us * more_tokens, token_us, tuple(few))


def fit_line(
    sizes: Sequence[int], times_us: Sequence[float], flat: bool = False
) -> tuple[float, float]:
    """(fixed us, us per unit of size), neither negative, by the least squared *relative* error.

    Where that line has no such parts, one through zero or, if it may be `flat`, a constant.
    """
    times = np.asarray(times_us)
    terms = np.array([(1.0, size) for size in sizes]) / times[:, None]
    fixed_us, unit_us = np.linalg.lstsq(terms, np.ones(len(times)), rcond=None)[0]
    if len(times) > 1 and fixed_us >= 0 and unit_us >= (0 if flat else np.finfo(float).tiny):
        return float(fixed_us), float(unit_us)
    alone = terms.sum(axis=0) / (terms**2).sum(axis=0)
    fixed_error, unit_error = ((terms * alone - 1) ** 2).sum(axis=0)
    if flat and fixed_error < unit_error:
        return float(alone[0]), 0.0
    return 0.0, float(alone[1])


def calibrate_copy(
    costs: CostModel,
    copy: Callable[[int], None],
    cpu_work: Callable[[], object],
    budget_s: float = 0.1,
) -> CostModel:
    """`costs` with those of copies: alone, beside `cpu_work`, and what they do to that work.

    `copy(n_bytes)` copies so many bytes (at most a block's) to the accelerator and returns when
    they are there. The callables must release the interpreter lock while they work.
    """
    sizes = [max(costs.block_bytes // part, 1) for part in (16, 4, 1)]
    times_us = medians_in_turn_us([partial(copy, n_bytes) for n_bytes in sizes], budget_s)
    call_us, us_per_byte = fit_line(sizes, times_us)
    gbps = 1e-3 / us_per_byte
    whole = partial(copy, costs.block_bytes)
    return replace(
        costs,
        copy_call_us=call_us,
        copy_gbps=gbps,
        copy_gbps_shared=gbps / slowdown(whole, cpu_work, budget_s),
        cpu_shared_factor=slowdown(cpu_work, whole, budget_s),
    )
