"""Writes a prepared folder: shard by shard, one expert at a time, resumable at every shard.

What is finished is recorded in `preparation.json` beside the shards, with checksums. Whenever the
program dies, the next run keeps each recorded shard whose bytes still match and writes the rest;
the manifest comes last and the record goes. Memory holds one expert, or one dense tensor, at a
time.

An output folder between runs: who holds it, what an interrupted run left, what to remove.

What of a model outside its experts goes into the dense shards, in which form and order."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.block import BlockLayout, WeightFormat, block_layout, pack_block
from moe_offload.checkpoint.conversion import ExpertsModule
from moe_offload.checkpoint.folders import MANIFEST_NAME
from moe_offload.checkpoint.prepared import (
    DenseShard,
    DenseTensor,
    Manifest,
    MoeLayer,
    PackedWeight,
    decode_floats,
    dense_file_name,
    dense_shard_from_json,
    dense_shard_to_json,
    experts_file_name,
    moe_layer_from_json,
    moe_layer_to_json,
    plan_experts_file,
    verify_shard,
    write_manifest,
)
from moe_offload.checkpoint.safetensors_file import (
    TEMPORARY_SUFFIX,
    ShardWriter,
    TensorEntry,
    checksum,
    plan_header,
)
from moe_offload.checkpoint.source import SourceCheckpoint
from moe_offload.errors import UserError
from moe_offload.files import write_atomically

SHARD_BYTES: Final = 4 << 30
BITS: Final = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class DensePart:
    """One tensor of the model and the tensors stored for it: (name, dtype, shape) each.

    With `bits` it is a packed matrix of two stored tensors, `<name>.packed` and `<name>.scale`.
    """

    name: str
    bits: int | None
    shape: tuple[int, ...]
    stored: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @property
    def n_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self.stored)

    def encode(self, tensor: Tensor) -> list[Tensor]:
        """The stored tensors, in the order of `stored`, of the source's tensor."""
        if self.bits is not None:
            return list(quantization.quantize(tensor, self.bits))
        return [tensor.to(self.stored[0][1]).contiguous()]

    def packed_weight(self) -> PackedWeight | None:
        if self.bits is None:
            return None
        return PackedWeight(self.name, self.bits, *self.shape)


def plan_dense(source: SourceCheckpoint, dense_format: str) -> list[list[DensePart]]:
    """The dense shards: parts of wider elements first, so that every tensor lies aligned."""
    packable = _packable(source.model) if dense_format in BITS else set()
    # what the model keeps in fp32 whatever it runs in (HY 4's head) is not for four bits
    packable = {name for name in packable if source.dense_dtype(name) == source.model.dtype}
    parts = []
    for name in source.dense_names:
        shape = tuple(source.plan.expected(name).shape)
        if name in packable:
            bits = BITS[dense_format]
            packed, scale = quantization.packed_shapes(shape[0], shape[1], bits)
            stored: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...] = (
                (f"{name}.packed", torch.uint8, packed),
                (f"{name}.scale", torch.float16, scale),
            )
            parts.append(DensePart(name, bits, shape, stored))
        else:
            parts.append(DensePart(name, None, shape, ((name, source.dense_dtype(name), shape),)))
    parts.sort(key=lambda part: -part.stored[0][1].itemsize)
    shards: list[list[DensePart]] = [[]]
    size = 0
    for part in parts:
        if shards[-1] and size + part.n_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(part)
        size += part.n_bytes
    return shards


def _packable(model: PreTrainedModel) -> set[str]:
    """The plain linear weights of attention, dense and shared MLPs, and an untied LM head.

    Found by transformers' class names (`...Attention`, `...MLP`): routers, the gates of shared
    experts and state-space layers, whose code may use a weight directly, are none of these.
    """
    names = {
        f"{path}.{child}.weight"
        for path, module in model.named_modules()
        if type(module).__name__.lower().endswith(("attention", "mlp"))
        for child, linear in module.named_children()
        if type(linear) is nn.Linear
    }
    head = model.get_output_embeddings()
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    for path, module in model.named_modules():
        if module is head and type(head) is nn.Linear and f"{path}.weight" not in tied:
            names.add(f"{path}.weight")
    return names


RECORD_NAME: Final = "preparation.json"
_OUR_SHARD: Final = re.compile(r"(dense(-\d{5}-of-\d{5})?|experts-\d{5})\.safetensors")


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder against a second preparation; UserError when another one holds it.

    On a file system that cannot lock folders, such as some network ones, nothing is held.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another preparation is writing to {folder}; wait until it has ended"
                ) from error
        yield
    finally:
        os.close(handle)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of an interrupted preparation, empty when there is none or it is unreadable."""
    with suppress(OSError, ValueError, RecursionError):
        data = json.loads((folder / RECORD_NAME).read_bytes())
        if isinstance(data, dict) and isinstance(data.get("shards"), dict):
            return data
    return {}


def remove_temporary_files(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in folder.glob(f"*{TEMPORARY_SUFFIX}"):
        name = path.name.removesuffix(TEMPORARY_SUFFIX)
        if _OUR_SHARD.fullmatch(name) or name in (MANIFEST_NAME, RECORD_NAME):
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a run killed just after it wrote the manifest left behind."""
    remove_temporary_files(folder)
    (folder / RECORD_NAME).unlink(missing_ok=True)


def remove_prepared(folder: Path) -> None:
    """Remove a complete preparation, the manifest first; only files that it names and are ours.

    UserError when `manifest.json` belongs to something else.
    """
    path = folder / MANIFEST_NAME
    names: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        data = json.loads(path.read_bytes())
        if "format_version" not in data:
            raise UserError(
                f"{path} belongs to another program, so --force does not replace it; "
                "choose another --output-path"
            )
        names = [str(entry["file"]) for entry in (*data["dense"], *data["moe_layers"])]
    path.unlink(missing_ok=True)
    remove_shards(folder, names)


def remove_shards(folder: Path, names: Iterable[str]) -> None:
    """Remove these shards; a name that no shard of ours can have is left alone."""
    for name in names:
        if _OUR_SHARD.fullmatch(name):
            (folder / name).unlink(missing_ok=True)


@dataclass(frozen=True)
class Formats:
    """What to store: experts' `weight_format`, `dense_format` and the model's dtype."""

    weight_format: WeightFormat
    dense_format: str
    model_dtype: torch.dtype


@dataclass(frozen=True)
class _DenseFile:
    parts: list[DensePart]
    name: str
    header: bytes
    entries: list[TensorEntry]

    @property
    def n_bytes(self) -> int:
        return self.entries[-1].offset_bytes + self.entries[-1].n_bytes


@dataclass(frozen=True)
class _ExpertsFile:
    module: ExpertsModule
    layout: BlockLayout
    name: str
    header: bytes
    blocks: TensorEntry

    @property
    def n_bytes(self) -> int:
        return self.blocks.offset_bytes + self.blocks.n_bytes


class Preparation:
    """One source checkpoint on its way into one output folder; nothing is written before `run`."""

    def __init__(self, source: SourceCheckpoint, output: Path, formats: Formats) -> None:
        self._source, self._output, self._formats = source, output, formats
        shards = plan_dense(source, formats.dense_format)
        self._dense = [
            _DenseFile(
                parts,
                dense_file_name(position, len(shards)),
                *plan_header([entry for part in parts for entry in part.stored], {"format": "pt"}),
            )
            for position, parts in enumerate(shards)
        ]
        self._experts = []
        for position, module in enumerate(source.experts):
            layout = block_layout(
                formats.weight_format,
                module.hidden_size,
                module.intermediate_size,
                module.has_gate,
                module.has_bias,
            )
            header, blocks = plan_experts_file(module.n_experts, layout)
            name = experts_file_name(position)
            self._experts.append(_ExpertsFile(module, layout, name, header, blocks))

    @property
    def _files(self) -> list[_DenseFile | _ExpertsFile]:
        return [*self._dense, *self._experts]

    @property
    def total_bytes(self) -> int:
        """The weights of all shards together, as `on_bytes` of `run` hears of them."""
        return sum(f.n_bytes - len(f.header) for f in self._files)

    @property
    def record_key(self) -> dict[str, str]:
        """What must be equal for two preparations to share shards."""
        return {
            "fingerprint": self._source.fingerprint,
            "weight_format": self._formats.weight_format,
            "dense_format": self._formats.dense_format,
        }

    def run(
        self,
        created_with: dict[str, str],
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> Manifest:
        """Write everything that a previous run has not; returns the manifest written last.

        `on_bytes` hears of bytes as they are written or found finished. UserError when the disk has
        too little room; OSError from the disk passes through.
        """
        (self._output / MANIFEST_NAME).unlink(missing_ok=True)
        done = self._keep_finished(on_bytes)
        self._check_room(done)
        for dense in self._dense:
            if dense.name not in done:
                done[dense.name] = dense_shard_to_json(self._write_dense(dense, on_bytes))
                self._write_record(done)
        for experts in self._experts:
            if experts.name not in done:
                done[experts.name] = moe_layer_to_json(self._write_experts(experts, on_bytes))
                self._write_record(done)
        manifest = self._manifest(done, created_with)
        write_manifest(manifest)
        (self._output / RECORD_NAME).unlink()
        return manifest

    def _keep_finished(self, on_bytes: Callable[[int], None]) -> dict[str, dict[str, Any]]:
        """The shards of an interrupted run that are still whole; others of ours are removed."""
        remove_temporary_files(self._output)
        record = read_record(self._output)
        found = record.get("shards", {}) if record.get("key") == self.record_key else {}
        kept = {}
        for file in self._files:
            with suppress(UserError, OSError, KeyError, TypeError, ValueError):
                dense = isinstance(file, _DenseFile)
                read = dense_shard_from_json if dense else moe_layer_from_json
                shard = read(self._output, found[file.name])
                verify_shard(shard)
                if shard.file_bytes != file.n_bytes:
                    continue
                kept[file.name] = found[file.name]
                on_bytes(file.n_bytes - len(file.header))
        remove_shards(self._output, record.get("shards", {}).keys() - kept.keys())
        self._write_record(kept)
        return kept

    def _write_record(self, done: dict[str, dict[str, Any]]) -> None:
        data = {"key": self.record_key, "shards": done}
        write_atomically(self._output / RECORD_NAME, json.dumps(data).encode())

    def _check_room(self, done: dict[str, dict[str, Any]]) -> None:
        needed = sum(f.n_bytes for f in self._files if f.name not in done)
        free = shutil.disk_usage(self._output).free
        if needed > free:
            raise UserError(
                f"{self._output} has too little room: {size_text(needed)} still to write, "
                f"{size_text(free)} free; free some space, choose another --output-path or a "
                "smaller --expert-dtype"
            )

    def _write_dense(self, file: _DenseFile, on_bytes: Callable[[int], None]) -> DenseShard:
        entries = iter(file.entries)
        tensors = []
        with ShardWriter(self._output / file.name, file.header, file.n_bytes) as writer:
            for part in file.parts:
                for data in part.encode(self._source.plan.read(part.name)):
                    entry = next(entries)
                    crc = writer.write(entry.offset_bytes, data)
                    tensors.append(
                        DenseTensor(entry.name, entry.dtype, entry.shape, entry.offset_bytes, crc)
                    )
                    on_bytes(entry.n_bytes)
            writer.commit()
        return DenseShard(writer.path, file.n_bytes, checksum(file.header), tuple(tensors))

    def _write_experts(self, file: _ExpertsFile, on_bytes: Callable[[int], None]) -> MoeLayer:
        layout = file.layout
        block = torch.empty(layout.block_bytes, dtype=torch.uint8)
        checksums = []
        with ShardWriter(self._output / file.name, file.header, file.n_bytes) as writer:
            for expert, weights in enumerate(self._source.iterate_experts(file.module)):
                pack_block(layout, weights, block)
                offset = file.blocks.offset_bytes + expert * layout.block_bytes
                checksums.append(writer.write(offset, block))
                on_bytes(layout.block_bytes)
            writer.commit()
        return MoeLayer(
            module=file.module.name,
            path=writer.path,
            file_bytes=file.n_bytes,
            data_offset_bytes=file.blocks.offset_bytes,
            n_experts=file.module.n_experts,
            layout=layout,
            header_checksum=checksum(file.header),
            block_checksums=tuple(checksums),
        )

    def _manifest(self, done: dict[str, dict[str, Any]], created_with: dict[str, str]) -> Manifest:
        parts = [part for file in self._dense for part in file.parts]
        packed = (part.packed_weight() for part in parts)
        text = self._source.config.to_json_string(use_diff=False)
        config = json.loads(text, object_hook=decode_floats)
        config.pop("_name_or_path", None)  # a path of this machine
        return Manifest(
            folder=self._output,
            source=str(self._source.folder.resolve()),
            source_fingerprint=self._source.fingerprint,
            created_with=created_with,
            config=config,
            generation_config=self._source.generation_config,
            model_dtype=str(self._formats.model_dtype).removeprefix("torch."),
            weight_format=self._formats.weight_format,
            dense_format=self._formats.dense_format,
            dense_files=tuple(
                dense_shard_from_json(self._output, done[file.name]) for file in self._dense
            ),
            packed_weights=tuple(weight for weight in packed if weight is not None),
            moe_layers=tuple(
                moe_layer_from_json(self._output, done[file.name]) for file in self._experts
            ),
        )


def size_text(n_bytes: int) -> str:
    """Bytes for people: GB, or MB where that would round to little."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"
