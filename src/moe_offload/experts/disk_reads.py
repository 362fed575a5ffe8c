"""Blocks on their way from disk: read in pieces by a few threads, those asked for first.

Each thread takes the checksum of the piece that it has read while the others read on, so that
neither the disk nor a check waits for the other; the last one joins the checksums.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from torch import Tensor

from moe_offload.checkpoint.block_file import BlockFile
from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.kernels.bindings import CpuKernels, zlib_crc32
from moe_offload.machine.streams import HostPool

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

    `told` is called, on any thread, when a read is done; `kernels` take the checksums, where there
    are any. `busy_s` is how long at least one piece was being read. UserError when a file cannot be
    opened.
    """

    def __init__(
        self,
        layers: Sequence[MoeLayer],
        told: Callable[[], None],
        kernels: CpuKernels | None = None,
    ) -> None:
        self._crc32 = zlib_crc32 if kernels is None else kernels.crc32
        self.busy_s = 0.0
        self._told = told
        self._is_closed = False
        self._lock = threading.Lock()  # never held by the thread that drives the model
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
        """Start a read, unless it has been.

        One step, so that an interrupt leaves nothing half begun.
        """
        self._readers.submit(partial(self._begin, read))

    def close(self) -> None:
        """End when the pieces under way have; the others are given up, and the files closed."""
        self._is_closed = True
        self._readers.close()
        for file in self._files:
            file.close()
        self._files.clear()

    def _begin(self, read: Read) -> None:
        """On a reader's thread: make pieces of it, and carry one of all out."""
        with self._lock:
            if read.checksums:
                return
            read.checksums = [None for _ in self._files[read.layer].pieces]
            self._open.append(read)
        for _ in read.checksums[1:]:
            self._readers.submit(self._carry_out_next)
        self._carry_out_next()

    def _carry_out_next(self) -> None:
        """On a reader's thread: the first piece of what has waited longest and is asked for."""
        with self._lock:
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
            self._told()

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
