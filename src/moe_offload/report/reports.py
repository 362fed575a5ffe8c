"""Writes a run's files: five CSVs, run.json and the routing, together and atomically."""

from __future__ import annotations

import contextlib
import csv
import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import torch

from moe_offload.errors import UserError
from moe_offload.experts.recorder import Recorder
from moe_offload.machine.sensors import Sample
from moe_offload.report.provenance import git_state, versions
from moe_offload.report.report_paths import ReportPaths
from moe_offload.report.report_tables import (
    Row,
    breakdown_rows,
    cachehit_rows,
    expert_choice_rows,
    frequency_rows,
    token_rows,
)
from moe_offload.report.summary import RunSummary

Status = Literal["completed", "interrupted", "failed"]


@dataclass(frozen=True)
class RunInfo:
    """What only the caller knows of a run; plain JSON values in the mappings.

    `settings` are all options, also those that the command leaves at their defaults. `n_threads`
    are the CPU threads that computed experts.
    """

    command: Sequence[str] = ()
    tool_version: str = ""
    source_folder: Path = Path(__file__).parent
    hardware: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    layout: Mapping[str, Any] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    samples: Sequence[Sample] = ()
    notes: Sequence[str] = ()
    started_unix_s: float | None = None
    status: Status = "completed"
    n_threads: int = field(default_factory=torch.get_num_threads)


def write_reports(
    recorder: Recorder,
    paths: ReportPaths,
    info: RunInfo,
    summary: RunSummary,
    routing: Iterable[str] | None = None,
) -> list[Path]:
    """Write all files atomically and return where they are.

    A run that did not complete never replaces files of an earlier one, complete or not: where any
    is in the way, all of its own are named `*.partial.*`. A run that finished no forward pass, or
    recorded nothing (`--no-record`), writes nothing. `routing` are the lines of `paths.routing`.
    Raises UserError where the files cannot be written; no temporary file stays behind.
    """
    if not (recorder.enabled and len(recorder.pass_table())):
        return []
    if routing is None:
        paths = replace(paths, routing=None)
    if info.status != "completed":
        paths = paths.beside_others()
    tables = {
        paths.breakdown: breakdown_rows(recorder),
        paths.cachehit: cachehit_rows(recorder),
        paths.expert_choices: expert_choice_rows(recorder),
        paths.token_gen_time: token_rows(recorder, info.samples),
        paths.cpu_freq_avg: frequency_rows(info.samples),
    }
    lines: dict[Path, Iterable[str]] = {path: _csv_lines(rows) for path, rows in tables.items()}
    if paths.routing is not None and routing is not None:
        lines[paths.routing] = routing
    document = _finite(_run_document(paths, info, summary))
    lines[paths.run_json] = [json.dumps(document, indent=2, allow_nan=False, default=str) + "\n"]
    _write_together(lines)
    return list(lines)


def _run_document(paths: ReportPaths, info: RunInfo, summary: RunSummary) -> dict[str, Any]:
    started = info.started_unix_s
    return {
        "format_version": 1,
        "status": info.status,
        "started": None
        if started is None
        else datetime.fromtimestamp(started, timezone.utc).isoformat(timespec="seconds"),
        "written": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": list(info.command),
        "settings": dict(info.settings),
        "versions": {"tool": info.tool_version, **versions()},
        "git": git_state(info.source_folder),
        "n_threads": info.n_threads,
        "hardware": dict(info.hardware),
        "model": dict(info.model),
        "layout": dict(info.layout),
        "calibration": None if info.calibration is None else _measured(info.calibration),
        "summary": summary.to_json(),
        "notes": list(info.notes),
        "files": {
            name: os.path.relpath(path, paths.run_json.parent)
            for name, path in paths.by_name().items()
            if name != "run_json"
        },
    }


def _measured(calibration: Mapping[str, Any]) -> dict[str, Any]:
    """`calibration` with null for the costs of copies where no accelerator was there to copy to.

    The planner's stand-in for them is a link that is all but closed: no measurement.
    """
    costs = dict(calibration.get("costs") or {})
    if not isfinite((costs.get("gpu") or {}).get("expert_us", 0.0)):
        costs |= dict.fromkeys([name for name in costs if "copy" in name or "shared" in name])
    return dict(calibration) | {"costs": costs}


def _finite(value: Any) -> Any:
    """`value` with null for what JSON cannot say, such as the infinite cost of no accelerator."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


class _Echo:
    """A file for csv.writer that hands the line back: no table is held as text."""

    def write(self, line: str) -> str:
        return line


def _csv_lines(rows: Iterable[Row]) -> Iterator[str]:
    writer = csv.writer(_Echo(), lineterminator="\n")
    for row in rows:
        yield writer.writerow([_cell(value) for value in row])


def _cell(value: object) -> object:
    return f"{value:.9g}" if isinstance(value, float) else value


def _write_together(lines: Mapping[Path, Iterable[str]]) -> None:
    """All files to temporary names, then all renamed: none is ever seen half-written."""
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in lines}
    try:
        for path, of_file in lines.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with temporary[path].open("w", encoding="utf-8", newline="") as file:
                file.writelines(of_file)
                file.flush()
                os.fsync(file.fileno())
        for path in lines:
            temporary[path].replace(path)
    except OSError as error:
        make_room = "make room there, or " if error.errno == errno.ENOSPC else ""
        raise UserError(
            f"expected to write {path}, but found: {error.strerror}: {make_room}send the run's "
            "files elsewhere with --output-dir"
        ) from error
    finally:
        for leftover in temporary.values():
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)
