"""`torch.cuda`'s streams and events acted out by threads: the CUDA back end without a GPU.

Copies to the device pass through one engine, as on a card: first come, first served, whatever the
stream, and a stream is served for as long as its next work is a copy too.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moe_offload.machine.streams import HostEvent, HostStream


class CopyEngine:
    """Hands itself to one stream at a time, in the order in which they asked."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.n_asked = 0
        self._n_served = 0

    def take(self) -> None:
        with self._changed:
            number, self.n_asked = self.n_asked, self.n_asked + 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._n_served == number)

    def give(self) -> None:
        with self._changed:
            self._n_served += 1
            self._changed.notify_all()

    def wait_for_askers(self, n: int) -> None:
        """Until `n` have asked since the start, served or not."""
        with self._changed:
            assert self._changed.wait_for(lambda: self.n_asked >= n, timeout=20)


class EmulatedStream(HostStream):
    def __init__(self, name: str, engine: CopyEngine) -> None:
        self._engine = engine
        self._has_engine = False
        self._kinds: deque[str] = deque()  # of the work queued, all but marks
        super().__init__(name)

    def submit(self, work: Callable[[], None]) -> None:
        self._queue("other", work)

    def mark(self, work: Callable[[], None]) -> None:
        """An event: no copy, and yet nothing that makes the next copy wait."""
        super().submit(work)

    def copy(self, work: Callable[[], None]) -> None:
        """A copy to the device."""
        self._queue("copy", work)

    def _queue(self, kind: str, work: Callable[[], None]) -> None:
        def run() -> None:
            if kind == "copy" and not self._has_engine:
                self._engine.take()
                self._has_engine = True
            work()
            self._kinds.popleft()
            if self._has_engine and (not self._kinds or self._kinds[0] != "copy"):
                self._has_engine = False
                self._engine.give()

        self._kinds.append(kind)
        super().submit(run)

    def wait_stream(self, other: EmulatedStream) -> None:
        event = EmulatedEvent()
        event.record(other)
        self.wait_event(event)


class EmulatedEvent(HostEvent):
    def record(self, stream: Any) -> None:
        super().record(SimpleNamespace(submit=stream.mark))  # type: ignore[arg-type]


class EmulatedCuda:
    """What `CudaFetcher` uses of `torch.cuda`; `compute` is the current stream."""

    def __init__(self, before_copy: Callable[[int], None] | None = None) -> None:
        self.engine = CopyEngine()
        self.compute = EmulatedStream("compute", self.engine)
        self.before_copy = before_copy
        self._entered: list[EmulatedStream] = []
        self._created: list[EmulatedStream] = []

    def Stream(self, device: Any) -> EmulatedStream:
        self._created.append(EmulatedStream("copy", self.engine))
        return self._created[-1]

    def Event(self, blocking: bool) -> EmulatedEvent:
        return EmulatedEvent()

    def current_stream(self, device: Any = None) -> EmulatedStream:
        return self._entered[-1] if self._entered else self.compute

    @contextmanager
    def stream(self, stream: EmulatedStream) -> Iterator[None]:
        self._entered.append(stream)
        yield
        self._entered.pop()

    def close(self) -> None:
        for stream in (*self._created, self.compute):
            stream.close()


class DeviceSlots:
    """Slots whose `copy_` is asynchronous on the emulated current stream."""

    def __init__(self, memory: Tensor, cuda: EmulatedCuda) -> None:
        self.memory, self.cuda = memory, cuda
        self.shape, self.device = memory.shape, torch.device("cpu")

    def __getitem__(self, slot: int) -> DeviceMemory:
        return DeviceMemory(self.memory[slot], self.cuda, slot)


class DeviceMemory:
    """A part of one slot, or of none (-1)."""

    def __init__(self, memory: Tensor, cuda: EmulatedCuda, slot: int = -1) -> None:
        self.memory, self.cuda, self.slot = memory, cuda, slot

    def __getitem__(self, part: slice) -> DeviceMemory:
        return DeviceMemory(self.memory[part], self.cuda, self.slot)

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking, "the host would wait for the copy"

        def work() -> None:
            if self.cuda.before_copy is not None:
                self.cuda.before_copy(self.slot)
            self.memory.copy_(source)

        self.cuda.current_stream().copy(work)
