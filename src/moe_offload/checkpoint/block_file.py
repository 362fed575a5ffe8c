"""One layer's experts file, read past the page cache, piece by piece of a block."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from torch import Tensor

from moe_offload.checkpoint.block import BLOCK_ALIGNMENT
from moe_offload.checkpoint.folders import PREPARE_AGAIN
from moe_offload.checkpoint.prepared import MoeLayer
from moe_offload.errors import UserError

# So that a block of megabytes is a piece for each of a few threads, and no piece takes long.
_PIECES_OF_A_BLOCK: Final = 4
_LEAST_BYTES, _MOST_BYTES = 1 << 20, 8 << 20


class BlockFile:
    """Reads the blocks of one MoE layer into page-aligned memory; close it in the end.

    `is_direct`: reads go past the page cache (O_DIRECT). Where the system refuses that, they pass
    through it, and it is told to keep none of them. UserError when the file cannot be opened.
    Thread-safe for distinct pieces.
    """

    def __init__(self, layer: MoeLayer) -> None:
        self._layer = layer
        block_bytes = layer.layout.block_bytes
        piece_bytes = min(max(block_bytes // _PIECES_OF_A_BLOCK, _LEAST_BYTES), _MOST_BYTES)
        piece_bytes = -(-piece_bytes // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
        starts = range(0, block_bytes, piece_bytes)
        self.pieces = [slice(start, min(start + piece_bytes, block_bytes)) for start in starts]
        """The pieces of a block, in its order."""
        self._later = [_power(8 * (piece.stop - piece.start)) for piece in self.pieces[1:]]
        try:
            self._file, self.is_direct = _opened(layer)
        except OSError as error:
            raise UserError(f"cannot read {layer.file}: {error.strerror}") from error

    def read(self, expert: int, out: Tensor, piece: slice) -> None:
        """Fill one of `pieces` of `out`, contiguous CPU uint8 [block_bytes] at a page's start.

        UserError when the file cannot be read or ends early.
        """
        layer, position = self._layer, piece.start
        start, view = layer.block_offset_bytes(expert), out.numpy().data
        while position < piece.stop:
            try:
                n_bytes = os.preadv(self._file, [view[position : piece.stop]], start + position)
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
            position += n_bytes
        if not self.is_direct and hasattr(os, "posix_fadvise"):
            n_bytes = piece.stop - piece.start
            with suppress(OSError):  # advice: some file systems know none
                os.posix_fadvise(self._file, start + piece.start, n_bytes, os.POSIX_FADV_DONTNEED)

    def check(self, expert: int, checksums: Sequence[int]) -> None:
        """UserError where `checksums`, the CRC-32 of each piece, do not make the manifest's."""
        whole = checksums[0]
        for checksum, times in zip(checksums[1:], self._later, strict=True):
            whole = _product(times, whole) ^ checksum
        if whole != self._layer.block_checksums[expert]:
            raise UserError(
                f"{self._layer.file} is corrupt: the checksum of expert {expert} does not match "
                f"the manifest; {PREPARE_AGAIN}"
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


# A CRC-32 is a polynomial over GF(2) modulo this one, its highest bit last. Where n bits follow, it
# is multiplied by x^n, and with the checksum of those bits added it is that of both.
_POLYNOMIAL: Final = 0xEDB88320
_ONE: Final = 1 << 31


def _product(a: int, b: int) -> int:
    """a * b modulo the CRC's polynomial."""
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (_POLYNOMIAL if b & 1 else 0)  # times x
    return product


def _power(n: int) -> int:
    """x^n modulo the CRC's polynomial."""
    result, square = _ONE, _ONE >> 1
    while n:
        if n & 1:
            result = _product(result, square)
        square = _product(square, square)
        n >>= 1
    return result
