"""A run's files: where they go, and how they are written, together and atomically.

Six CSVs (tables.py has their rows); run.json, with what repeating the run needs; and the routing
as a trace, which a simulation starts from: it holds every token's choices, the prompts' too, which
have no place in expert_choices.csv, and which experts a prompt copied to the GPU.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np

from moe_offload import VERSION
from moe_offload.errors import UserError
from moe_offload.experts.recorder import Recorder
from moe_offload.files import write_together
from moe_offload.machine.sensors import Sample
from moe_offload.report.summary import RunSummary
from moe_offload.report.tables import (
    Row,
    breakdown_rows,
    cachehit_rows,
    events_of_passes,
    expert_choice_rows,
    expert_count_rows,
    frequency_rows,
    token_rows,
    with_prompts,
)
from moe_offload.simulation.traces import RoutingPass, TraceInfo, trace_lines


class ReportPaths(dict[str, Path]):
    """Where each of a run's files goes, by what it holds."""

    @classmethod
    def in_folder(
        cls,
        folder: Path | None = None,
        breakdown_csv: Path = Path("out.csv"),
        cachehit_csv: Path = Path("cache.csv"),
    ) -> ReportPaths:
        """All files under `folder`; the working directory, where none is given, has no routing."""
        names = {
            "breakdown": breakdown_csv,
            "cachehit": cachehit_csv,
            "expert_choices": Path("expert_choices.csv"),
            "token_gen_time": Path("token_gen_time.csv"),
            "cpu_freq_avg": Path("cpu_freq_avg.csv"),
            "expert_counts": Path("expert_counts.csv"),
            "run_json": Path("run.json"),
        }
        if folder is None:
            return cls(names)
        names["routing"] = Path("routing.jsonl")
        return cls({name: folder / path for name, path in names.items()})

    def beside_others(self) -> ReportPaths:
        """The names for a part of a run, unfinished or a later one: these if all are free, else
        out.partial.csv, else out.partial-2.csv and so on."""
        paths, number = self, 0
        while any(path.exists() for path in paths.values()):
            number += 1
            tail = ".partial" if number == 1 else f".partial-{number}"
            names = {name: f"{path.stem}{tail}{path.suffix}" for name, path in self.items()}
            paths = ReportPaths({name: self[name].with_name(new) for name, new in names.items()})
        return paths


def same_file_as(path: Path, others: Iterable[Path]) -> Path | None:
    """The file of `others` that writing `path` would replace or change, under whatever name.

    Of a folder among `others` that is every file below it. Files are told apart by what they are,
    so that symbolic and hard links count; a `path` that is not there yet is none of them.
    """
    try:
        own = path.stat()
    except OSError:
        return None
    for other in others:
        for file in other.rglob("*") if other.is_dir() else [other]:
            with contextlib.suppress(OSError):  # a link to nothing
                if file.is_file() and os.path.samestat(own, file.stat()):
                    return file
    return None


_PACKAGES = ("torch", "transformers", "safetensors", "mistral-common", "numpy", "psutil")


def versions() -> dict[str, str | None]:
    """Python's version and those of the packages a run depends on; None where not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    found |= dict.fromkeys(_PACKAGES)
    for package in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def git_state(folder: Path) -> dict[str, str | bool] | None:
    """The commit checked out around `folder` and whether files differ from it; None outside git."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", folder, *command],
                capture_output=True, text=True, timeout=10, check=True,
            ).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return None
    return {"commit": commit, "modified": bool(changes)}


def recorded_routing(
    recorder: Recorder, model: str, n_experts: int, synthetic: bool
) -> tuple[TraceInfo, Iterator[RoutingPass]]:
    """The trace of all that `recorder` holds; a night's is made pass by pass and never held.

    `synthetic` marks routing that no model chose, as in runs on random weights.
    """
    layers = recorder.layer_table()
    n_layers = int(np.bincount(layers["pass_index"], minlength=1).max())
    top_k = int(layers["top_k"].max(initial=0))
    return TraceInfo(model, n_layers, top_k, n_experts, synthetic), _recorded_passes(recorder)


def _recorded_passes(recorder: Recorder) -> Iterator[RoutingPass]:
    for one, events in zip(recorder.pass_table(), events_of_passes(recorder), strict=True):
        yield RoutingPass(
            "decode" if one["decode"] else "prefill",
            tuple(tuple(map(tuple, event.ids)) for event in events),
            int(one["prompt"]),
            tuple(e.waited for e in events) if any(e.waited for e in events) else (),
        )


Status = Literal["completed", "interrupted", "failed"]


@dataclass(frozen=True)
class RunInfo:
    """What only the caller knows of a run; plain JSON values in the mappings.

    `settings` are all options, also those that the command leaves at their defaults. `n_threads`
    are the CPU threads that computed experts.
    """

    status: Status = "completed"
    started_unix_s: float | None = None
    command: Sequence[str] = ()
    settings: dict[str, Any] = field(default_factory=dict)
    n_threads: int = 1
    hardware: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    notes: Sequence[str] = ()
    samples: Sequence[Sample] = ()


def write_reports(
    recorder: Recorder,
    paths: ReportPaths,
    info: RunInfo,
    summary: RunSummary,
    routing: tuple[TraceInfo, Iterable[RoutingPass]] | None = None,
) -> list[Path]:
    """Write all files atomically and return where they are.

    A run that did not complete never replaces files of an earlier one, complete or not: where any
    is in the way, all of its own are named `*.partial.*`. A run that finished no forward pass, or
    recorded nothing (`--no-record`), writes nothing. `routing` is the trace for `paths["routing"]`.
    Raises UserError where the files cannot be written; no temporary file stays behind.
    """
    if not (recorder.enabled and len(recorder.pass_table())):
        return []
    if routing is None:
        paths = ReportPaths({name: paths[name] for name in paths if name != "routing"})
    if info.status != "completed":
        paths = paths.beside_others()
    tables = {
        "breakdown": breakdown_rows(recorder),
        "cachehit": cachehit_rows(recorder),
        "expert_choices": expert_choice_rows(recorder),
        "token_gen_time": token_rows(recorder, info.samples),
    }
    lines: dict[Path, Iterable[str]] = {
        paths[name]: _csv_lines(with_prompts(rows, recorder)) for name, rows in tables.items()
    }
    lines[paths["cpu_freq_avg"]] = _csv_lines(frequency_rows(info.samples))
    lines[paths["expert_counts"]] = _csv_lines(expert_count_rows(recorder))
    if routing is not None and "routing" in paths:
        lines[paths["routing"]] = trace_lines(*routing)
    document = _finite(_run_document(paths, info, summary))
    lines[paths["run_json"]] = [json.dumps(document, indent=2, allow_nan=False, default=str) + "\n"]
    try:
        write_together(lines)
    except OSError as error:
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        make_room = "make room there, or " if is_full else ""
        raise UserError(
            f"expected to write {error.filename}, but found: {error.strerror}: {make_room}send the "
            "run's files elsewhere with --output-dir"
        ) from error
    return list(lines)


def _run_document(paths: ReportPaths, info: RunInfo, summary: RunSummary) -> dict[str, Any]:
    facts = vars(info).copy()
    started_unix_s, calibration = facts.pop("started_unix_s"), facts["calibration"]
    del facts["samples"]
    folder = paths["run_json"].parent
    files = {name: os.path.relpath(path, folder) for name, path in paths.items()}
    del files["run_json"]
    return {
        "format_version": 1,
        **facts,
        "started": None if started_unix_s is None else _utc(started_unix_s),
        "written": _utc(time.time()),
        "versions": {"tool": VERSION, **versions()},
        "git": git_state(Path(__file__).parent),
        "calibration": None if calibration is None else _measured(calibration),
        "summary": summary.to_json(),
        "files": files,
    }


def _utc(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, timezone.utc).isoformat(timespec="seconds")


def _measured(calibration: dict[str, Any]) -> dict[str, Any]:
    """`calibration` with null for the costs of copies where no accelerator was there to copy to.

    The planner's stand-in for them is a link that is all but closed: no measurement.
    """
    costs = dict(calibration.get("costs") or {})
    if not isfinite((costs.get("gpu") or {}).get("expert_us", 0.0)):
        costs |= dict.fromkeys([name for name in costs if "copy" in name or "shared" in name])
    return calibration | {"costs": costs}


def _finite(value: Any) -> Any:
    """`value` with null for what JSON cannot say, such as the infinite cost of no accelerator."""
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def _csv_lines(rows: Iterable[Row]) -> Iterator[str]:
    """One line at a time: no table is held as text. No cell has a comma in it."""
    return (",".join(map(_cell, row)) + "\n" for row in rows)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.9g}" if isinstance(value, float) else str(value)
