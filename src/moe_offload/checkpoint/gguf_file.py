"""GGUF files, whole or split: their metadata, and their tensors, known but not yet read.

Which types there are and what their bytes stand for is the `gguf` package's; the header is read
here. The package's own reader maps the file, makes several numpy objects of each entry of the
vocabulary (4.8 s for 49,152 of them), and believes every count and length it reads.

    magic "GGUF", version; number of tensors, number of fields
    fields    key, type, value: a number, a text, or an array of these
    tensors   name, sizes (the innermost first), type, place after the header
    padding to `general.alignment`, then the tensors' bytes
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from moe_offload.checkpoint.codes import CodeKind, Codes, Grid
from moe_offload.checkpoint.safetensors_file import read_into
from moe_offload.checkpoint.source_files import LazyTensor, Quantised, merge, place
from moe_offload.errors import UserError
from moe_offload.files import require_regular

# Bounds on what a header may claim. The largest real ones: a vocabulary of 260,000, 12 MB; an old
# file with a tensor for each of 32 x 8 experts, 995 tensors.
_LARGEST_HEADER_BYTES: Final = 64 << 20
_MOST_TENSORS: Final = 1 << 17
_MOST_FIELDS: Final = 1 << 14
_MOST_ENTRIES: Final = 1 << 21
_MOST_DIMENSIONS: Final = 4

_MAGIC: Final = b"GGUF"
_VERSIONS: Final = (2, 3)
_TEXT, _ARRAY = 8, 9
# The numbers by GGUF's code of their type, as struct names them.
_NUMBERS: Final = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
# Types whose weights are whole multiples, in this range, of one number for each 32 neighbours, some
# plus another such number; -128 is not among Q8_0's, for no program writes it.
_MULTIPLES: Final = {
    Type.Q4_0: (-8, 7),
    Type.Q4_1: (0, 15),
    Type.Q5_1: (0, 31),
    Type.Q5_0: (-16, 15),
    Type.Q8_0: (-127, 127),
    Type.MXFP4: (-12, 12),
}
_GROUP: Final = 32
_PLAIN: Final = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}


@dataclass(frozen=True)
class GgufFile:
    """One model: the `fields` of its (first) file, all files' `tensors` by llama.cpp's names.

    Shapes are in torch's order; a quantised tensor gives fp32.
    """

    paths: tuple[Path, ...]
    fields: Mapping[str, Any]
    tensors: dict[str, LazyTensor]


def open_gguf(paths: tuple[Path, ...]) -> GgufFile:
    """Open a GGUF file, or all parts of a split one in order; reads headers alone.

    UserError for a file that is none, is truncated, claims what it cannot hold, or has a tensor of
    an unknown type; for parts that do not belong together, and for a tensor that two of them hold.
    """
    parts = [_Header(path) for path in paths]
    first = parts[0].fields
    for position, part in enumerate(parts):
        place_in_split = (part.fields.get("split.no", 0), part.fields.get("split.count", 1) or 1)
        if place_in_split != (position, len(parts)):
            raise UserError(
                f"{part.path} says it is part {place_in_split[0]} of {place_in_split[1]}, expected "
                f"part {position} of {len(parts)}: give the parts the names they were downloaded "
                "with, or download them again"
            )
    tensors = merge(part.tensors for part in parts)
    expected = first.get("split.tensors.count", len(tensors))
    if expected != len(tensors):
        raise UserError(
            f"the {len(parts)} parts of {paths[0]} hold {len(tensors)} tensors, expected "
            f"{expected}; download them again"
        )
    return GgufFile(paths, first, tensors)


class _Header:
    """One file's header, checked: every tensor lies within the file."""

    def __init__(self, path: Path) -> None:
        self.path, self._at = path, len(_MAGIC)
        self.fields: dict[str, Any] = {}
        self.tensors: dict[str, LazyTensor] = {}
        try:
            require_regular(path)
            self._file_bytes = path.stat().st_size
            with path.open("rb") as file:
                self._data = file.read(min(_LARGEST_HEADER_BYTES, self._file_bytes))
        except OSError as error:
            raise UserError(
                f"cannot read {path}: {error.strerror}; copy or download it again"
            ) from error
        try:
            self._read()
        except (struct.error, ValueError, TypeError) as error:
            raise UserError(
                f"{path} is truncated, damaged or no GGUF file of version 2 or 3 ({error}); "
                "download it again"
            ) from error
        del self._data

    def _read(self) -> None:
        if not self._data.startswith(_MAGIC):
            raise ValueError(f"it begins with {self._data[:4]!r}")
        version = self._number("I")
        if version not in _VERSIONS:
            raise ValueError(f"it has version {version}")
        n_tensors, n_fields = self._number("Q"), self._number("Q")
        _require_at_most(n_tensors, _MOST_TENSORS, "tensors")
        _require_at_most(n_fields, _MOST_FIELDS, "fields")
        for _ in range(n_fields):
            key, kind = self._text(), self._number("I")
            if key in self.fields:
                raise ValueError(f"it has the field {key:.80} twice")
            self.fields[key] = self._value(kind)
        places = [self._tensor_place() for _ in range(n_tensors)]
        alignment = self.fields.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"its alignment is {alignment!r:.80}")
        start = -(-self._at // alignment) * alignment
        for name, shape, kind, offset in places:
            if name in self.tensors:
                raise ValueError(f"it has the tensor {name:.80} twice")
            self._add_tensor(name, shape, kind, start + offset)

    def _take(self, n_bytes: int) -> bytes:
        end = self._at + n_bytes
        if end > len(self._data):
            raise ValueError(f"its header goes on after {len(self._data)} bytes")
        found = self._data[self._at : end]
        self._at = end
        return found

    def _number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self._take(struct.calcsize(code)))[0]

    def _text(self) -> str:
        return self._take(self._number("Q")).decode(errors="replace")

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind in _NUMBERS:
            return self._number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"it has a field of the unknown type {kind}")
        entries, n_entries = self._number("I"), self._number("Q")
        _require_at_most(n_entries, _MOST_ENTRIES, "entries in an array")
        if entries == _TEXT:
            return [self._text() for _ in range(n_entries)]
        if entries not in _NUMBERS:
            raise ValueError(f"it has an array of the unknown type {entries}")
        code = f"<{n_entries}{_NUMBERS[entries]}"
        return list(struct.unpack(code, self._take(struct.calcsize(code))))

    def _tensor_place(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and place after the header."""
        name, n_dimensions = self._text(), self._number("I")
        _require_at_most(n_dimensions, _MOST_DIMENSIONS, f"dimensions in {name:.80}")
        sizes = tuple(self._number("Q") for _ in range(n_dimensions))
        return name, sizes[::-1], self._number("I"), self._number("Q")

    def _add_tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int) -> None:
        try:
            stored = Type(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[stored]
            gguf.dequantize(np.zeros((1, block_bytes), np.uint8), stored)
        except (ValueError, KeyError, NotImplementedError) as error:
            known = str(kind) if isinstance(error, ValueError) else Type(kind).name
            raise UserError(
                f"tensor {name:.80} in {self.path} is of type {known}, which is not known here: "
                "use another quantisation of the model, such as Q4_K_M or Q8_0, or install a newer "
                "gguf package"
            ) from error
        elements = math.prod(shape)
        if not shape or not elements or shape[-1] % block:
            raise ValueError(f"its tensor {name:.80} of type {stored.name} has shape {shape}")
        n_bytes = elements // block * block_bytes
        if offset + n_bytes > self._file_bytes:
            raise ValueError(
                f"its tensor {name:.80} ends at byte {offset + n_bytes}, the file has "
                f"{self._file_bytes} bytes"
            )
        if stored in _PLAIN:
            self.tensors[name] = place(self.path, _PLAIN[stored], shape, offset)
            return
        self.tensors[name] = _Blocks(name, self.path, stored, shape, offset).tensor()


def _require_at_most(found: int, most: int, what: str) -> None:
    if found > most:
        raise ValueError(f"it claims {found} {what}")


def _half(blocks: Tensor) -> Tensor:
    """fp32 of the float16 at the beginning of each block."""
    return blocks[..., :2].contiguous().view(torch.float16).float()[..., 0]


@dataclass(frozen=True)
class _Blocks:
    """A quantised tensor: blocks of one row's neighbours, row after row."""

    name: str
    path: Path
    stored: Type
    shape: tuple[int, ...]
    offset: int

    def tensor(self) -> LazyTensor:
        """Its dequantised values, fp32, and its codes where it is made of some."""
        codes = self._codes if self.stored in _MULTIPLES and len(self.shape) > 1 else None
        quantised = Quantised(self._kind, self._grids, codes)
        return LazyTensor(self.shape, torch.float32, self.path, self._values, quantised)

    @property
    def _kind(self) -> CodeKind:
        kinds: dict[Type, CodeKind] = {
            Type.MXFP4: "e2m1",
            Type.Q4_1: "affine",
            Type.Q5_1: "affine",
        }
        return kinds.get(self.stored, "int")

    def _packed(self, start: int, stop: int) -> Tensor:
        """uint8 [rows of blocks, bytes] of a slice of the first dimension; a vector is one row."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.stored]
        row_bytes = self.shape[-1] // block * block_bytes
        if len(self.shape) == 1:
            start, stop = 0, 1
        rows_each = math.prod(self.shape[1:-1])
        packed = torch.empty(((stop - start) * rows_each, row_bytes), dtype=torch.uint8)
        read_into(self.path, self.offset + start * rows_each * row_bytes, packed)
        return packed

    def _values(self, start: int, stop: int) -> Tensor:
        packed = self._packed(start, stop)
        with np.errstate(all="ignore"):  # a scale may be infinite: whoever uses it looks
            values = torch.from_numpy(gguf.dequantize(packed.numpy(), self.stored))
        if len(self.shape) == 1:
            return values[0, start:stop].clone()
        return values.view(stop - start, *self.shape[1:])

    def _codes(self, start: int, stop: int) -> Codes:
        """Of blocks of 32: a scale, perhaps a minimum, perhaps the fifth bits, then the rest.

        Of two four-bit codes in a byte the low one is of the first half.
        """
        _, block_bytes = gguf.GGML_QUANT_SIZES[self.stored]
        blocks = self._packed(start, stop).unflatten(1, (-1, block_bytes))
        offset: Tensor | None = None
        if self.stored == Type.MXFP4:
            unit, rest = torch.exp2(blocks[..., 0].float() - 128), blocks[..., 1:]
        else:
            unit, rest = _half(blocks), blocks[..., 2:]
            offset = torch.full(unit.shape, float(_MULTIPLES[self.stored][1] + 1))
        if self._kind == "affine":
            offset, rest = _half(rest), rest[..., 2:]
        codes = rest ^ 128
        if self.stored != Type.Q8_0:
            codes = torch.cat((rest[..., -16:] & 15, rest[..., -16:] >> 4), dim=-1)
        if rest.shape[-1] == 20:
            fifth = rest[..., :4, None] >> torch.arange(8, dtype=torch.uint8) & 1
            codes |= fifth.flatten(-2) << 4
        shape = (stop - start, *self.shape[1:-1], -1)
        found = Codes(self._kind, codes.flatten(1), unit, offset)
        return found.map(lambda part: part.view(shape))

    def _grids(self) -> Iterator[Grid]:
        """One that stands for all of its matrices, but for MXFP4.

        The scales of the others are float16 whatever they are, so that nothing is read. Of types
        that are no whole multiples, or whose neighbours share no unit, each weight has its own.
        """
        low, high = _MULTIPLES.get(self.stored, (1, 1))
        units = torch.ones(1)
        of_mxfp4 = self.stored == Type.MXFP4
        for row in range(self.shape[0] if of_mxfp4 else 1):
            if of_mxfp4:
                units = self._codes(row, row + 1).units
            yield Grid(
                name=f"{self.name}, {self.stored.name}",
                is_bf16=of_mxfp4,
                kind=self._kind,
                low=low,
                high=high,
                group=_GROUP if self.stored in _MULTIPLES else 1,
                units=units,
                used_units=partial(torch.clone, units),
                levels=high - low + 1 if self._kind == "affine" else 256,
            )
