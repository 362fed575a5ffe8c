"""One safetensors file: its header, plain reads of its bytes, and writing it without a torn state.

The `safetensors` package decides what a valid file is. Our own are three things it does not do:
plain reads (it maps the file, and mapped pages count as resident memory, so a map would
let the page cache break the memory bound of a streaming conversion), data that starts at a multiple
of 4096 bytes, and writing piece by piece under a temporary name.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
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
    "F8_E8M0": torch.float8_e8m0fnu,
}
_CODES: Final = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """One array in a file or a block: `dtype` as torch names it, `offset_bytes` from the start."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


def checksum(data: Tensor | bytes) -> int:
    """CRC-32 of the bytes of a contiguous CPU tensor or of a bytes object."""
    return zlib.crc32(_view(data))


def _view(data: Tensor | bytes) -> memoryview:
    """The bytes themselves."""
    if isinstance(data, Tensor):
        return data.reshape(-1).view(torch.uint8).numpy().data
    return memoryview(data)


def plan_header(
    tensors: list[tuple[str, torch.dtype, tuple[int, ...]]], metadata: dict[str, str]
) -> tuple[bytes, list[TensorEntry]]:
    """The header of a file of these tensors in this order, and where each of them lies.

    The header is padded with spaces so that the data starts at a multiple of `DATA_ALIGNMENT`.
    """
    entries, position = [], 0
    fields: dict[str, object] = {"__metadata__": metadata}
    for name, dtype, shape in tensors:
        entry = TensorEntry(name, _name(dtype), shape, position)
        position += entry.n_bytes
        offsets = [entry.offset_bytes, position]
        fields[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": offsets}
        entries.append(entry)
    text = json.dumps(fields, separators=(",", ":")).encode()
    length = -(-(8 + len(text)) // DATA_ALIGNMENT) * DATA_ALIGNMENT - 8
    header = struct.pack("<Q", length) + text.ljust(length)
    return header, [replace(e, offset_bytes=len(header) + e.offset_bytes) for e in entries]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def read_header(path: Path) -> list[TensorEntry]:
    """The tensors of a safetensors file, in file order.

    A tensor of F4, two numbers to a byte, appears as its bytes, uint8 with half as many columns;
    one of another dtype that `DTYPES` lacks as uint8 [n_bytes]. UserError when the file is
    missing, or when it is none that the safetensors package would read.
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
            dtype, shape = DTYPES.get(field["dtype"]), tuple(field["shape"])
            if field["dtype"] == "F4" and shape and shape[-1] % 2 == 0:
                shape = (*shape[:-1], shape[-1] // 2)
            elif dtype is None:
                shape = (stop - start,)
            place = 8 + length + start
            entries.append(TensorEntry(name, _name(dtype or torch.uint8), shape, place))
    return sorted(entries, key=lambda entry: entry.offset_bytes)


def read_into(path: Path, offset_bytes: int, out: Tensor) -> None:
    """Fill the contiguous CPU tensor `out` with the file's bytes from `offset_bytes` on.

    UserError when the file ends before `out` is full or cannot be read.
    """
    view = _view(out)
    try:
        with path.open("rb") as file:
            file.seek(offset_bytes)
            missing = len(view) - file.readinto(view)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if missing:
        raise UserError(
            f"{path} is truncated: it ends {missing} bytes early; copy it again or prepare the "
            "folder again"
        )


def write_file(path: Path, n_bytes: int, parts: Iterable[bytes | Tensor]) -> list[int]:
    """Write the parts, contiguous CPU tensors or bytes, one after another; returns their checksums.

    The file, `n_bytes` long, appears whole and durable or not at all. OSError from the disk passes
    through, as does what `parts` raises.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    checksums, position = [], 0
    try:
        with temporary.open("wb") as file:
            _reserve(file.fileno(), n_bytes)
            for part in parts:
                view = _view(part)
                checksums.append(zlib.crc32(view))
                while len(view):
                    done = os.pwrite(file.fileno(), view, position)
                    view, position = view[done:], position + done
            if position != n_bytes:
                raise ValueError(f"{path}: {position} bytes were written, {n_bytes} were planned")
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return checksums


def _reserve(file: int, n_bytes: int) -> None:
    """Take the room at once, so that a full disk is known before hours of writing."""
    try:
        os.posix_fallocate(file, 0, n_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # not every file system can
            raise
