"""The work at a run's end grows with the run, not with its square: a night's ends in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_recording import Shape, record_run, sensor_samples

from moe_offload.engine.calibration import predicted_step_us
from moe_offload.experts.costs import CostModel, SideCost
from moe_offload.experts.recorder import Recorder
from moe_offload.report.files import ReportPaths, RunInfo, recorded_routing, write_reports
from moe_offload.report.summary import format_summary, summarize

COSTS = CostModel(SideCost(5, 100, 20), SideCost(5, 20, 5), 10, 10, 8, 1.1, 4096, 30)
TABLES = ("pass_table", "token_table", "layer_table", "expert_ids", "hits_of_tokens")


class Tally:
    """How many elements of a recording were looked at."""

    def __init__(self) -> None:
        self.touched = 0


class CountedList(list[Any]):
    def __init__(self, values: Iterable[Any], tally: Tally) -> None:
        super().__init__(values)
        self.tally = tally

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        self.tally.touched += len(found) if isinstance(key, slice) else 1
        return found


class CountedTable(np.ndarray[Any, Any]):
    """Counts the elements of every array and list that is made of it."""

    tally: Tally | None = None

    def __array_finalize__(self, of: Any) -> None:
        self.tally = getattr(of, "tally", None)
        if self.tally is not None:
            self.tally.touched += self.size

    def tolist(self) -> Any:
        assert self.tally is not None
        return CountedList(super().tolist(), self.tally)


def counted(read: Callable[[Recorder], Any], tally: Tally) -> Callable[[Recorder], Any]:
    def reading(recorder: Recorder) -> Any:
        table = read(recorder).view(CountedTable)
        table.tally = tally
        tally.touched += table.size
        return table

    return reading


def touched(shape: Shape, folder: Path) -> int:
    """Elements of the recording that all reports of a run look at."""
    recorder, samples, tally = record_run(shape), sensor_samples(), Tally()
    with pytest.MonkeyPatch.context() as patch:
        for name in TABLES:
            patch.setattr(Recorder, name, counted(getattr(Recorder, name), tally))
        predicted_us = predicted_step_us(recorder, COSTS)
        summary = summarize(recorder, samples=samples, predicted_step_us=predicted_us)
        format_summary(summary)
        lines = recorded_routing(recorder, "made up", shape.n_experts, synthetic=True)
        paths = ReportPaths.in_folder(folder)
        written = write_reports(recorder, paths, RunInfo(samples=samples), summary, lines)
    assert folder / "routing.jsonl" in written
    assert tally.touched > len(recorder.expert_ids())
    return tally.touched


@pytest.mark.parametrize(
    ("short", "long"),
    [
        (Shape(n_tokens=600), Shape(n_tokens=1200)),
        (Shape(prompt_lengths=(300,)), Shape(prompt_lengths=(600,))),
        (
            Shape(prompt_lengths=(5,) * 300, n_tokens=3),
            Shape(prompt_lengths=(5,) * 600, n_tokens=3),
        ),
        (
            Shape(prompt_lengths=(5,) * 300, n_tokens=3, batch=10),
            Shape(prompt_lengths=(5,) * 600, n_tokens=3, batch=10),
        ),
    ],
    ids=["tokens", "prompt tokens", "prompts", "batches"],
)
def test_twice_the_run_is_at_most_twice_the_work(short: Shape, long: Shape, tmp_path: Path) -> None:
    before = touched(short, tmp_path / "short")
    assert touched(long, tmp_path / "long") <= 2.01 * before
