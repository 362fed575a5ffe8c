"""One layer's experts file, read past the page cache, each block checked at every read."""

from __future__ import annotations

import errno
import mmap
import os
import zlib
from collections.abc import Callable
from typing import Final

from torch import Tensor

from moe_offload.checkpoint.block import BLOCK_ALIGNMENT
from moe_offload.checkpoint.folders import PREPARE_AGAIN
from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.errors import UserError

# Large enough for a disk's full speed from one thread, small enough to be given up soon.
_CHUNK_BYTES: Final = 8 << 20


class ReadCancelledError(Exception):
    """A block's read was given up; what it had written is undefined."""


class BlockFile:
    """Reads the blocks of one MoE layer into page-aligned memory; close it in the end.

    `is_direct`: reads go past the page cache (O_DIRECT). Where the system refuses that, they pass
    through it, and it is told to keep none of them. UserError when the file cannot be opened.
    Thread-safe for distinct experts.
    """

    def __init__(self, layer: MoeLayer) -> None:
        self._layer = layer
        try:
            self._file, self.is_direct = _opened(layer)
        except OSError as error:
            raise UserError(f"cannot read {layer.file}: {error.strerror}") from error

    def read(self, expert: int, out: Tensor, is_cancelled: Callable[[], bool]) -> None:
        """Fill `out`, contiguous CPU uint8 [block_bytes] at a page's start, with a block.

        `is_cancelled` is asked between pieces; ReadCancelledError then. UserError when the file
        cannot be read, ends early, or does not match its checksum.
        """
        layer, position, crc = self._layer, 0, 0
        start, view = layer.block_offset_bytes(expert), out.numpy().data
        while position < len(view):
            if is_cancelled():
                raise ReadCancelledError
            piece = view[position : position + _CHUNK_BYTES]
            try:
                n_bytes = os.preadv(self._file, [piece], start + position)
            except OSError as error:
                raise UserError(
                    f"cannot read expert {expert} of {layer.file}: {error.strerror}; see whether "
                    "its disk is there and sound, then run again"
                ) from error
            if not n_bytes or (self.is_direct and n_bytes % BLOCK_ALIGNMENT):
                missing = len(view) - position - n_bytes
                raise UserError(
                    f"{layer.file} is truncated: expert {expert} ends {missing} bytes early; "
                    f"copy the file again or {PREPARE_AGAIN}"
                )
            crc = zlib.crc32(piece[:n_bytes], crc)  # other threads run meanwhile
            position += n_bytes
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file, start, len(view), os.POSIX_FADV_DONTNEED)
        if crc != layer.block_checksums[expert]:
            raise UserError(
                f"{layer.file} is corrupt: the checksum of expert {expert} does not match the "
                f"manifest; {PREPARE_AGAIN}"
            )

    def close(self) -> None:
        """Give the file back; no read is under way, and none comes after."""
        os.close(self._file)


def _opened(layer: MoeLayer) -> tuple[int, bool]:
    """A descriptor for the file, and whether reads from it go past the page cache."""
    direct = getattr(os, "O_DIRECT", 0)
    if direct and layer.layout.block_bytes % BLOCK_ALIGNMENT == 0:
        try:
            file = os.open(layer.file, os.O_RDONLY | direct)
            try:  # some file systems refuse the first read, not the opening
                with mmap.mmap(-1, BLOCK_ALIGNMENT) as page:
                    os.preadv(file, [page], layer.data_offset_bytes)
                return file, True
            except OSError:
                os.close(file)
                raise
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
    return os.open(layer.file, os.O_RDONLY), False
