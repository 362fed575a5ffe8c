"""Blocks on their way from disk: read in pieces by a few threads, those asked for first.

Each thread takes the checksum of the piece that it has read while the others read on, so that
neither the disk nor a check waits for the other; the last one joins the checksums.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Final

from torch import Tensor

from moe_offload.checkpoint.block_file import BlockFile
from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.experts.costs import DiskCost
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.bindings import CpuKernels, zlib_crc32
from moe_offload.machine.streams import HostPool

_SCRATCH_BYTES: Final = 64 << 20  # that a measurement reads into
_MEASURED_S: Final = 0.3
_MEASURED_ROUNDS: Final = 6
N_READERS: Final = 4  # as many as saturate an NVMe disk with reads of a megabyte or more


@dataclass(eq=False)
class Read:
    """One block on its way into `out`, page-aligned uint8 [block_bytes].

    The thread that drives the model may change `is_ahead` (nobody asked for it yet, so all others
    go first) and set `is_cancelled` (no further piece is read) at any time. `error` and `is_whole`
    are final once it `is_done`; nobody writes to `out` then.
    """

    layer: int
    expert: int
    out: Tensor
    is_ahead: bool
    is_cancelled: bool = False
    is_done: bool = False
    error: Exception | None = None
    # What follows belongs to the readers.
    checksums: list[int | None] = field(default_factory=list)  # of the pieces that were read
    n_begun: int = 0  # pieces
    n_ended: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all of it has arrived, and is right."""
        return bool(self.checksums) and None not in self.checksums and self.error is None

    @property
    def is_optional(self) -> bool:
        return self.is_ahead and not self.is_cancelled


class DiskReads:
    """Reads blocks of the layers' files on threads of its own; close it in the end.

    `has_ended` is set, on any thread, when a read is done; `kernels` take the checksums, where
    there are any. `busy_s` is how long at least one piece was being read. UserError when a file
    cannot be opened.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        has_ended: threading.Event,
        kernels: CpuKernels | None = None,
    ) -> None:
        self._crc32 = zlib_crc32 if kernels is None else kernels.crc32
        self.busy_s = 0.0
        self._layers = tuple(layers)
        self._has_ended = has_ended
        self._is_closed = False
        self._lock = threading.Lock()  # never held by the thread that drives the model
        self._started: deque[Read] = deque()  # nobody has seen them yet
        self._open: list[Read] = []  # with pieces that are not begun
        self._n_active, self._active_since_s = 0, 0.0
        self._files: list[BlockFile] = []
        self._readers = HostPool("expert read", N_READERS)
        try:
            for layer in layers:
                self._files.append(BlockFile(layer))
        except BaseException:
            self.close()
            raise

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache."""
        return all(file.is_direct for file in self._files)

    def start(self, read: Read) -> None:
        """Start a read; of one that has been started, nothing but its end is made sure of."""
        self._started.append(read)
        self._readers.submit(self._carry_out_next)

    def measured(self, compute: Callable[[], None]) -> DiskCost:
        """What reads of other blocks each time cost, one alone and several at once.

        Each behind a call of `compute`, for in a decode step the disk has rested meanwhile, and
        before another, whose threads have rested then. `busy_s` leaves them out.
        """
        busy_s = self.busy_s
        layout, n_experts = self._layers[0].layout, self._layers[0].n_experts
        alike = [n for n, layer in enumerate(self._layers) if layer.layout == layout]
        block_bytes = layout.block_bytes
        most = max(1, min(N_READERS, _SCRATCH_BYTES // block_bytes, n_experts))
        scratch = ExpertStore([layout], [most])
        scratch.blocks(0).zero_()
        seconds: dict[int, list[float]] = {1: [], most: []}
        later_s: list[float] = []  # that `compute` ends behind a read
        turn, end_s = 0, time.perf_counter() + _MEASURED_S
        while turn < _MEASURED_ROUNDS or time.perf_counter() < end_s:
            for n, times_s in seconds.items():
                turn += 1
                compute()
                marks_s = [time.perf_counter()]
                compute()
                marks_s.append(time.perf_counter())
                self._read_all(alike[turn % len(alike)], turn * most, scratch, n)
                marks_s.append(time.perf_counter())
                compute()
                marks_s.append(time.perf_counter())
                before_s, read_s, after_s = (b - a for a, b in pairwise(marks_s))
                times_s.append(read_s)
                later_s.append(after_s - before_s)
        self.busy_s = busy_s
        one_s, most_s = (median(seconds[n]) for n in (1, most))
        # Where several are no slower than one, such as of tiny experts, there is no speed to tell.
        each_s = (most_s - one_s) / (most - 1) if most_s > one_s else max(most_s / most, 1e-9)
        latency_us, resume_us = (1e6 * max(0.0, s) for s in (one_s - each_s, median(later_s)))
        return DiskCost(block_bytes / each_s / 1e9, latency_us, resume_us)

    def _read_all(self, layer: int, first: int, scratch: ExpertStore, n: int) -> None:
        """`n` experts of a layer from `first` on, at once; UserError as for any."""
        n_experts = self._layers[layer].n_experts
        reads = [
            Read(layer, (first + place) % n_experts, scratch.block(0, place), is_ahead=False)
            for place in range(n)
        ]
        for read in reads:
            self.start(read)
        while not all(read.is_done for read in reads):
            self._has_ended.wait()
            self._has_ended.clear()
        for read in reads:
            if read.error is not None:
                raise read.error

    def close(self) -> None:
        """End when the pieces under way have; the others are given up, and the files closed."""
        self._is_closed = True
        self._readers.close()
        for file in self._files:
            file.close()
        self._files.clear()

    def _open_started(self) -> None:
        """With the lock: make pieces of what was started, each to be carried out by a thread."""
        while self._started:
            read = self._started.popleft()
            if not read.checksums:
                read.checksums = [None for _ in self._files[read.layer].pieces]
                self._open.append(read)
                # All of them: where `start` was interrupted, this call is another read's.
                for _ in read.checksums:
                    self._readers.submit(self._carry_out_next)

    def _carry_out_next(self) -> None:
        """On a reader's thread: the first piece of what has waited longest and is asked for."""
        with self._lock:
            self._open_started()
            if not self._open:
                return
            read = min(self._open, key=lambda one: one.is_optional)
            piece = read.n_begun
            read.n_begun += 1
            if read.n_begun == len(read.checksums):
                self._open.remove(read)
        if not (read.is_cancelled or read.error or self._is_closed):
            try:
                self._read(read, piece)
            except Exception as error:  # told to whoever waits for it
                read.error = error
        with self._lock:
            read.n_ended += 1
            is_last = read.n_ended == len(read.checksums)
        if is_last:
            if read.is_whole:
                self._check(read)
            read.is_done = True
            self._has_ended.set()

    def _read(self, read: Read, piece: int) -> None:
        file = self._files[read.layer]
        place = file.pieces[piece]
        self._note_active(1)
        try:
            file.read(read.expert, read.out, place)
        finally:
            self._note_active(-1)
        read.checksums[piece] = self._crc32(read.out[place])  # others run meanwhile

    def _check(self, read: Read) -> None:
        file = self._files[read.layer]
        try:
            file.check(read.expert, [crc for crc in read.checksums if crc is not None])
        except Exception as error:
            read.error = error

    def _note_active(self, change: int) -> None:
        """A piece is begun (1) or has ended (-1)."""
        with self._lock:
            before, self._n_active = self._n_active, self._n_active + change
            if not before:
                self._active_since_s = time.perf_counter()
            elif not self._n_active:
                self.busy_s += time.perf_counter() - self._active_since_s
