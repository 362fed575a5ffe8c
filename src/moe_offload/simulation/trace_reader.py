"""Reads a routing trace from a file, in whichever of `trace_formats` it is.

Files are streamed: `TraceReader` holds one pass, whatever the file's size; `read_trace` holds
them all, one byte an expert where they are many. Anything that does not fit is a UserError with
its line number, raised when that line is read and not later.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from moe_offload.errors import UserError
from moe_offload.simulation.packed_routing import PackedRouting, RoutingPass, collected
from moe_offload.simulation.trace_formats import ExpertChoices, JsonLines, Route, TraceFormat
from moe_offload.simulation.traces import Trace

_MAX_FIRST_LINE = 1 << 20  # characters: a file without an end of line is no trace


class TraceReader:
    """Iterates over the passes of a trace file, any number of times.

    `info` is known at once: the file is read up to its first pass that holds ids. `n_experts`,
    where given, bounds the ids of a file that does not say.
    """

    def __init__(self, path: Path, n_experts: int | None = None) -> None:
        self.path = path
        self._n_experts = n_experts
        try:
            with path.open(encoding="utf-8") as lines:
                first = "\n"
                while first and (first.startswith("#") or not first.strip()):
                    first = lines.readline(_MAX_FIRST_LINE)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not text"
            raise UserError(
                f"expected a routing trace at {path}, found none that can be read ({reason}): "
                "give the expert_choices.csv or routing.jsonl of a run"
            ) from None
        kinds: dict[str, type[TraceFormat]] = {"{": JsonLines, "I": ExpertChoices, "t": Route}
        kind = kinds.get(first[:1])
        if kind is None:
            raise UserError(
                f"{path}, line 1: expected a routing trace (a header that starts with Index, or "
                f"turn,phase,step, or JSON lines), found {first.strip()[:40]!r}"
            )
        self._kind = kind
        reading = self._read()
        for one in reading.passes():
            if one.ids:
                break
        self.info = reading.info()

    def __iter__(self) -> Iterator[RoutingPass]:
        return self._read().passes()

    def _read(self) -> TraceFormat:
        return self._kind(self.path, self._n_experts)


def read_trace(path: Path, n_experts: int | None = None) -> Trace:
    """Read a whole trace; raises UserError for a file that is missing, malformed or empty.

    The file is read once, line by line. What is held takes one byte for each id (two with more
    than 256 experts), or tuples while that is little.
    """
    reader = TraceReader(path, n_experts)
    routing = PackedRouting(reader)
    if not routing.n_decoded:
        raise UserError(f"{path}: expected at least one decoded token, found {len(routing)} passes")
    known = reader.info.n_experts or n_experts
    info = replace(reader.info, n_experts=known or routing.highest + 1)
    return Trace(info, collected(routing))
