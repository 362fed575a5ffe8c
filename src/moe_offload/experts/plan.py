"""Who computes what in one layer: a pure decision, before any tensor moves.

Decide, then act: the dispatcher carries out a `Plan` and decides nothing itself. `Trial` tries out
in the run itself which of two ways is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from moe_offload.experts.costs import CostModel

MissMode = Literal["cpu", "fetch", "costs"]


@dataclass(frozen=True)
class Plan:
    """One layer's experts by the side that computes them.

    `hits` maps experts that are ready on the accelerator to their slots. `waited` are computed
    there once their copies arrive, `cpu` on the CPU; in decode these are fetched in the background
    for the tokens to come, in this order. Each chosen expert is in one of the three.
    """

    hits: Mapping[int, int]
    waited: tuple[int, ...]
    cpu: tuple[int, ...]


def plan_decode(
    counts: Mapping[int, int],
    slots: Sequence[int],
    mode: MissMode,
    costs: CostModel | None,
    backlog_us: float = 0.0,
) -> Plan:
    """Plan one decode step of one layer.

    `counts` gives each chosen expert's number of tokens, in order of first choice; `slots` the
    cache's answer for each, -1 for a miss. `cpu` is the paper's policy: the CPU computes every
    miss and the fetch is for later. `fetch` waits for every missed expert. `costs` waits for
    those whose waiting shortens the step by the calibrated `costs`.
    """
    hits = {e: slot for e, slot in zip(counts, slots, strict=True) if slot >= 0}
    missed = {e: n for e, n in counts.items() if e not in hits}
    if mode == "fetch":
        return Plan(hits, tuple(missed), ())
    waited: tuple[int, ...] = ()
    if mode == "costs" and costs is not None and missed:
        copied = costs.split(dict.fromkeys(hits, 1), missed, backlog_us)
        waited = tuple(e for e in missed if e in copied)
    return Plan(hits, waited, tuple(e for e in missed if e not in waited))


def plan_prefill(
    counts: Sequence[int],
    ready: Mapping[int, int],
    mode: MissMode,
    costs: CostModel | None,
    backlog_us: float = 0.0,
) -> Plan:
    """Plan one layer of a prompt.

    `counts[e]` is the number of prompt tokens on expert e; `ready` maps experts on the
    accelerator to their slots. With `costs`, the split that is predicted to finish first, so a
    short prompt does not stream the model and a long one does not wait for the CPU. `fetch`
    streams every expert that is not there. `backlog_us` is the copy time already queued, such as
    the warm-up of the layer before.
    """
    chosen = {e: n for e, n in enumerate(counts) if n}
    hits = {e: ready[e] for e in chosen if e in ready}
    missed = {e: n for e, n in chosen.items() if e not in ready}
    if mode == "fetch":
        return Plan(hits, tuple(missed), ())
    if costs is None:
        return Plan(hits, (), tuple(missed))
    waited = costs.split({e: chosen[e] for e in hits}, missed, backlog_us)
    return Plan(hits, waited, tuple(e for e in missed if e not in waited))


_WARM_UP_STEPS = 4  # the cache is still filling
_ROUND_STEPS = 4  # consecutive steps of one mode, so that its effect on the cache shows
_ROUNDS = 4  # per mode
TRIAL_STEPS = _WARM_UP_STEPS + 2 * _ROUNDS * _ROUND_STEPS  # until the verdict


class Trial:
    """Which of two ways makes decode steps shorter, found in the run itself.

    What looks better in a microbenchmark can lose in the run (fixed costs, memory shared by copies,
    the value of leaving an expert in the cache). So after some steps of the second way the two
    alternate, and the faster is kept.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: dict[bool, list[float]] = {True: [], False: []}
        self._verdict: bool | None = None

    @property
    def is_decided(self) -> bool:
        return self._verdict is not None

    @property
    def is_first(self) -> bool:
        """Whether the coming step goes the first way."""
        if self._verdict is not None:
            return self._verdict
        round_number, _ = divmod(self._steps - _WARM_UP_STEPS, _ROUND_STEPS)
        return round_number >= 0 and round_number % 2 == 0

    def record(self, step_s: float) -> None:
        """The duration of a decode step that went as `is_first` says."""
        if self._verdict is not None:
            return
        if self._steps >= _WARM_UP_STEPS:
            self._seconds[self.is_first].append(step_s)
        self._steps += 1
        if self._steps == TRIAL_STEPS:
            self._verdict = median(self._seconds[True]) < median(self._seconds[False])

    def line(self, what: str, first: str, second: str) -> str:
        """What was found of `what`, for the summary; `first` and `second` name the ways."""
        if self._verdict is None:
            return f"{what}: undecided after {self._steps} decode steps (needs {TRIAL_STEPS})"
        first_ms, second_ms = (1e3 * median(self._seconds[way]) for way in (True, False))
        return (
            f"{what}: kept {first if self._verdict else second} (median step {first_ms:.2f} ms "
            f"{first}, {second_ms:.2f} ms {second}, {_ROUNDS * _ROUND_STEPS} steps each)"
        )
