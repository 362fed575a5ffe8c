"""Writes a prepared folder: shard by shard, one expert at a time, resumable at every shard.

What is finished is recorded in `preparation.json` beside the shards, with checksums. Whenever the
program dies, the next run keeps each recorded shard whose bytes still match and writes the rest;
the manifest comes last and the record goes. Memory holds one expert, or one dense tensor, at a
time; while a file is made the one before is still on its way to the disk. Top-down: the
preparation, the plan of the dense shards, the output folder between runs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Lock
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.block import pack_block
from moe_offload.checkpoint.codes import Codes
from moe_offload.checkpoint.conversion import ExpertsModule
from moe_offload.checkpoint.folders import CONFIGS, MANIFEST_NAME, WEIGHT_FILES, decode_floats
from moe_offload.checkpoint.model_config import stored_dtype
from moe_offload.checkpoint.prepared import (
    DenseShard,
    DenseTensor,
    Manifest,
    MoeLayer,
    PackedWeight,
    dense_file_name,
    experts_file_name,
    verify_shard,
    write_manifest,
)
from moe_offload.checkpoint.quantization import BY_TORCH, Packer
from moe_offload.checkpoint.safetensors_file import TEMPORARY_SUFFIX, plan_header, write_file
from moe_offload.checkpoint.source import SourceCheckpoint, copy_companions
from moe_offload.config import WEIGHT_FORMATS, Scales, WeightFormat
from moe_offload.errors import UserError
from moe_offload.files import (
    LARGEST_JSON_BYTES,
    read_json_object,
    require_regular,
    write_atomically,
)

SHARD_BYTES: Final = 4 << 30
RECORD_NAME: Final = "preparation.json"
_FILES_AT_ONCE: Final = 2
_SHARD: Final = r"(dense(-\d{5}-of-\d{5})?|experts-\d{5})\.safetensors"
_TEMPORARY: Final = rf"{_SHARD}{re.escape(TEMPORARY_SUFFIX)}|\..+\.\d+\.tmp"  # write_atomically's


@dataclass(frozen=True)
class Formats:
    """What to store: the experts' `weight_format`, the `dense_format`, the model's dtype.

    `exact` where `weight_format` is to hold a quantised source without a rounding, with `scales`
    like the source's; `calibration` is the checksum of the text that the source was rounded for.
    """

    weight_format: WeightFormat
    dense_format: WeightFormat
    model_dtype: torch.dtype
    exact: bool = False
    scales: Scales | None = None
    calibration: str = ""


@dataclass(frozen=True)
class _Planned:
    """A file to write: its shard, still without checksums, and its data, read when asked for."""

    shard: DenseShard | MoeLayer
    header: bytes
    data: Callable[[], Iterator[Tensor]]

    @property
    def data_bytes(self) -> int:
        return self.shard.bytes - len(self.header)


class Preparation:
    """One source checkpoint on its way into one output folder; nothing is written before `run`."""

    def __init__(
        self,
        source: SourceCheckpoint,
        output: Path,
        formats: Formats,
        packer: Packer = BY_TORCH,
    ) -> None:
        self._source, self._output, self._formats = source, output, formats
        self._dense = plan_dense(source, formats.dense_format)
        files = [
            _plan_dense_file(
                source, output / dense_file_name(position, len(self._dense)), parts, packer
            )
            for position, parts in enumerate(self._dense)
        ]
        for position, module in enumerate(source.experts):
            path = output / experts_file_name(position)
            files.append(_plan_experts_file(source, path, module, formats, packer))
        self._files = {file.shard.file.name: file for file in files}

    @property
    def total_bytes(self) -> int:
        """The weights of all shards together, as `on_bytes` of `run` hears of them."""
        return sum(file.data_bytes for file in self._files.values())

    @property
    def _record_key(self) -> dict[str, str]:
        """What must be equal for two preparations to share shards."""
        return {
            "fingerprint": self._source.fingerprint,
            "weight_format": self._formats.weight_format,
            "dense_format": self._formats.dense_format,
            "scales": str(self._formats.scales),
            "calibration": self._formats.calibration,
        }

    def run(
        self, created_with: dict[str, str], on_bytes: Callable[[int], None] = lambda _: None
    ) -> Manifest:
        """Write everything that a previous run has not; returns the manifest written last.

        `on_bytes` hears of bytes as they are written or found finished. UserError when the disk has
        too little room or the source changed meanwhile; OSError from the disk passes through.
        """
        done = self._keep_finished(on_bytes)
        self._check_room(done)
        source = self._source
        files = copy_companions(source, self._output)
        self._write_files(done, on_bytes)
        if source.current_fingerprint() != source.fingerprint:
            raise UserError(
                f"the files of {source.path} changed while they were prepared: run the same "
                "command again once nothing writes to them"
            )
        manifest = self._manifest(done, files, created_with)
        write_manifest(manifest)
        (self._output / RECORD_NAME).unlink()
        return manifest

    def _write_files(self, done: dict[str, list[int]], on_bytes: Callable[[int], None]) -> None:
        """Write the files that are not in `done`, which takes each one's checksums."""
        making, recording, stopped = Lock(), Lock(), Event()

        def parts(file: _Planned) -> Generator[bytes | Tensor, None, None]:
            yield file.header
            with making:
                for tensor in file.data():
                    if stopped.is_set():  # a file that is cut short is refused and removed
                        return
                    yield tensor
                    on_bytes(tensor.nbytes)

        def write(name: str, file: _Planned) -> None:
            with closing(parts(file)) as data:
                checksums = write_file(file.shard.file, file.shard.bytes, data)
            with recording:
                done[name] = checksums
                self._write_record(done)

        with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
            left = [item for item in self._files.items() if item[0] not in done]
            try:
                for writing in [pool.submit(write, *item) for item in left]:
                    writing.result()
            except BaseException:
                stopped.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _keep_finished(self, on_bytes: Callable[[int], None]) -> dict[str, list[int]]:
        """The checksums of an interrupted run's shards that are whole; others of ours go."""
        remove_temporary_files(self._output)
        record = read_record(self._output)
        found = record["shards"] if record["key"] == self._record_key else {}
        kept: dict[str, list[int]] = {}
        for name, file in self._files.items():
            with suppress(UserError, OSError, KeyError, ValueError, TypeError):
                verify_shard(file.shard.sealed(found[name]))
                kept[name] = found[name]
                on_bytes(file.data_bytes)
        remove_shards(self._output, record["shards"].keys() - kept.keys())
        self._write_record(kept)
        return kept

    def _write_record(self, done: dict[str, list[int]]) -> None:
        data = {"key": self._record_key, "shards": done}
        write_atomically(self._output / RECORD_NAME, json.dumps(data))

    def _check_room(self, done: dict[str, list[int]]) -> None:
        needed = sum(file.shard.bytes for name, file in self._files.items() if name not in done)
        free = shutil.disk_usage(self._output).free
        if needed > free:
            raise UserError(
                f"{self._output} has too little room: {size_text(needed)} still to write, "
                f"{size_text(free)} free; free some space, choose another --output-path or a "
                "smaller --expert-dtype"
            )

    def _manifest(
        self, done: dict[str, list[int]], files: dict[str, int], created_with: dict[str, str]
    ) -> Manifest:
        text = self._source.config.to_json_string(use_diff=False)
        config = json.loads(text, object_hook=decode_floats)
        config.pop("_name_or_path", None)  # a path of this machine
        shards = [file.shard.sealed(done[name]) for name, file in self._files.items()]
        parts = [part for parts in self._dense for part in parts]
        return Manifest(
            folder=self._output,
            source=str(self._source.path.resolve()),
            source_fingerprint=self._source.fingerprint,
            created_with=created_with,
            config=config,
            generation_config=self._source.generation_config,
            model_dtype="float32" if self._formats.model_dtype == torch.float32 else "bfloat16",
            weight_format=self._formats.weight_format,
            dense_format=self._formats.dense_format,
            packed_weights=tuple(part.packed for part in parts if part.packed is not None),
            dense=tuple(shard for shard in shards if isinstance(shard, DenseShard)),
            moe_layers=tuple(shard for shard in shards if isinstance(shard, MoeLayer)),
            files=files,
        )


def _plan_dense_file(
    source: SourceCheckpoint, path: Path, parts: list[DensePart], packer: Packer
) -> _Planned:
    stored = [tensor for part in parts for tensor in part.stored]
    header, entries = plan_header(stored, {"format": "pt"})

    def data() -> Iterator[Tensor]:
        for part in parts:
            yield from part.encode(source.read_dense(part.name), packer)

    n_bytes = entries[-1].offset_bytes + entries[-1].n_bytes
    tensors = tuple(DenseTensor(e.name, e.dtype, e.shape, e.offset_bytes, 0) for e in entries)
    return _Planned(DenseShard(path, n_bytes, 0, tensors), header, data)


def _plan_experts_file(
    source: SourceCheckpoint,
    path: Path,
    module: ExpertsModule,
    formats: Formats,
    packer: Packer,
) -> _Planned:
    weight_format = formats.weight_format
    layout = module.block_layout(weight_format, formats.scales)
    shape = (module.n_experts, layout.block_bytes)
    header, (blocks,) = plan_header(
        [("blocks", torch.uint8, shape)], {"weight_format": weight_format}
    )

    def data() -> Iterator[Tensor]:
        scaled = WEIGHT_FORMATS[weight_format].scales is not None
        read: Callable[[int], Mapping[str, Tensor | Codes]]
        read = (source.expert_reader if scaled else source.weights_reader)(module)

        def block_of(expert: int) -> Tensor:
            block = torch.empty(layout.block_bytes, dtype=torch.uint8)
            if not pack_block(layout, read(expert), block, packer) and formats.exact:
                raise UserError(
                    f"an expert in {module.name} would be rounded in {weight_format}, which its "
                    "scales promised to hold exactly; prepare it with --expert-dtype bf16"
                )
            return block

        for expert in range(module.n_experts):
            yield block_of(expert)

    layer = MoeLayer(
        module=module.name,
        file=path,
        bytes=blocks.offset_bytes + blocks.n_bytes,
        data_offset_bytes=blocks.offset_bytes,
        n_experts=module.n_experts,
        layout=layout,
        header_checksum=0,
        block_checksums=(0,) * module.n_experts,
    )
    return _Planned(layer, header, data)


@dataclass(frozen=True)
class DensePart:
    """One tensor of the model and the tensors stored for it: (name, dtype, shape) each.

    A `packed` matrix has two of them, `<name>.packed` and `<name>.scale`.
    """

    name: str
    packed: PackedWeight | None
    stored: tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]

    @property
    def n_bytes(self) -> int:
        return sum(torch.Size(shape).numel() * dtype.itemsize for _, dtype, shape in self.stored)

    def encode(self, tensor: Tensor, packer: Packer) -> list[Tensor]:
        """The stored tensors, in the order of `stored`, of the source's tensor."""
        if self.packed is not None:
            return list(packer.quantize(tensor, self.packed.bits))
        return [tensor.to(self.stored[0][1]).contiguous()]


def plan_dense(source: SourceCheckpoint, dense_format: str) -> list[list[DensePart]]:
    """The dense shards: parts of wider elements first, so that every tensor lies aligned."""
    facts = WEIGHT_FORMATS[dense_format]
    packable = _packable(source.model) if facts.group else set()
    # what the model keeps in fp32 whatever it runs in (HY 4's head) is not for four bits
    packable = {name for name in packable if stored_dtype(source.model, name) == source.model.dtype}
    parts = []
    for name in source.dense_names:
        shape = tuple(source.plan.expected(name).shape)
        if name in packable:
            rows, columns = shape
            packed, scale = quantization.packed_shapes(rows, columns, facts.bits)
            stored: Any = (
                (f"{name}.packed", torch.uint8, packed),
                (f"{name}.scale", torch.float16, scale),
            )
            weight = PackedWeight(name, 8 if facts.bits == 8 else 4, rows, columns)
            parts.append(DensePart(name, weight, stored))
        else:
            parts.append(DensePart(name, None, ((name, stored_dtype(source.model, name), shape),)))
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
    heads = {f"{path}.weight" for path, module in model.named_modules() if module is head}
    return names | (heads - tied if type(head) is nn.Linear else set())


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
    """The record of an interrupted preparation; an empty one when there is none to be read."""
    with suppress(UserError):
        record = read_json_object(folder / RECORD_NAME)
        if isinstance(record.get("shards"), dict):
            return {"key": {}, **record}
    return {"key": {}, "shards": {}}


def remove_temporary_files(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    for path in list(folder.iterdir()):
        if re.fullmatch(_TEMPORARY, path.name):
            path.unlink(missing_ok=True)


def tidy(folder: Path) -> None:
    """Remove what a run killed just after it wrote the manifest left behind."""
    remove_temporary_files(folder)
    (folder / RECORD_NAME).unlink(missing_ok=True)


def claim(folder: Path, source: Path) -> None:
    """Make `folder` ready to be prepared into: a finished preparation goes, a record begins.

    The record comes first, so that whatever is interrupted is known as ours. UserError where files
    of another program or another model than `source` would be lost.
    """
    manifest = folder / MANIFEST_NAME
    shards: list[str] = []
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        require_regular(manifest, LARGEST_JSON_BYTES)
        data = json.loads(manifest.read_bytes())
        if "format_version" not in data:
            raise UserError(
                f"{manifest} belongs to another program, so --force does not replace it; "
                "choose another --output-path"
            )
        shards = [str(entry["file"]) for entry in (*data["dense"], *data["moe_layers"])]
    if not folder.samefile(source):
        others = [path for pattern in WEIGHT_FILES for path in folder.glob(pattern)]
        if not manifest.exists() and not (folder / RECORD_NAME).exists():
            others += [folder / name for name in CONFIGS if (folder / name).exists()]
        if others:
            raise UserError(
                f"{folder} holds another model ({others[0].name}), whose files would be "
                "overwritten: choose another --output-path"
            )
    if not (folder / RECORD_NAME).exists():
        write_atomically(folder / RECORD_NAME, json.dumps({"key": {}, "shards": {}}))
    manifest.unlink(missing_ok=True)
    remove_shards(folder, shards)


def remove_shards(folder: Path, names: Iterable[str]) -> None:
    """Remove these shards; a name that no shard of ours can have is left alone."""
    for name in names:
        if re.fullmatch(_SHARD, name):
            (folder / name).unlink(missing_ok=True)


def size_text(n_bytes: int) -> str:
    """Bytes for people: GB, or MB where that would round to little."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:.2f} MB"
