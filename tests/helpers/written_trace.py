"""Writes a trace as a run does: JSON lines."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from moe_offload.simulation.traces import RoutingPass, TraceInfo, trace_lines


def write_trace(path: Path, info: TraceInfo, passes: Iterable[RoutingPass]) -> None:
    path.write_text("".join(trace_lines(info, passes)))
