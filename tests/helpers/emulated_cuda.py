"""`torch.cuda`'s streams and events acted out by threads: the CUDA back end without a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from moe_offload.machine.streams import HostEvent, HostStream


class EmulatedStream(HostStream):
    def wait_stream(self, other: HostStream) -> None:
        event = HostEvent()
        event.record(other)
        self.wait_event(event)


class EmulatedCuda:
    """What `CudaFetcher` uses of `torch.cuda`; `compute` is the current stream."""

    def __init__(self, before_copy: Callable[[int], None] | None = None) -> None:
        self.compute = EmulatedStream("compute")
        self.before_copy = before_copy
        self._entered: list[EmulatedStream] = []
        self._created: list[EmulatedStream] = []

    def Stream(self, device: Any) -> EmulatedStream:
        self._created.append(EmulatedStream("copy"))
        return self._created[-1]

    def Event(self, enable_timing: bool, blocking: bool) -> HostEvent:
        return HostEvent()

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

    def __getitem__(self, slot: int) -> DeviceSlot:
        return DeviceSlot(self, slot)


class DeviceSlot:
    def __init__(self, slots: DeviceSlots, slot: int) -> None:
        self.slots, self.slot = slots, slot

    def copy_(self, source: Tensor, non_blocking: bool) -> None:
        assert non_blocking, "the host would wait for the copy"

        def work() -> None:
            if self.slots.cuda.before_copy is not None:
                self.slots.cuda.before_copy(self.slot)
            self.slots.memory[self.slot].copy_(source)

        self.slots.cuda.current_stream().submit(work)
