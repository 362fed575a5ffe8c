"""The files of a source checkpoint as tensors that are known but not yet read.

Both safetensors and zipped `torch.save` files keep each tensor's bytes in one piece, so one kind of
lazy tensor serves both: a place in a file. Reading is plain `pread` (see `safetensors_file.py`).
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from moe_offload.checkpoint.safetensors_file import TensorEntry, read_header, read_into
from moe_offload.errors import UserError
from moe_offload.files import read_json_object

_ZIP_MAGIC: Final = b"PK\x03\x04"


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of a source checkpoint: `read_rows(start, stop)` reads a slice of dimension 0."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    read_rows: Callable[[int, int], Tensor]

    def read(self) -> Tensor:
        """All of it, in new CPU memory; a 0-dimensional tensor counts as one row."""
        return self.read_rows(0, self.shape[0] if self.shape else 1)


@dataclass(frozen=True)
class SourceFiles:
    """The weight files of a folder, and their tensors by name."""

    paths: tuple[Path, ...]
    tensors: dict[str, LazyTensor]


def open_hugging_face(folder: Path) -> SourceFiles:
    """The weights of a Hugging Face folder: safetensors if there are any, else pytorch_model*.bin.

    UserError when there are none, when the index names a missing file or tensor, or when a file is
    truncated or damaged.
    """
    for name, read in (("model.safetensors", _open_safetensors), ("pytorch_model.bin", _open_bin)):
        index = folder / f"{name}.index.json"
        if index.exists():
            return _open_indexed(index, read)
        if (folder / name).exists():
            return SourceFiles((folder / name,), read(folder / name))
    if (folder / "manifest.json").exists():
        raise UserError(
            f"{folder} holds no weights but what a preparation wrote: expected the checkpoint "
            "itself; give the folder it was prepared from as --input-path"
        )
    raise UserError(
        f"{folder} holds no weights: expected model.safetensors, model.safetensors.index.json, "
        "pytorch_model.bin or pytorch_model.bin.index.json; download the model again"
    )


def open_mistral_native(folder: Path) -> SourceFiles:
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
    tensors: dict[str, LazyTensor] = {}
    for path in paths:
        part = read(path)
        for name in part.keys() & tensors.keys():
            raise UserError(
                f"tensor {name} is in both {tensors[name].path} and {path}; expected each tensor "
                "once: remove the copy or use the Hugging Face version of the model with --hf"
            )
        tensors |= part
    return SourceFiles(tuple(paths), tensors)


def _open_indexed(index: Path, read: Callable[[Path], dict[str, LazyTensor]]) -> SourceFiles:
    try:
        weight_map = dict(read_json_object(index)["weight_map"])
        paths = tuple(index.parent / str(file) for file in sorted(set(weight_map.values())))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is damaged or unreadable; download it again") from error
    found: dict[str, LazyTensor] = {}
    for path in paths:
        found |= read(path)
    for name, file in weight_map.items():
        if name not in found:
            raise UserError(
                f"tensor {name} is missing: {index.name} places it in {index.parent / file}, "
                "which does not have it; download that file again"
            )
    return SourceFiles(paths, {name: found[name] for name in weight_map})


def _open_safetensors(path: Path) -> dict[str, LazyTensor]:
    return {entry.name: _place(path, entry) for entry in read_header(path)}


def _place(path: Path, entry: TensorEntry) -> LazyTensor:
    def read_rows(start: int, stop: int) -> Tensor:
        shape = (stop - start, *entry.shape[1:]) if entry.shape else ()
        out = torch.empty(shape, dtype=entry.dtype)
        if out.numel():
            row_bytes = entry.n_bytes // (entry.shape[0] if entry.shape else 1)
            read_into(path, entry.offset_bytes + start * row_bytes, out)
        return out

    return LazyTensor(entry.shape, entry.dtype, path, read_rows)


def _open_bin(path: Path) -> dict[str, LazyTensor]:
    """The tensors of a `torch.save` file; loading fake tensors reads no weights."""
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == _ZIP_MAGIC
        whole = zipped and zipfile.is_zipfile(path)
    except OSError as error:
        raise UserError(
            f"{path} is missing or unreadable ({error.strerror}); copy or download it again"
        ) from error
    if not whole:
        raise UserError(
            f"{path} is truncated: the directory at its end is missing; copy or download it again"
            if zipped
            else f"{path} is no zipped torch.save file (PyTorch 1.6 or later); load it with torch "
            "and save it again, or use the safetensors version of the model"
        )
    try:
        with FakeTensorMode():
            state = torch.load(path, weights_only=True)
    except Exception as error:  # torch raises many kinds: pickle, zip and runtime errors
        raise UserError(
            f"{path} is damaged or holds more than weights: torch.load(weights_only=True) refused "
            f"it ({str(error).splitlines()[0]}); use the safetensors version of the model"
        ) from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}; expected a dictionary of tensors")
    return {
        str(name): _stored(path, tensor)
        for name, tensor in state.items()
        if isinstance(tensor, Tensor)
    }


def _stored(path: Path, tensor: Tensor) -> LazyTensor:
    storage = tensor.untyped_storage()
    offset = storage._checkpoint_offset  # where torch.load found it, set for fake tensors
    assert offset is not None
    start = offset + int(tensor.storage_offset()) * tensor.dtype.itemsize
    shape = tuple(int(size) for size in tensor.shape)
    if tensor.is_contiguous():
        return _place(path, TensorEntry("", tensor.dtype, shape, start))

    strides, dtype = tensor.stride(), tensor.dtype
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))

    def read_rows(first: int, last: int) -> Tensor:
        elements = torch.empty(span, dtype=dtype)
        read_into(path, start, elements)
        return torch.as_strided(elements, shape, strides)[first:last].contiguous()

    return LazyTensor(shape, dtype, path, read_rows)
