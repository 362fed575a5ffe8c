"""Blocks on their way from disk: read in pieces by a few threads, those asked for first.

The pieces of a block are read at once and checked in their order, each while the next ones are
read, so that neither the disk nor a check waits for the other.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from torch import Tensor

from moe_offload.checkpoint.block_file import BlockFile
from moe_offload.checkpoint.prepared import MoeLayer
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
    arrived: bytearray = field(default_factory=bytearray)  # 1 for each piece that was read
    n_begun: int = 0  # pieces
    n_ended: int = 0
    n_checked: int = 0
    is_checking: bool = False
    crc: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether all of it has arrived, and is right."""
        return 0 < len(self.arrived) == self.n_checked and self.error is None

    @property
    def is_optional(self) -> bool:
        return self.is_ahead and not self.is_cancelled


class DiskReads:
    """Reads blocks of the layers' files on threads of its own; close it in the end.

    `told` is called, on any thread, when a read is done. `busy_s` is how long at least one piece
    was being read. UserError when a file cannot be opened.
    """

    def __init__(self, layers: Sequence[MoeLayer], told: Callable[[], None]) -> None:
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
            if read.arrived:
                return
            read.arrived = bytearray(len(self._files[read.layer].pieces))
            self._open.append(read)
        for _ in read.arrived[1:]:
            self._readers.submit(self._carry_out_next)
        self._carry_out_next()

    def _carry_out_next(self) -> None:
        """On a reader's thread: the first piece of what has waited longest and is asked for."""
        with self._lock:
            read = min(self._open, key=lambda one: one.is_optional)
            piece = read.n_begun
            read.n_begun += 1
            if read.n_begun == len(read.arrived):
                self._open.remove(read)
        if not (read.is_cancelled or read.error or self._is_closed):
            self._note_active(1)
            try:
                file = self._files[read.layer]
                file.read(read.expert, read.out, file.pieces[piece])
                read.arrived[piece] = 1
            except Exception as error:  # told to whoever waits for it
                read.error = error
            self._note_active(-1)
        with self._lock:
            read.n_ended += 1
            if read.is_checking:  # whoever does sees this piece as well
                return
            read.is_checking = True
        self._check(read)

    def _check(self, read: Read) -> None:
        """Go on with the checksum as far as pieces have arrived; done behind the last of them."""
        file, data, n_pieces = self._files[read.layer], read.out.numpy().data, len(read.arrived)
        while True:
            with self._lock:
                is_next_there = read.n_checked < n_pieces and read.arrived[read.n_checked]
                if read.error or not is_next_there:
                    read.is_checking = False
                    is_last = read.n_ended == n_pieces
                    break
            read.crc = zlib.crc32(data[file.pieces[read.n_checked]], read.crc)  # without the GIL
            read.n_checked += 1
        if not is_last:
            return
        if read.is_whole:
            try:
                file.check(read.expert, read.crc)
            except Exception as error:
                read.error = error
        read.is_done = True
        self._told()

    def _note_active(self, change: int) -> None:
        """A piece is begun (1) or has ended (-1)."""
        with self._lock:
            before, self._n_active = self._n_active, self._n_active + change
            if not before:
                self._active_since_s = time.perf_counter()
            elif not self._n_active:
                self.busy_s += time.perf_counter() - self._active_since_s
