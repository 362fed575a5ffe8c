"""When a GPU came to each part of a pass's layers, by its own clock.

The host only launches what a GPU does, and meets it once a layer, when it waits for the routing. So
the GPU notes in its stream where a layer's block begins, where the routing has arrived and where
the experts' sum is there; all is read when the pass has ended, which nobody waits for meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moe_offload.experts.slots import Pending, replayed_event


@dataclass
class _Marks:
    """One layer's events, the same in every pass."""

    block: Any = field(default_factory=replayed_event)
    routed: Any = field(default_factory=replayed_event)
    combined: Any = field(default_factory=replayed_event)


@dataclass(frozen=True)
class DeviceSpans:
    """A layer's time in us, without a gap: to its block, to its routing, to its experts' sum."""

    attention_us: float
    router_us: float
    experts_us: float


class DeviceClock:
    """Notes the parts of passes on `device`, whose layers run in their order."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = replayed_event()
        self._marks: dict[int, _Marks] = {}

    def begin_pass(self) -> None:
        self._record(self._began)

    def begin_block(self, layer: int) -> None:
        """Attention has been launched; the block that routes and calls the experts comes."""
        self._record(self._marks_of(layer).block)

    def routed(self, layer: int) -> None:
        """The host has the layer's routing."""
        self._record(self._marks[layer].routed)

    def combined(self, layer: int) -> None:
        """The layer's sum has been launched."""
        self._record(self._marks[layer].combined)

    def spans(self, layer: int) -> DeviceSpans:
        """The layer's, once the pass has ended on the device and before the next one begins."""
        marks = self._marks[layer]
        before = self._marks[layer - 1].combined if layer else self._began
        return DeviceSpans(
            _us(before, marks.block), _us(marks.block, marks.routed),
            _us(marks.routed, marks.combined),
        )  # fmt: skip

    def stood_still_us(self, layer: int, launches: Sequence[Pending]) -> float:
        """How long the stream stood still before those of a layer's launches that await a copy."""
        still_us, before = 0.0, self._marks[layer].routed
        for launch in launches:
            if launch.awaits_copy:
                still_us += _us(before, launch.start)
            before = launch.end
        return still_us

    def _marks_of(self, layer: int) -> _Marks:
        if layer not in self._marks:
            self._marks[layer] = _Marks()
        return self._marks[layer]

    def _record(self, event: Any) -> None:
        event.record(torch.cuda.current_stream(self._device))


def _us(event: Any, later: Any) -> float:
    return float(event.elapsed_time(later)) * 1e3
