"""The files of a source checkpoint as tensors that are known but not yet read.

Both safetensors and zipped `torch.save` files keep each tensor's bytes in one piece, so one kind of
lazy tensor serves both: a place in a file, read by plain reads (see `safetensors_file.py`).
Which files count is transformers' own order: model.safetensors, its index, pytorch_model.bin, its
index.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch
from torch import Tensor
from torch._weights_only_unpickler import Unpickler

from moe_offload.checkpoint.codes import CodeKind, Codes, Grid
from moe_offload.checkpoint.folders import WEIGHT_FILES
from moe_offload.checkpoint.safetensors_file import checksum, read_header, read_into
from moe_offload.errors import UserError
from moe_offload.files import read_json_object, require_regular

_LARGEST_PICKLE_BYTES: Final = 64 << 20  # names and shapes: a real one of 10,000 tensors has 2 MB


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a source checkpoint: `read_rows(start, stop)` reads a slice of dimension 0.

    One that is dequantised as it is read has `quantised`: what it is before that.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    read_rows: Callable[[int, int], Tensor]
    quantised: Quantised | None = None

    def read(self) -> Tensor:
        """All of it, in new CPU memory; a 0-dimensional tensor counts as one row."""
        return self.read_rows(0, self.shape[0] if self.shape else 1)


@dataclass(frozen=True)
class Quantised:
    """Of a dequantised tensor: a `Grid` for each matrix in it, and its codes.

    `read_rows` gives those of a slice of dimension 0; None where no format here could keep them.
    """

    kind: CodeKind
    grids: Callable[[], Iterator[Grid]]
    read_rows: Callable[[int, int], Codes] | None


def open_hugging_face(folder: Path) -> dict[str, LazyTensor]:
    """The weights of a Hugging Face folder: safetensors if there are any, else pytorch_model*.bin.

    UserError when there are none, when the index names a missing file or tensor, or when a file is
    truncated or damaged.
    """
    for name, read in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        if (folder / name).exists():
            return read(folder / name)
        index = folder / f"{name}.index.json"
        if index.exists():
            return _open_indexed(index, read)
    if (folder / "manifest.json").exists():
        raise UserError(
            f"{folder} holds no weights but what a preparation wrote: expected the checkpoint "
            "itself; give the folder it was prepared from as --input-path"
        )
    shards = sorted(path for pattern in WEIGHT_FILES[:2] for path in folder.glob(pattern))
    if shards:
        raise UserError(
            f"{folder} holds {len(shards)} files of weights such as {shards[0].name}, and no index "
            "that says what is in which: expected model.safetensors.index.json; download it again"
        )
    raise UserError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin or pytorch_model.bin.index.json; download the model again"
    )


def open_mistral_native(folder: Path) -> dict[str, LazyTensor]:
    """The weights of Mistral's native folder: consolidated*.safetensors, else consolidated*.pth|pt.

    UserError when there are none or when two files hold the same tensor.
    """
    paths = sorted(folder.glob("consolidated*.safetensors"))
    read = _open_safetensors
    if not paths:
        paths = sorted([*folder.glob("consolidated*.pth"), *folder.glob("consolidated*.pt")])
        read = _open_bin
    if not paths:
        raise UserError(
            f"{folder} holds no weights: expected consolidated*.safetensors or consolidated*.pth "
            "beside params.json; for a Hugging Face folder add --hf"
        )
    return merge(read(path) for path in paths)


def merge(parts: Iterable[dict[str, LazyTensor]]) -> dict[str, LazyTensor]:
    """The tensors of all files; UserError for one that two of them hold."""
    tensors: dict[str, LazyTensor] = {}
    for part in parts:
        for name in part.keys() & tensors.keys():
            raise UserError(
                f"tensor {name} is in both {tensors[name].path} and {part[name].path}; expected "
                "each tensor once: remove the copy or download the model again"
            )
        tensors |= part
    return tensors


def _open_indexed(
    index: Path, read: Callable[[Path], dict[str, LazyTensor]]
) -> dict[str, LazyTensor]:
    """All tensors of the files that the index names, each from where it says.

    An index may lack a tensor that a file holds, as transformers allows.
    """
    weight_map = read_weight_map(index)
    parts = {file: read(index.parent / file) for file in sorted(set(weight_map.values()))}
    for name, file in weight_map.items():
        if name not in parts[file]:
            raise UserError(
                f"tensor {name} is missing: {index.name} places it in {index.parent / file}, "
                "which does not have it; download that file again"
            )
    return merge(
        {name: tensor for name, tensor in part.items() if weight_map.get(name, file) == file}
        for file, part in parts.items()
    )


def read_weight_map(index: Path) -> dict[str, str]:
    """The file that an index gives for each tensor; UserError for one outside of its folder."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is damaged (it has no weight_map); download it again")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(
                f"{index} places a tensor in {file!r:.80}, expected the name of a file in its "
                "folder; download it again"
            )
    return weight_map


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    return {
        entry.name: place(path, entry.torch_dtype, entry.shape, entry.offset_bytes)
        for entry in read_header(path)
    }


def place(
    path: Path, dtype: torch.dtype, shape: tuple[int, ...], offset_bytes: int, wanted: int = 0
) -> LazyTensor:
    """The tensor that lies, row by row and little-endian, at `offset_bytes` of a file.

    `wanted` is its checksum, compared where all of it is read at once; 0 where none is known.
    """
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def read_rows(start: int, stop: int) -> Tensor:
        out = torch.empty((stop - start, *shape[1:])[: len(shape)], dtype=dtype)
        if out.numel():
            read_into(path, offset_bytes + start * row_bytes, out)
        if wanted and out.shape == shape and checksum(out) != wanted:
            raise UserError(
                f"{path} is damaged: the checksum of a tensor at byte {offset_bytes} does not "
                "match; download it again"
            )
        return out

    return LazyTensor(shape, dtype, path, read_rows)


def _open_bin(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `torch.save` file, a zip of one record per storage; reads no weights.

    Unpickled by torch's restricted unpickler, the one behind `weights_only=True`, with storages on
    the meta device. Where a record lies is looked up in the zip's directory: torch.load may
    calculate it, and is wrong for a file that another program has zipped again.
    """
    try:
        require_regular(path)
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            storages = _Storages(archive, file)
            state = storages.load()
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}, not a dictionary of tensors")
            return {
                str(name): _stored(path, tensor, storages.checksums)
                for name, tensor in state.items()
                if isinstance(tensor, Tensor)
            }
    except OSError as error:
        raise UserError(
            f"{path} is missing or unreadable ({error.strerror}); copy or download it again"
        ) from error
    except zipfile.BadZipFile as error:
        raise UserError(
            f"{path} is truncated or no zipped torch.save file (PyTorch 1.6 or later): {error}; "
            "download it again, or load it with torch and save it again"
        ) from error
    except UserError:
        raise
    except Exception as error:  # the unpickler, the zip and torch's checks raise many kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path} is damaged or holds more than weights ({reason:.200}); "
            "use the safetensors version of the model"
        ) from error


class _Storages:
    """The records of one `torch.save` file."""

    def __init__(self, archive: zipfile.ZipFile, file: BinaryIO) -> None:
        self._archive, self._file = archive, file
        self._found: dict[str, torch.UntypedStorage] = {}
        self.checksums: dict[int, int] = {}  # of what lies at an offset, 0 where none was saved
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("expected one data.pkl in it")
        self._root = pickles[0].removesuffix("data.pkl")

    def load(self) -> Any:
        """What was saved: tensors on meta storages, whose `_checkpoint_offset` is their place."""
        names = self._archive.namelist()
        if f"{self._root}byteorder" in names:
            order = self._record("byteorder", 16)
            if order != b"little":
                raise ValueError(f"its byte order is {order!r}, expected little")
        unpickler: Any = Unpickler(
            io.BytesIO(self._record("data.pkl", _LARGEST_PICKLE_BYTES)), encoding="utf-8"
        )
        unpickler.persistent_load = self._storage
        return unpickler.load()

    def _record(self, name: str, limit_bytes: int) -> bytes:
        info = self._archive.getinfo(self._root + name)
        if info.file_size > limit_bytes:
            raise ValueError(f"{name} has {info.file_size} bytes, expected at most {limit_bytes}")
        if info.CRC:
            return self._archive.read(info)
        # zipfile would compare: torch.serialization.set_crc32_options(False) saves without.
        self._file.seek(self._offset(name, info.file_size))
        return self._file.read(info.file_size)

    def _storage(self, saved: tuple[Any, ...]) -> torch.storage.TypedStorage:
        """What the pickle means by ('storage', type, key, device, number of elements)."""
        kind, storage_type, key, _, n_elements = saved
        if kind != "storage":
            raise ValueError(f"it refers to a {kind!r:.40}")
        untyped = storage_type is torch.UntypedStorage
        dtype = torch.uint8 if untyped else storage_type.dtype
        if key not in self._found:
            n_bytes = n_elements * dtype.itemsize
            storage = torch.UntypedStorage(n_bytes, device="meta")
            offset = self._offset(f"data/{key}", n_bytes)
            storage._checkpoint_offset = offset
            self.checksums[offset] = self._archive.getinfo(f"{self._root}data/{key}").CRC
            self._found[key] = storage
        return torch.storage.TypedStorage(
            wrap_storage=self._found[key], dtype=dtype, _internal=True
        )

    def _offset(self, name: str, n_bytes: int) -> int:
        """Where a stored record's data starts in the file, after its local header."""
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != n_bytes:
            raise ValueError(f"record {name} is compressed or not {n_bytes} bytes long")
        self._file.seek(info.header_offset)
        magic, name_bytes, extra_bytes = struct.unpack("<4s22xHH", self._file.read(30))
        found = self._file.read(name_bytes).decode()
        if magic != b"PK\x03\x04" or found != info.orig_filename:
            raise ValueError(f"record {name} does not lie where the zip's directory says")
        return int(info.header_offset + 30 + name_bytes + extra_bytes)


def _stored(path: Path, tensor: Tensor, checksums: dict[int, int]) -> LazyTensor:
    storage = tensor.untyped_storage()
    offset = storage._checkpoint_offset
    if offset is None:
        raise ValueError("it holds a tensor without a record")
    shape, strides = tuple(map(int, tensor.shape)), tensor.stride()
    dtype, first = tensor.dtype, int(tensor.storage_offset())
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if tensor.numel() and (first + span) * dtype.itemsize > storage.nbytes():
        raise ValueError("it holds a tensor that is larger than its record")
    start = offset + first * dtype.itemsize
    if tensor.is_contiguous():
        is_whole = tensor.nbytes == storage.nbytes()
        return place(path, dtype, shape, start, checksums[offset] if is_whole else 0)

    def read_rows(first: int, last: int) -> Tensor:
        elements = torch.empty(span, dtype=dtype)
        read_into(path, start, elements)
        return torch.as_strided(elements, shape, strides)[first:last].contiguous()

    return LazyTensor(shape, dtype, path, read_rows)
