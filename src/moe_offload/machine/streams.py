"""CUDA's streams and events, emulated by threads for a machine without a GPU.

A stream runs the work submitted to it in order, on its own thread. An event marks a point in a
stream; other streams and the host can wait for it. Names and meanings are `torch.cuda`'s, so that
one piece of code orders copies and compute on both. And on both `is_out_of_memory` tells a device
without room from any other failure.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Final

import torch

_IDLE_S: Final = 0.2  # how soon an idle thread notices that the program is over


_Work = queue.SimpleQueue[Callable[[], None] | None]


class _Point:
    """One recording of an event: reached once, at `time_s`."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.time_s = 0.0

    def reach(self) -> None:
        self.time_s = time.perf_counter()
        self.reached.set()


class HostStream:
    """A thread that runs submitted work in order; work must not raise.

    Any thread may submit. `cancelled` turns true when the stream is closed with `cancel`: waits
    end at once, and work that can be skipped should look at it. A stream that nobody closed ends
    when nobody holds it any more, or with the program. (A daemon thread would be killed inside
    torch then, which aborts the process.)
    """

    def __init__(self, name: str) -> None:
        self.cancelled = threading.Event()
        self._closed = False
        self._work: _Work = queue.SimpleQueue()
        # The thread holds its queue, not the stream: else no stream would ever be given up.
        (self._thread,) = _started(self, self._work, [name])

    def submit(self, work: Callable[[], None]) -> None:
        if self._closed:
            raise RuntimeError(f"{self._thread.name} is closed")
        self._work.put(work)

    def wait_event(self, event: HostEvent) -> None:
        """Hold work submitted from now on until the event's latest recording is reached."""
        point = event.point
        if not point.reached.is_set():
            self.submit(lambda: self._wait(point))

    def synchronize(self) -> None:
        """Block the caller until everything submitted so far has run."""
        point = _Point()
        self.submit(point.reach)
        point.reached.wait()

    def close(self, cancel: bool = False) -> None:
        """Run what was submitted (or, with `cancel`, hurry through it) and end the thread."""
        if self._closed:
            return
        self._closed = True
        if cancel:
            self.cancelled.set()
        self._work.put(None)
        self._thread.join()

    def _wait(self, point: _Point) -> None:
        while not point.reached.wait(_IDLE_S):
            if self.cancelled.is_set() or _program_is_over():
                return


class HostPool:
    """A few threads that run submitted work as it comes, which must not raise.

    They end as a `HostStream`'s does.
    """

    def __init__(self, name: str, n_threads: int) -> None:
        self._work: _Work = queue.SimpleQueue()
        self._threads = _started(self, self._work, [f"{name} {i}" for i in range(n_threads)])

    def submit(self, work: Callable[[], None]) -> None:
        self._work.put(work)

    def close(self) -> None:
        """Run what was submitted and end the threads."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()


def _started(owner: object, work: _Work, names: Sequence[str]) -> list[threading.Thread]:
    """A thread of each name that runs `work` until nobody holds `owner` any more."""
    threads = [threading.Thread(target=_run, args=(work,), name=name) for name in names]
    for thread in threads:
        thread.start()
        weakref.finalize(owner, work.put, None)
    return threads


def _run(queued: _Work) -> None:
    while True:
        try:
            work = queued.get(timeout=_IDLE_S)
        except queue.Empty:
            if _program_is_over():
                return
            continue
        if work is None:
            return
        work()
        del work  # it may be the last to hold the stream


def _program_is_over() -> bool:
    return not threading.main_thread().is_alive()


class HostEvent:
    """A point in a `HostStream`; one never recorded counts as reached, as in CUDA."""

    def __init__(self) -> None:
        self.point = _Point()
        self.point.reached.set()

    def record(self, stream: HostStream) -> None:
        """Move the event behind the work submitted so far; earlier waits keep the old point."""
        self.point = _Point()
        stream.submit(self.point.reach)

    def query(self) -> bool:
        return self.point.reached.is_set()

    def synchronize(self) -> None:
        self.point.reached.wait()

    def elapsed_time(self, later: HostEvent) -> float:
        """Milliseconds from this event to `later`; both reached."""
        return (later.point.time_s - self.point.time_s) * 1e3


# torch's allocator has an exception of its own. What allocates for itself has not: cuBLAS, whose
# handle on a full GPU fails with either status; cuDNN, which attention may use; CUDA, which loads a
# kernel's code at its first launch; Triton, likewise; and the CPU's allocator.
_SIGNS = (
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "allocate memory",
)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether `error` says that there was no room, on whatever device."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)
