"""Background copies of an expert's block from host memory into a cache slot.

Copies run in a stream of their own and never block the host. Two orders keep them safe, both
enforced between streams, not by the host:

    ready     a computation that reads a slot waits until the copy into it is done
    released  a copy into a slot waits until the last computation that reads it is done

Without the second, an eviction would overwrite weights that a running kernel still reads. One class
holds that logic; its streams are CUDA's, or threads with a real memcpy (`HostFetcher`), so that the
order tested without a GPU is the order that holds on one.
"""

from __future__ import annotations

import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_offload.machine.streams import HostEvent, HostStream

# A whole Mixtral expert at once takes a core for 30 ms and then rests, so that what runs beside it
# is slowed or not by luck; memcpy is as fast in chunks of this size (measured: 256 KiB to 64 MiB).
_CHUNK_BYTES = 1 << 22
# What a GPU's copy engine may find queued without a gap: 1.3 ms at 25 GB/s, which another copy in
# that direction then waits at most. Not measured on a GPU yet.
_CUDA_CHUNK_BYTES = 1 << 25


class CopyCancelledError(Exception):
    """The fetcher was closed, or the program interrupted, before the copy began."""


@dataclass(eq=False)
class Copy:
    """One copy into `slot`; until it is `done`, `source` keeps its memory alive.

    `error` is final then, and with one the slot's bytes are undefined. Of a copy that is never
    `issued`, a Ctrl-C came in between, nobody knows how far it came.
    """

    slot: int
    source: Tensor | None
    stream: Any
    ready: Any
    issued: bool = False
    error: Exception | None = None
    done: bool = False


class ExpertFetcher(ABC):
    """Copies blocks into `slots`, uint8 [n_slots, block_bytes], on its own stream.

    One host thread drives it. All computation that reads slots is on one stream, the one handed to
    `wait_ready` and `mark_released`. A copy that fails is reported by `poll`, never raised.
    """

    def __init__(self, slots: Tensor, copy_streams: list[Any]) -> None:
        self.slots = slots
        self.begun = 0  # copies, of which
        self.copies = 0  # have ended well
        self._streams = copy_streams
        self._latest: dict[int, Copy] = {}
        self._released: dict[int, Any] = {}
        self._in_flight: list[Copy] = []

    @property
    def in_flight(self) -> int:
        """Copies that `poll` has not reported yet."""
        return len(self._in_flight)

    def slots_in_flight(self) -> set[int]:
        """The slots of those copies."""
        return {copy.slot for copy in self._in_flight}

    def sources_in_flight(self) -> set[int]:
        """The addresses that copies under way still read from."""
        return {
            copy.source.data_ptr()
            for copy in self._in_flight
            if copy.source is not None and not (copy.issued and copy.ready.query())
        }

    def fetch(self, slot: int, source: Tensor) -> None:
        """Start copying `source`, uint8 [block_bytes], into a slot; returns at once.

        The copy waits for computation on the slot that was issued before this call, and for an
        earlier copy into it. On CUDA `source` must be pinned, or the call itself copies.
        """
        assert source.shape == self.slots.shape[1:] and source.is_contiguous(), source.shape
        stream = self._streams[self.begun % len(self._streams)]
        self.begun += 1
        copy = Copy(slot, source, stream, self._new_event())
        self._in_flight.append(copy)
        self._wait_released(slot, stream)
        if slot in self._latest and not self._latest[slot].done:
            stream.wait_event(self._latest[slot].ready)
        try:
            self._enqueue(copy, source, stream)
        except Exception as error:  # reported by poll(), whatever it is
            copy.error = error
        copy.ready.record(stream)
        self._latest[slot] = copy
        copy.issued = True

    def poll(self) -> list[Copy]:
        """The copies that ended since the last call, in the order they were started."""
        before = self._in_flight
        self._in_flight = [copy for copy in before if not self._has_ended(copy)]
        return [copy for copy in before if copy.done]

    def wait_ready(self, slots: Iterable[int], stream: Any) -> list[Copy]:
        """Make `stream` wait for the latest copy into each slot; the host does not.

        Returns the copies that have not been seen to end: check their `error` once the work behind
        this wait has run.
        """
        copies = [self._latest[slot] for slot in slots if slot in self._latest]
        waiting = [copy for copy in copies if not copy.done or copy.error is not None]
        for copy in waiting:
            stream.wait_event(copy.ready)
        return waiting

    def mark_released(self, slots: Iterable[int], event: Any) -> None:
        """Note that every use of the slots so far lies before `event`, which is recorded."""
        self._released.update(dict.fromkeys(slots, event))

    def drain(self) -> list[Copy]:
        """Block until no copy is in flight; returns what `poll` had not reported."""
        for copy in self._in_flight:
            try:
                copy.ready.synchronize()
            except Exception as error:  # CUDA reports a failed copy where it is asked for
                copy.error = error
        return self.poll()

    def close(self) -> None:
        """End all copies, those in flight included; the slots may be freed afterwards."""
        self.drain()

    @abstractmethod
    def _new_event(self) -> Any: ...

    @abstractmethod
    def _enqueue(self, copy: Copy, source: Tensor, stream: Any) -> None: ...

    def _wait_released(self, slot: int, stream: Any) -> None:
        event = self._released.get(slot)
        if event is not None:
            stream.wait_event(event)

    def _has_ended(self, copy: Copy) -> bool:
        try:
            if not copy.issued:
                copy.stream.synchronize()
                copy.error = CopyCancelledError(f"copy into slot {copy.slot}")
            if copy.error is None and not copy.ready.query():
                return False
        except Exception as error:  # see drain()
            copy.error = error
        copy.done = True
        copy.source = None
        self.copies += copy.error is None
        return True


class CudaFetcher(ExpertFetcher):
    """Copies from pinned host memory over one CUDA stream.

    A card has one copy engine for this direction, which serves first come first: copies go in
    chunks with gaps, so that whatever else must be sent waits for a chunk, not for all experts.
    `cuda` offers `torch.cuda`'s Stream, Event, current_stream and stream.
    """

    def __init__(self, slots: Tensor, cuda: Any = torch.cuda) -> None:
        stream = cuda.Stream(device=slots.device)
        # The allocator may have taken the slots from memory that queued work still uses.
        stream.wait_stream(cuda.current_stream(slots.device))
        super().__init__(slots, [stream])
        self._cuda = cuda
        self._gap_stream = cuda.Stream(device=slots.device)
        self._gap_events = self._new_event(), self._new_event()
        self._ungapped_bytes = 0

    def _new_event(self) -> Any:
        # Blocking: a host that waits (`drain`) sleeps, and takes no core from the CPU's experts.
        return self._cuda.Event(blocking=True)

    def _enqueue(self, copy: Copy, source: Tensor, stream: Any) -> None:
        target = self.slots[copy.slot]
        with self._cuda.stream(stream):
            for start in range(0, len(source), _CUDA_CHUNK_BYTES):
                part = slice(start, min(start + _CUDA_CHUNK_BYTES, len(source)))
                self._ungapped_bytes += part.stop - start
                if self._ungapped_bytes > _CUDA_CHUNK_BYTES:
                    self._leave_gap(stream)
                    self._ungapped_bytes = part.stop - start
                target[part].copy_(source[part], non_blocking=True)

    def _leave_gap(self, stream: Any) -> None:
        """Let others at the copy engine: it serves a stream for as long as more is ready there.

        A way over another stream and back makes what follows ready only after what came before.
        """
        there, back = self._gap_events
        there.record(stream)
        self._gap_stream.wait_event(there)
        back.record(self._gap_stream)
        stream.wait_event(back)


class HostFetcher(ExpertFetcher):
    """The same on a machine without a GPU: a thread and a real memcpy.

    `emulate_pcie_gbps` (1e9 B/s) stretches each copy to what such a link would take, chunk by
    chunk, so that it takes the cores and the DRAM evenly; it cannot make memcpy faster.
    `before_copy` is called with the slot on the copying thread before each copy: it may sleep, or
    raise to make the copy fail. `n_streams` above 1 lets copies overtake each other.
    """

    def __init__(
        self,
        slots: Tensor,
        emulate_pcie_gbps: float | None = None,
        before_copy: Callable[[int], None] | None = None,
        n_streams: int = 1,
    ) -> None:
        super().__init__(slots, [HostStream(f"expert copy {i}") for i in range(n_streams)])
        self._s_per_byte = 1e-9 / emulate_pcie_gbps if emulate_pcie_gbps else 0.0
        self._before_copy = before_copy
        self._link_free_s = 0.0

    def close(self) -> None:
        """Finish the copies that have begun; the others end with `CopyCancelledError`."""
        for stream in self._streams:
            stream.close(cancel=True)

    def _new_event(self) -> HostEvent:
        return HostEvent()

    def _enqueue(self, copy: Copy, source: Tensor, stream: HostStream) -> None:
        target = self.slots[copy.slot]
        stream.submit(lambda: self._copy(copy, source, target, stream))

    def _copy(self, copy: Copy, source: Tensor, target: Tensor, stream: HostStream) -> None:
        try:
            if stream.cancelled.is_set():
                raise CopyCancelledError(f"copy into slot {copy.slot}")
            if self._before_copy is not None:
                self._before_copy(copy.slot)
            self._copy_paced(source, target, stream)
        except Exception as error:  # reported by poll(), whatever it is
            copy.error = error

    def _copy_paced(self, source: Tensor, target: Tensor, stream: HostStream) -> None:
        """One thread, as a DMA engine takes no cores: torch's copy_ would use all of them."""
        # Counted from when the link became free: oversleeping does not add up over the chunks.
        start_s = max(time.perf_counter(), self._link_free_s)
        self._link_free_s = start_s + source.nbytes * self._s_per_byte
        chunk_bytes = _CHUNK_BYTES if self._s_per_byte else source.nbytes
        for offset in range(0, source.nbytes, chunk_bytes):
            end = min(offset + chunk_bytes, source.nbytes)
            ctypes.memmove(target.data_ptr() + offset, source.data_ptr() + offset, end - offset)
            end_s = start_s + end * self._s_per_byte
            stream.cancelled.wait(max(0.0, end_s - time.perf_counter()))


def make_fetcher(
    device: torch.device | str, slots: Tensor, emulate_pcie_gbps: float | None = None
) -> ExpertFetcher:
    """The fetcher of `device` for `slots`, uint8 [n_slots, block_bytes] on that device."""
    if torch.device(device).type == "cuda":
        return CudaFetcher(slots)
    return HostFetcher(slots, emulate_pcie_gbps)
