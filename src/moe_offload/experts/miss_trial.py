"""Checks the cost model's choices against the plain policy, end to end, and keeps the faster.

A split that looks better in a microbenchmark can lose in the run (fixed costs, DRAM shared by
copies, the value of leaving an expert in the cache). So the first decode steps alternate.
"""

from __future__ import annotations

from statistics import median

from moe_offload.experts.plan import MissMode

_WARM_UP_STEPS = 4  # the cache is still filling
_ROUND_STEPS = 4  # consecutive steps of one mode, so that its effect on the cache shows
_ROUNDS = 4  # per mode
TRIAL_STEPS = _WARM_UP_STEPS + 2 * _ROUNDS * _ROUND_STEPS  # until the verdict


class MissTrial:
    """Decides between waiting for copies by cost (`costs`) and never waiting (`cpu`)."""

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: dict[MissMode, list[float]] = {"costs": [], "cpu": []}
        self._verdict: MissMode | None = None

    @property
    def mode(self) -> MissMode:
        """The mode of the coming step."""
        if self._verdict is not None:
            return self._verdict
        if self._steps < _WARM_UP_STEPS:
            return "cpu"
        round_number = (self._steps - _WARM_UP_STEPS) // _ROUND_STEPS
        return "costs" if round_number % 2 == 0 else "cpu"

    @property
    def line(self) -> str:
        """What was found, for the summary."""
        counts = {mode: len(values) for mode, values in self._seconds.items()}
        if self._verdict is None:
            return (
                f"miss policy auto: undecided after {self._steps} decode steps "
                f"(needs {TRIAL_STEPS})"
            )
        kept = "waiting for copies by cost" if self._verdict == "costs" else "cpu"
        medians = {mode: 1e3 * median(values) for mode, values in self._seconds.items()}
        return (
            f"miss policy auto: kept {kept} (median step {medians['costs']:.2f} ms by cost, "
            f"{medians['cpu']:.2f} ms with cpu, {counts['costs']} steps each)"
        )

    def record(self, step_s: float) -> None:
        """The duration of a decode step that ran in `mode`."""
        if self._verdict is None:
            if self._steps >= _WARM_UP_STEPS:
                self._seconds[self.mode].append(step_s)
            self._steps += 1
            if all(len(values) >= _ROUNDS * _ROUND_STEPS for values in self._seconds.values()):
                costs, cpu = (median(self._seconds[mode]) for mode in ("costs", "cpu"))
                self._verdict = "costs" if costs < cpu else "cpu"
