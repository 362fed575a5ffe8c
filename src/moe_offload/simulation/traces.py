"""Routing traces: which experts each token chose in each layer, in memory and written to files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from moe_offload.errors import UserError
from moe_offload.simulation.packed_routing import PackedRouting, Passes, RoutingPass, packed

__all__ = ["RoutingPass", "Trace", "TraceInfo", "trace_lines", "write_trace"]


@dataclass(frozen=True)
class TraceInfo:
    """What a trace says about itself.

    `n_experts` is None where only the ids show it; `synthetic` marks routing that no model chose;
    `notes` are sentences for the reader, such as a header that disagrees with its rows;
    `expert_bytes` is the mean size of an expert where the file tells it.
    """

    model: str
    n_layers: int
    top_k: int
    n_experts: int | None
    synthetic: bool = False
    notes: tuple[str, ...] = ()
    expert_bytes: int | None = None


@dataclass(frozen=True)
class Trace:
    """A whole trace in memory; `info.n_experts` is always known here."""

    info: TraceInfo
    passes: Passes = field(repr=False)

    @cached_property
    def packed(self) -> PackedRouting:
        """The passes, packed, for what looks ahead in them."""
        return packed(self.passes)

    @property
    def n_layers(self) -> int:
        return self.info.n_layers

    @property
    def n_experts(self) -> int:
        assert self.info.n_experts is not None
        return self.info.n_experts


def write_trace(path: Path, info: TraceInfo, passes: Iterable[RoutingPass]) -> None:
    """Write a trace as JSON lines; raises UserError where the file cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as lines:
            lines.writelines(trace_lines(info, passes))
    except OSError as error:
        raise UserError(
            f"expected to write a trace to {path}, found no place for it ({error.strerror}); "
            "choose another"
        ) from None


def trace_lines(info: TraceInfo, passes: Iterable[RoutingPass]) -> Iterator[str]:
    """The lines of a trace's JSON file."""
    yield json.dumps({"routing_trace": 1, **asdict(info)}) + "\n"
    for one in passes:
        fields: dict[str, Any] = {"phase": one.phase, "ids": one.ids, "prompt": one.prompt}
        if one.waited:
            fields["waited"] = one.waited
        if one.seen:
            fields["seen"] = one.seen
        yield json.dumps(fields, separators=(",", ":")) + "\n"
