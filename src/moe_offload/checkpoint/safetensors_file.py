"""One safetensors file: its header, plain reads of its bytes, and writing it without a torn state.

The `safetensors` package decides what a valid file is. Our own are three things it does not do:
reading through `pread` (it maps the file, and mapped pages count as resident memory, so a map would
let the page cache break the memory bound of a streaming conversion), data that starts at a multiple
of 4096 bytes, and writing tensors piece by piece under a temporary name.
"""

from __future__ import annotations

import errno
import json
import os
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_offload.errors import UserError
from moe_offload.files import require_regular, sync_folder

DATA_ALIGNMENT: Final = 4096  # of the first tensor's data in the files we write
TEMPORARY_SUFFIX: Final = ".partial"

DTYPES: Final[Mapping[str, torch.dtype]] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a file; `offset_bytes` counts from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def n_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def checksum(data: Tensor | bytes) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor or of a bytes object."""
    if isinstance(data, Tensor):
        return zlib.crc32(as_bytes(data).numpy().data)
    return zlib.crc32(data)


def as_bytes(tensor: Tensor) -> Tensor:
    """A contiguous CPU tensor as uint8 [n_bytes], sharing its memory."""
    return tensor.reshape(-1).view(torch.uint8)


def plan_header(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, list[TensorEntry]]:
    """The header of a file of these tensors in this order, and where each of them lies.

    The header is padded with spaces so that the data starts at a multiple of `DATA_ALIGNMENT`.
    """
    position = 0
    fields: dict[str, object] = {"__metadata__": metadata}
    for name, dtype, shape in tensors:
        stop = position + torch.Size(shape).numel() * dtype.itemsize
        fields[name] = {
            "dtype": _CODES[dtype],
            "shape": list(shape),
            "data_offsets": [position, stop],
        }
        position = stop
    text = json.dumps(fields, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    header = struct.pack("<Q", length) + text.ljust(length)
    entries, position = [], len(header)
    for name, dtype, shape in tensors:
        entries.append(TensorEntry(name, dtype, shape, position))
        position += entries[-1].n_bytes
    return header, entries


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, in file order.

    A tensor of a dtype that `DTYPES` lacks appears as its bytes, uint8 [n_bytes]. UserError when
    the file is missing, or when it is none that the safetensors package would read.
    """
    try:
        require_regular(path)
        # Checks the header alone. For "pt" torch maps the file as if to write, which the system
        # refuses for one larger than its memory.
        with safe_open(path, "np"):
            pass
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            fields = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; copy or download it again") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (SafetensorError, ValueError) as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise UserError(
            f"{path} is truncated, damaged or no safetensors file ({reason:.100}); copy or "
            "download it again"
        ) from error
    entries = []
    for name, field in fields.items():
        if name != "__metadata__":
            start, stop = field["data_offsets"]
            dtype = DTYPES.get(field["dtype"])
            shape = (stop - start,) if dtype is None else tuple(field["shape"])
            entries.append(TensorEntry(name, dtype or torch.uint8, shape, 8 + length + start))
    return sorted(entries, key=lambda entry: entry.offset_bytes)


def read_into(path: Path, offset_bytes: int, out: Tensor) -> None:
    """Fill the contiguous CPU tensor `out` with the file's bytes from `offset_bytes` on.

    UserError when the file ends before `out` is full or cannot be read.
    """
    view = as_bytes(out).numpy().data
    try:
        file = os.open(path, os.O_RDONLY)
        try:
            done = 0
            while done < len(view):
                got = os.preadv(file, [view[done:]], offset_bytes + done)
                if got == 0:
                    raise UserError(
                        f"{path} is truncated: it ends {len(view) - done} bytes early; "
                        "copy it again or prepare the folder again"
                    )
                done += got
        finally:
            os.close(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


class ShardWriter:
    """Writes one safetensors file under a temporary name; `commit` makes it appear, whole.

    Tensors, or slices of them, may come in any order. Used as a context manager: leaving without
    `commit` removes the temporary file. OSError from the disk passes through.
    """

    def __init__(self, path: Path, header: bytes, file_bytes: int) -> None:
        self.path = path
        self._temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
        self._file = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            self._reserve(file_bytes)
            self._write(header, 0)
        except BaseException:
            self.__exit__()
            raise

    def _reserve(self, file_bytes: int) -> None:
        """Take the room at once, so that a full disk is known before hours of writing."""
        try:
            os.posix_fallocate(self._file, 0, file_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system can
                raise
            os.ftruncate(self._file, file_bytes)

    def write(self, offset_bytes: int, data: Tensor) -> int:
        """Write a contiguous CPU tensor at `offset_bytes` of the file; returns its checksum."""
        view = as_bytes(data).numpy().data
        self._write(view, offset_bytes)
        return zlib.crc32(view)

    def _write(self, data: bytes | memoryview, offset_bytes: int) -> None:
        view, done = memoryview(data), 0
        while done < len(view):
            done += os.pwrite(self._file, view[done:], offset_bytes + done)

    def commit(self) -> None:
        """Make the file durable, then visible under its name."""
        os.fsync(self._file)
        self._temporary.replace(self.path)
        sync_folder(self.path.parent)

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)
        self._temporary.unlink(missing_ok=True)
