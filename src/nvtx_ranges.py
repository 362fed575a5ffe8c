"""NVTX ranges for Nsight Systems: named spans per forward pass and per layer, free when off."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import nvtx

_OFF: AbstractContextManager[None] = nullcontext()


class NvtxRanges:
    """Named ranges on the calling thread when `enabled`; else every call returns at once.

    `library` is the nvtx module or a stand-in.
    """

    def __init__(self, enabled: bool, library: ModuleType | Any = nvtx) -> None:
        self.enabled = enabled
        self._library: Any = library

    def begin_pass(self, phase: str) -> None:
        """A forward pass of `phase` starts; it lasts until end_pass()."""
        if self.enabled:
            self._library.push_range(phase)

    def end_pass(self) -> None:
        """The forward pass begun last is done."""
        if self.enabled:
            self._library.pop_range()

    def layer(self, layer: int, part: str) -> AbstractContextManager[Any]:
        """The range of one part of one MoE layer, such as `layer 3 cpu experts`."""
        if not self.enabled:
            return _OFF
        annotation: AbstractContextManager[Any] = self._library.annotate(f"layer {layer} {part}")
        return annotation
