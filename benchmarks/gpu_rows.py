"""What `gpu_check.py` finds, row by row: printed, and kept in a report that is always whole."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_check import RUNNING, Format, write_report
from benchmarks.gpu_models import settings
from moe_offload.engine.calibration import UNSTEADY


@dataclass(frozen=True)
class Row:
    """One setting of one shape; times and rates of decoding at batch 1, over `steps` steps.

    The experts of `stored_layers` are in memory, and serve all `layers`. `prompts_tokens_per_s` is
    by a prompt's length, where long ones were measured.
    """

    shape: str
    layers: int
    stored_layers: int
    weight_format: str
    setting: str
    routing: str
    cache: str
    computed_by: str
    steps: int
    tokens_per_s: float
    step_ms: float
    predicted_ms: float | None
    bound_ms: float
    percent_of_bound: float
    hit_percent: float
    fetched_gb: float
    prefetch_recall_percent: float | None
    prefetch_wasted_gb: float | None
    cpu_read_gbps: float | None
    prefill_tokens_per_s: float
    prompts_tokens_per_s: dict[int, float]
    layer_error: float
    logit_error: float | None
    correct: bool
    notes: list[str]


def print_row(row: Row) -> None:
    logit_error = "     -" if row.logit_error is None else f"{row.logit_error:.4f}"
    recall = ""
    if row.prefetch_recall_percent is not None:
        recall = (
            f"  recall {row.prefetch_recall_percent:.1f}%, "
            f"{row.prefetch_wasted_gb:.2f} GB fetched ahead for nothing"
        )
    print(
        f"{row.shape:14} {row.weight_format:5} {row.setting:24} {row.routing:6} {row.cache:>8} "
        f"{row.tokens_per_s:8.2f} tok/s {row.step_ms:9.3f} ms x{row.steps:<3}"
        f" hits {row.hit_percent:5.1f}%  moved {row.fetched_gb:7.2f} GB "
        f"{row.percent_of_bound:4.0f}% of bound  errors: layer {row.layer_error:.4f} "
        f"logits {logit_error} {'ok' if row.correct else 'WRONG'}{recall}",
        flush=True,
    )
    for n_tokens, speed in row.prompts_tokens_per_s.items():
        print(f"{'':21}a prompt of {n_tokens} tokens: {speed:.1f} tokens/s", flush=True)
    for note in row.notes:
        if not note.startswith(UNSTEADY):  # of every row, and in the report
            print(f"{'':21}{note}", flush=True)


class Report:
    """What was found so far, and what is still missing; on disk after every change."""

    def __init__(self, path: Path | None, models: Sequence[tuple[str, Format]]) -> None:
        self.rows: list[Row] = []
        self.document: dict[str, Any] = {}
        self._path = path
        self._started_s = time.monotonic()
        self._missing: dict[tuple[str, str, str], str] = {
            (shape, weight_format, setting.name): ""
            for shape, weight_format in models
            for setting in settings(shape, 1, 1, 1.0)
        }

    @property
    def skipped(self) -> list[str]:
        """The settings that were not measured, with the reason where one is known."""
        return [" ".join(name) + reason for name, reason in self._missing.items()]

    def add(self, row: Row) -> None:
        self.rows.append(row)
        del self._missing[row.shape, row.weight_format, row.setting]
        self.save()

    def leave_out(self, shape: str, weight_format: str, reason: object, setting: str = "") -> None:
        """Give the reason why `setting`, or all of a model that is still missing, is left out."""
        for name, known in self._missing.items():
            if name[:2] == (shape, weight_format) and (name[2] == setting or not setting):
                self._missing[name] = known or f" ({reason})"
        self.save()

    def save(self, ended: str = RUNNING) -> None:
        self.document["ended"] = ended
        self.document["took_s"] = time.monotonic() - self._started_s
        self.document["rows"] = [asdict(row) for row in self.rows]
        self.document["skipped"] = self.skipped
        if self._path is not None:
            write_report(self._path, self.document)
