"""What this machine can do: bandwidths and cost lines, measured in about a second, kept on disk.

What to measure is passed in as callables, so that the same code measures native kernels, CUDA and
the emulated accelerator. All figures are medians of repeated timings.

Whether a machine was quiet while it was measured: what another program took is not its speed."""

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
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from moe_offload.experts.costs import SideCost
from moe_offload.files import user_cache, write_atomically

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


MAX_AGE_S = 30 * 24 * 3600.0
# Calls over experts with so many tokens each: one token on several tells a call's cost from an
# expert's; an expert's depends on its tokens, in steps of the kernels' tiles where they are few.
SIDE_CALLS = ((1,), (1, 1), (1, 1, 1, 1), (4,), (8,), (16,), (32,), (128,))
_TURNS = 5

ROUNDS = 3  # of a slowdown's measurement: a machine that is shared deserves more
Counts = tuple[int, ...]


@dataclass(frozen=True)
class CopyCost:
    """Copies to the accelerator: alone, and while the CPU computes experts from the same DRAM.

    `cpu_shared_factor` is how many times longer the CPU's work takes while copies run.
    """

    copy_call_us: float
    copy_gbps: float
    copy_gbps_shared: float
    cpu_shared_factor: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def median_us(
    work: Callable[[], object], budget_s: float = 0.1, min_calls: int = 5, max_calls: int = 1000
) -> float:
    """Median time of one call, us, over `budget_s` of calls after one to warm up."""
    work()
    times_us: list[float] = []
    started = time.perf_counter()
    while len(times_us) < max_calls:
        before = time.perf_counter()
        work()
        now = time.perf_counter()
        times_us.append((now - before) * 1e6)
        if len(times_us) >= min_calls and now - started >= budget_s:
            break
    return statistics.median(times_us)


def slowdown(
    work: Callable[[], object],
    beside: Callable[[], object],
    budget_s: float = 0.1,
    rounds: int = ROUNDS,
) -> float:
    """How many times longer `work` takes while `beside` runs over and over; at least 1.

    The median over rounds, each about `budget_s` alone and as long beside, so that a machine whose
    speed drifts is compared with itself. A round compares means of several calls: what comes in
    bursts slows few calls by much, which a median of calls would miss.
    """
    work()
    ratios = []
    for _ in range(rounds):
        alone_us = _mean_us(work, budget_s)
        with _without_pause(beside):
            ratios.append(_mean_us(work, budget_s) / alone_us)
    return max(1.0, statistics.median(ratios))


def _mean_us(work: Callable[[], object], budget_s: float) -> float:
    started_s, calls = time.perf_counter(), 0
    while calls < 2 or time.perf_counter() - started_s < budget_s:
        work()
        calls += 1
    return (time.perf_counter() - started_s) / calls * 1e6


def measure_read_gbps(
    read: Callable[[], int] | None = None, *, buffer_bytes: int = 2**29, budget_s: float = 0.2
) -> float:
    """Plain-read memory bandwidth, GB/s, on the threads torch uses.

    `read` reads memory larger than the caches and returns how many bytes; by default torch sums a
    buffer of `buffer_bytes`, which should be several times the last-level cache.
    """
    if read is None:
        buffer = torch.ones(buffer_bytes // 4)

        def read() -> int:
            buffer.sum()
            return buffer.nbytes

    return read() / median_us(read, budget_s) / 1e3


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
    times_us: list[list[float]] = [[] for _ in calls]
    for _ in range(_TURNS):
        for counts, of_call_us in zip(calls, times_us, strict=True):
            now_s = started_s = time.perf_counter()
            while now_s == started_s or now_s < started_s + budget_s / _TURNS:
                before_s = now_s
                run(counts)
                now_s = time.perf_counter()
                of_call_us.append((now_s - before_s) * 1e6)
    return fit_side(calls, list(map(statistics.median, times_us)))


def fit_side(calls: Sequence[Counts], times_us: Sequence[float]) -> SideCost:
    """The costs that the timed calls show.

    Calls with one token an expert, which decode makes, tell a call's cost from an expert's, by the
    least squared *relative* error; those over one expert with more tokens add a point each, never
    below one with fewer tokens. Beyond the last point the line through the last two goes on.
    """
    of_call = dict(zip(calls, times_us, strict=True))
    ones = [counts for counts in calls if max(counts) == 1]
    call_us, one_us = _fit_call([len(counts) for counts in ones], [of_call[c] for c in ones])
    few = [(1, one_us)]
    for n in sorted(counts[0] for counts in calls if len(counts) == 1 and counts[0] > 1):
        few.append((n, max(few[-1][1], of_call[n,] - call_us)))
    (tokens, us), (more_tokens, more_us) = few[-2:] if few[1:] else [(0, 0.0), few[0]]
    token_us = (more_us - us) / (more_tokens - tokens)
    return SideCost(call_us, more_us - token_us * more_tokens, token_us, tuple(few))


def _fit_call(sizes: Sequence[int], times_us: Sequence[float]) -> tuple[float, float]:
    """(call, expert), us, non-negative, by relative least squares over calls of `sizes` experts."""
    times = np.asarray(times_us)
    terms = np.array([(1.0, size) for size in sizes]) / times[:, None]
    call_us, expert_us = np.linalg.lstsq(terms, np.ones(len(times)), rcond=None)[0]
    if len(times) > 1 and call_us >= 0 and expert_us >= 0:
        return float(call_us), float(expert_us)
    # The better of one of them alone: a GPU's launch may take as long whatever it computes.
    alone = terms.sum(axis=0) / (terms**2).sum(axis=0)
    call_error, expert_error = ((terms * alone - 1) ** 2).sum(axis=0)
    if call_error < expert_error:
        return float(alone[0]), 0.0
    return 0.0, float(alone[1])


def calibrate_copy(
    copy: Callable[[int], None],
    block_bytes: int,
    cpu_work: Callable[[], object],
    budget_s: float = 0.1,
    step: Callable[[], object] | None = None,
    rounds: int = ROUNDS,
) -> CopyCost:
    """Measure copies alone, then with `cpu_work` on another thread, and what it does to that work.

    `copy(n_bytes)` copies so many bytes (at most `block_bytes`) to the accelerator and returns when
    they are there. With `step`, the copies' speed is measured beside it instead: all that an
    emulated accelerator's decode does to them. The callables must release the interpreter lock
    while they work.
    """
    sizes = [max(block_bytes // 16, 1), max(block_bytes // 4, 1), block_bytes]
    alone_us = [median_us(partial(copy, n_bytes), budget_s) for n_bytes in sizes]
    call_us, us_per_byte = fit_line(sizes, alone_us)
    gbps = 1e-3 / us_per_byte
    whole = partial(copy, block_bytes)
    return CopyCost(
        copy_call_us=call_us,
        copy_gbps=gbps,
        copy_gbps_shared=gbps / slowdown(whole, step or cpu_work, budget_s, rounds),
        cpu_shared_factor=slowdown(cpu_work, whole, budget_s, rounds),
    )


def calibrate_sharing(
    cpu_work: Callable[[], object],
    gpu_work: Callable[[], object],
    both: Callable[[], object],
    rounds: int = 8,
) -> float:
    """How many times longer `cpu_work` and `gpu_work` each take while both run.

    `both` begins them together and returns when both are done. 1 for a GPU of its own; more for an
    emulated accelerator, which computes on the CPU's cores. The median over rounds of one each.
    """
    both()
    factors = []
    for _ in range(rounds):
        cpu_us, gpu_us, both_us = (_mean_us(work, 0.0) for work in (cpu_work, gpu_work, both))
        # While the shorter runs both are slowed, then the longer has its full speed again.
        factors.append(1 + (both_us - max(cpu_us, gpu_us)) / min(cpu_us, gpu_us))
    return max(1.0, statistics.median(factors))


def fit_line(sizes: Sequence[int], times_us: Sequence[float]) -> tuple[float, float]:
    """(fixed us, us per unit of size), both non-negative, by relative least squares."""
    times = np.asarray(times_us)
    terms = np.array([(1.0, size) for size in sizes]) / times[:, None]
    fixed_us, us_per_unit = np.linalg.lstsq(terms, np.ones(len(times)), rcond=None)[0]
    if fixed_us < 0 or us_per_unit <= 0:
        return 0.0, float(times[-1] / sizes[-1])
    return float(fixed_us), float(us_per_unit)


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


def _this_process() -> list[float]:
    return [os.getpid(), psutil.Process().create_time()]


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
        try:
            document = json.loads(self.path(hardware, shape).read_text())
            age_s = time.time() - document["measured_unix_s"]
            calibration = document["calibration"]
            owner = document.get("process")
        except (OSError, ValueError, KeyError, TypeError):
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
        path = self.path(hardware, shape)
        document = {
            "measured_unix_s": time.time(),
            "hardware": hardware,
            "shape": shape,
            "calibration": calibration,
            "process": None if lasting else _this_process(),
        }
        try:
            write_atomically(path, json.dumps(document, indent=2, default=str) + "\n")
        except OSError:
            return False
        return True
