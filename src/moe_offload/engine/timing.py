"""How measurements are taken: medians, lines through them, a quiet machine, a place on disk.

What to measure is passed in as callables, so that the same code measures native kernels, CUDA and
the emulated accelerator.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from moe_offload.experts.costs import SideCost
from moe_offload.files import user_cache, write_atomically

Counts = tuple[int, ...]  # the tokens of each expert of a call
# Calls over experts with so many tokens each: one token on several tells a call's cost from an
# expert's; an expert's depends on its tokens, in steps of the kernels' tiles where they are few.
SIDE_CALLS: tuple[Counts, ...] = ((1,), (1, 1), (1,) * 4, (4,), (8,), (16,), (32,), (128,))
_TURNS = 5
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
MAX_AGE_S = 30 * 24 * 3600.0
_MOST_BYTES = 1 << 20  # of a calibration, which has some 5 KB: beyond, it is something else


class OtherLoad:
    """The share of all CPUs' time that went elsewhere since the construction.

    To other programs, or to other machines on the same host. `source` is the psutil module or a
    stand-in.
    """

    def __init__(self, source: Any = psutil) -> None:
        self._source = source
        self._process = source.Process()
        self._started = self._seconds()

    def share(self) -> float:
        now_s, others_s = (b - a for a, b in zip(self._started, self._seconds(), strict=True))
        all_s = now_s * (self._source.cpu_count() or 1)
        return min(1.0, max(0.0, others_s / all_s)) if all_s > 0 else 0.0

    def _seconds(self) -> tuple[float, float]:
        """The time, and what others have used of the CPUs."""
        machine = self._source.cpu_times()._asdict()
        idle = ("idle", "iowait", "guest", "guest_nice")  # guests are in user and nice already
        own = self._process.cpu_times()
        busy_s = sum(seconds for name, seconds in machine.items() if name not in idle)
        return time.perf_counter(), busy_s - own.user - own.system


class BusyWatch:
    """Notices while a run decodes that others take the CPUs which its threads wait for.

    On two cores another program's one thread has cost a run eleven twelfths of its speed: every
    barrier waits for the thread that was descheduled. `source` as in `OtherLoad`.
    """

    def __init__(self, source: Any = psutil) -> None:
        self._source = source
        self._last_s: float | None = None
        self._n_busy = 0
        self._has_told = False

    def look(self, alone_us: Callable[[], float | None]) -> str | None:
        """Before each pass; a line for the user, once, when two windows in a row were busy.

        `alone_us()` is what such a pass takes on a quiet machine, None where that is not known.
        """
        now_s = time.perf_counter()
        if self._last_s is None:
            self._begin(now_s)
            return None
        self._passes_us.append(1e6 * (now_s - self._last_s))
        self._last_s = now_s
        if self._has_told or now_s < self._began_s + _WINDOW_S or len(self._passes_us) < 3:
            return None
        load, expected_us = self._load.share(), alone_us()
        pass_us = statistics.median(self._passes_us)
        self._begin(now_s)
        if expected_us is None:
            is_busy, slow = load > _MAX_UNKNOWN_LOAD, ""
        else:
            is_busy = load > MAX_OTHER_LOAD and pass_us > _SLOW_PASS * expected_us
            slow = f" and a decode step takes {pass_us / 1e3:.3g} ms, alone {expected_us / 1e3:.3g}"
        self._n_busy = self._n_busy + 1 if is_busy else 0
        if self._n_busy < 2:
            return None
        self._has_told = True
        return (
            f"this machine is busy: other programs use {100 * load:.0f}% of its CPUs{slow}; close "
            "them, or leave cores to them with a smaller OMP_NUM_THREADS"
        )

    def _begin(self, now_s: float) -> None:
        self._began_s = self._last_s = now_s
        self._passes_us: list[float] = []
        self._load = OtherLoad(self._source)


@dataclass(frozen=True)
class Steadiness:
    """How quiet it was.

    `spread` is the interquartile range of one timing repeated all along, as a share of its median;
    `other_load` is `OtherLoad`'s share.
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

    def __init__(self, probe: Callable[[], object], source: Any = psutil) -> None:
        self._probe = probe
        self._load = OtherLoad(source)
        self._times_us: list[float] = []
        self._n_calls = 0

    def burst(self) -> None:
        """Time the probe for a moment; call it at the start, the end, and between."""
        self._probe()  # what ran before has left the caches cold
        if not self._n_calls:
            started_s = time.perf_counter()
            while time.perf_counter() < started_s + _MIN_TIMING_S:
                self._probe()
                self._n_calls += 1
        self._times_us += _times_us(self._several_calls, _BURST_S, _MIN_TIMINGS)

    def result(self) -> Steadiness:
        """What was seen so far, over all bursts."""
        low_us, median_us, high_us = np.percentile(self._times_us, (25, 50, 75))
        spread = float((high_us - low_us) / median_us) if median_us > 0 else 0.0
        return Steadiness(spread, self._load.share())

    def _several_calls(self) -> None:
        for _ in range(self._n_calls):
            self._probe()


def median_us(work: Callable[[], object], budget_s: float = 0.1, min_calls: int = 5) -> float:
    """Median time of one call, us, over `budget_s` of calls after one to warm up."""
    work()
    return statistics.median(_times_us(work, budget_s, min_calls))


def _times_us(work: Callable[[], object], budget_s: float, min_calls: int) -> list[float]:
    times_us: list[float] = []
    now_s = started_s = time.perf_counter()
    while len(times_us) < min_calls or now_s < started_s + budget_s:
        before_s = now_s
        work()
        now_s = time.perf_counter()
        times_us.append((now_s - before_s) * 1e6)
    return times_us


def slowdown(
    work: Callable[[], object], beside: Callable[[], object], budget_s: float = 0.1
) -> float:
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
    run: Callable[[Counts], None],
    calls: Sequence[Counts] = SIDE_CALLS,
    budget_s: float = 0.05,
) -> SideCost:
    """What a call costs, and an expert by its tokens, from medians of timed calls (`fit_side`).

    `run(counts)` makes one call over len(counts) experts with so many tokens each, and returns when
    it is done. Each of `calls` is timed for about `budget_s`, all of them in turn: a machine whose
    speed drifts is slow for each.
    """
    for counts in calls:
        run(counts)  # warms up
    times_us: dict[Counts, list[float]] = {counts: [] for counts in calls}
    for _ in range(_TURNS):
        for counts, of_call_us in times_us.items():
            of_call_us += _times_us(partial(run, counts), budget_s / _TURNS, 1)
    return fit_side(calls, [statistics.median(times_us[counts]) for counts in calls])


def fit_side(calls: Sequence[Counts], times_us: Sequence[float]) -> SideCost:
    """The costs that the timed calls show.

    Calls with one token an expert, which decode makes, tell a call's cost from an expert's; those
    over one expert with more tokens add a point each, never below one with fewer tokens. Beyond
    the last point the line through the last two goes on.
    """
    of_call = dict(zip(calls, times_us, strict=True))
    ones = [counts for counts in calls if max(counts) == 1]
    # Flat: a GPU's launch may take as long whatever it computes.
    call_us, one_us = fit_line([len(c) for c in ones], [of_call[c] for c in ones], flat=True)
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


@dataclass(frozen=True)
class CopyCost:
    """Copies to the accelerator, as in `CostModel`: alone, and beside the CPU's experts."""

    copy_call_us: float
    copy_gbps: float
    copy_gbps_shared: float
    cpu_shared_factor: float


def calibrate_copy(
    copy: Callable[[int], None],
    block_bytes: int,
    cpu_work: Callable[[], object],
    budget_s: float = 0.1,
) -> CopyCost:
    """Measure copies alone, then with `cpu_work` on another thread, and what it does to that work.

    `copy(n_bytes)` copies so many bytes (at most `block_bytes`) to the accelerator and returns when
    they are there. The callables must release the interpreter lock while they work.
    """
    sizes = [max(block_bytes // 16, 1), max(block_bytes // 4, 1), block_bytes]
    call_us, us_per_byte = fit_line(
        sizes, [median_us(partial(copy, n_bytes), budget_s) for n_bytes in sizes]
    )
    gbps = 1e-3 / us_per_byte
    whole = partial(copy, block_bytes)
    return CopyCost(
        copy_call_us=call_us,
        copy_gbps=gbps,
        copy_gbps_shared=gbps / slowdown(whole, cpu_work, budget_s),
        cpu_shared_factor=slowdown(cpu_work, whole, budget_s),
    )


class CalibrationCache:
    """Calibrations kept as JSON files, one per hardware and model shape, until they expire.

    `folder` defaults to the user's cache directory (XDG_CACHE_HOME, else ~/.cache).
    """

    def __init__(self, folder: Path | None = None, max_age_s: float = MAX_AGE_S) -> None:
        self.folder = folder or user_cache()
        self._max_age_s = max_age_s

    def path(self, hardware: Mapping[str, Any], shape: Mapping[str, Any]) -> Path:
        """Where a calibration of this hardware (`Hardware.key()`) and model shape is kept."""
        facts = json.dumps([hardware, shape], sort_keys=True, default=str)
        return self.folder / f"calibration-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"

    def load(self, hardware: Mapping[str, Any], shape: Mapping[str, Any]) -> dict[str, Any] | None:
        """The calibration stored for these facts, or None: never stored, expired or unreadable."""
        path = self.path(hardware, shape)
        try:
            if not path.is_file() or path.stat().st_size > _MOST_BYTES:
                return None
            document = json.loads(path.read_text())
            age_s = time.time() - document["measured_unix_s"]
            calibration = document["calibration"]
            owner = document.get("process")
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        fresh = 0 <= age_s <= self._max_age_s and owner in (None, _this_process())
        return calibration if fresh and isinstance(calibration, dict) else None

    def store(
        self,
        hardware: Mapping[str, Any],
        shape: Mapping[str, Any],
        calibration: Mapping[str, Any],
        lasting: bool = True,
    ) -> bool:
        """Keep a calibration; False where the folder cannot be written (it is then not kept).

        One that is not `lasting` is believed by this process alone.
        """
        document = {
            "measured_unix_s": time.time(),
            "hardware": hardware,
            "shape": shape,
            "calibration": calibration,
            "process": None if lasting else _this_process(),
        }
        text = json.dumps(document, indent=2, default=str) + "\n"
        try:
            write_atomically(self.path(hardware, shape), text)
        except OSError:
            return False
        return True


def _this_process() -> list[float]:
    return [os.getpid(), psutil.Process().create_time()]
