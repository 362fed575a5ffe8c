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
        self._n_open = 0

    def begin_pass(self, phase: str) -> None:
        """A forward pass of `phase` starts; it lasts until end_pass()."""
        if self.enabled:
            self.end_pass()  # one that an error cut short
            self._library.push_range(phase)
            self._n_open = 1

    def part(self, layer: int, part: str) -> None:
        """The next part of the pass starts, such as `layer 3 router`; the one before it ends."""
        if self.enabled and self._n_open:
            if self._n_open == 2:
                self._library.pop_range()
            self._library.push_range(f"layer {layer} {part}")
            self._n_open = 2

    def end_pass(self) -> None:
        """The forward pass begun last is done, and its last part."""
        while self._n_open:
            self._library.pop_range()
            self._n_open -= 1

    def layer(self, layer: int, part: str) -> AbstractContextManager[Any]:
        """A range inside a part, such as `layer 3 launch`."""
        if not self.enabled:
            return _OFF
        annotation: AbstractContextManager[Any] = self._library.annotate(f"layer {layer} {part}")
        return annotation
