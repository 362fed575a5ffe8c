"""What records one CUDA graph after another, and what rehearses that eagerly."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch


class Rehearsal:
    """Runs eagerly, with an error where the host would wait."""

    is_open = False

    def begin(self) -> None:
        self.is_open = True
        torch.cuda.set_sync_debug_mode("error")

    def end(self) -> Callable[[], None]:
        self.abandon()
        return lambda: None

    def abandon(self) -> None:
        if self.is_open:
            torch.cuda.set_sync_debug_mode("default")
            self.is_open = False


class CudaRecorder:
    """Records one graph after another; all use one pool of memory, as they run one by one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._graph: Any = None

    @property
    def is_open(self) -> bool:
        return self._graph is not None

    def begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads of the program may use the device meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Callable[[], None]:
        self._graph.capture_end()
        replay: Callable[[], None] = self._graph.replay
        self._graph = None
        return replay

    def abandon(self) -> None:
        """End a recording that failed."""
        graph, self._graph = self._graph, None
        if graph is not None:
            with suppress(RuntimeError):  # CUDA says again that it failed
                graph.capture_end()


@contextmanager
def working_in(stream: torch.cuda.Stream, device: torch.device) -> Iterator[None]:
    """Inside, work goes to `stream`, as recording wants, in order with the current one's."""
    before = torch.cuda.current_stream(device)
    stream.wait_stream(before)
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            yield
    finally:
        before.wait_stream(stream)


@contextmanager
def without_collections() -> Iterator[None]:
    """Inside, no cycle is collected: with it another's graph or pinned memory might be given back,
    which does to CUDA what it forbids while it records."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
