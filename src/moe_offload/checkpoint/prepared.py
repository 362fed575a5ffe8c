"""The prepared folder: its manifest, its two kinds of shard, and checked reads of them.

    manifest.json               written last: a folder without it is not prepared
    dense.safetensors           everything but the experts, under the names of transformers' module
    dense-00001-of-00003...     tree (several shards when large)
    experts-00000.safetensors   per MoE layer, one uint8 tensor `blocks` [E, block_bytes], its data
                                at a multiple of 4096 bytes; a block is a `block.BlockLayout`

A dense matrix in int8 or int4 is stored as `<name>.packed` and `<name>.scale` (the tiles of
`quantization.py`); `Manifest.packed_weights` holds its logical shape. Every dense tensor, every
expert's block and every header has a CRC-32, so that a read can be checked on its own and in
parallel.

The dataclasses here are the manifest's JSON, field by field; in memory a shard's `file` is its
whole path. `read_manifest` compares what they say with the shards' own headers, which the
safetensors package has checked, and `fit.py` with the model.
"""

from __future__ import annotations

import json
import math
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import Tensor

from moe_offload.checkpoint.block import BlockLayout
from moe_offload.checkpoint.folders import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PREPARE_AGAIN,
    require_prepared,
)
from moe_offload.checkpoint.safetensors_file import TensorEntry, checksum, read_header, read_into
from moe_offload.config import WeightFormat
from moe_offload.errors import UserError
from moe_offload.files import (
    LARGEST_JSON_BYTES,
    from_json,
    require_regular,
    write_atomically,
)

MODEL_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def require(condition: bool, message: str) -> None:
    """ValueError with this message where the condition does not hold; unlike assert, always."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DenseTensor(TensorEntry):
    """One stored tensor of a dense shard."""

    checksum: int


@dataclass(frozen=True)
class DenseShard:
    """A safetensors file of dense tensors, `bytes` long."""

    file: Path
    bytes: int
    header_checksum: int
    tensors: tuple[DenseTensor, ...]

    @property
    def data_offset_bytes(self) -> int:
        """Where the header ends."""
        return min((tensor.offset_bytes for tensor in self.tensors), default=self.bytes)

    @property
    def entries(self) -> list[TensorEntry]:
        """What its header must say."""
        return [TensorEntry(t.name, t.dtype, t.shape, t.offset_bytes) for t in self.tensors]

    def sealed(self, checksums: list[int]) -> DenseShard:
        """With the checksums of its header and of its tensors, in this order."""
        header, *of_tensors = checksums
        pairs = zip(self.tensors, of_tensors, strict=True)
        tensors = tuple(replace(tensor, checksum=crc) for tensor, crc in pairs)
        return replace(self, header_checksum=header, tensors=tensors)


@dataclass(frozen=True)
class MoeLayer:
    """The experts of one MoE layer: E blocks back to back in one file, `bytes` long.

    `module` is the path of the experts module in transformers' model, such as
    `model.layers.0.mlp.experts`; block `e` starts at `data_offset_bytes + e * layout.block_bytes`.
    """

    module: str
    file: Path
    bytes: int
    data_offset_bytes: int
    n_experts: int
    layout: BlockLayout
    header_checksum: int
    block_checksums: tuple[int, ...]

    def __post_init__(self) -> None:
        require(len(self.block_checksums) == self.n_experts, "not one checksum per expert")

    @property
    def entries(self) -> list[TensorEntry]:
        """What its header must say."""
        shape = (self.n_experts, self.layout.block_bytes)
        return [TensorEntry("blocks", "uint8", shape, self.data_offset_bytes)]

    def sealed(self, checksums: list[int]) -> MoeLayer:
        """With the checksums of its header and of its blocks, in this order."""
        header, *blocks = checksums
        return replace(self, header_checksum=header, block_checksums=tuple(blocks))

    def block_offset_bytes(self, expert: int) -> int:
        return self.data_offset_bytes + expert * self.layout.block_bytes


@dataclass(frozen=True)
class PackedWeight:
    """A dense matrix stored in int8 or int4: logical shape [n_rows, n_columns], `bits` 8 or 4."""

    name: str
    bits: Literal[8, 4]
    n_rows: int
    n_columns: int


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    `config` and `generation_config` are JSON dictionaries of transformers; `model_dtype` is the
    dtype of the model to build; `weight_format` is the experts' format and `dense_format` that of
    the large dense matrices; `source_fingerprint` tells whether the source has changed since.
    `files` has the checksums of configuration, tokenizer and the like beside the shards, `checksum`
    is the manifest's own; both are None in folders of earlier versions.
    """

    folder: Path  # where it was found; not in the file
    source: str
    source_fingerprint: str
    created_with: dict[str, str]
    model_dtype: Literal["bfloat16", "float32"]
    weight_format: WeightFormat
    dense_format: WeightFormat
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    packed_weights: tuple[PackedWeight, ...]
    dense: tuple[DenseShard, ...]
    moe_layers: tuple[MoeLayer, ...]
    files: dict[str, int] | None = None
    checksum: int | None = None

    @property
    def shards(self) -> tuple[DenseShard | MoeLayer, ...]:
        return (*self.dense, *self.moe_layers)

    @property
    def expert_bytes(self) -> int:
        return sum(layer.n_experts * layer.layout.block_bytes for layer in self.moe_layers)

    @property
    def dense_bytes(self) -> int:
        return sum(shard.bytes - shard.data_offset_bytes for shard in self.dense)


def experts_file_name(position: int) -> str:
    """The file of the `position`-th MoE layer."""
    return f"experts-{position:05d}.safetensors"


def dense_file_name(position: int, n_shards: int) -> str:
    """The `position`-th of `n_shards` dense shards."""
    if n_shards == 1:
        return "dense.safetensors"
    return f"dense-{position + 1:05d}-of-{n_shards:05d}.safetensors"


def _encode(value: Any) -> Any:
    """As JSON; a path becomes its name, Infinity and NaN what transformers makes of them."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"__float__": json.dumps(value)}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    return value.name if isinstance(value, Path) else value


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` atomically; the shards must be in place."""
    fields = asdict(manifest)
    said = {key: _encode(fields[key]) for key in fields if key not in ("folder", "checksum")}
    data = {"format_version": FORMAT_VERSION, **said, "checksum": _own_checksum(said)}
    text = json.dumps(data, indent=1, allow_nan=False)
    write_atomically(manifest.folder / MANIFEST_NAME, f"{text}\n")


def _own_checksum(said: dict[str, Any]) -> int:
    """Of what a manifest says, however its file is laid out, and not of what this version adds."""
    as_read = json.loads(json.dumps(said))  # keys that are numbers become text, in another order
    return checksum(json.dumps(as_read, sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder, with every shard present at its full size.

    UserError when the folder is missing, not prepared or of another format version, when the
    manifest says what cannot be, or when a shard is missing or truncated.
    """
    folder = Path(folder)
    data = require_prepared(folder)
    path = folder / MANIFEST_NAME
    try:
        data.pop("format_version")
        manifest = _located(from_json(Manifest, {**data, "folder": str(folder)}))
        said = {key: _encode(data[key]) for key in data if key != "checksum"}
        if manifest.checksum is not None and manifest.checksum != _own_checksum(said):
            raise ValueError("it is not what was written: its checksum does not match")
        require(manifest.moe_layers != (), "no experts")
        for shard in manifest.shards:
            check_header(shard)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!s:.200}); {PREPARE_AGAIN}") from error
    return manifest


def _located(manifest: Manifest) -> Manifest:
    """With the shards' whole paths; ValueError for a file that is not where its kind is."""
    folder, n_dense = manifest.folder, len(manifest.dense)
    dense = [dense_file_name(position, n_dense) for position in range(n_dense)]
    experts = [experts_file_name(position) for position in range(len(manifest.moe_layers))]
    for shard, name in zip(manifest.shards, [*dense, *experts], strict=True):
        require(str(shard.file) == name, f"{str(shard.file)!r:.80}, not {name}")
    for file in manifest.files or {}:
        require(Path(file).name == file, f"a file called {file!r:.80}")
    return replace(
        manifest,
        dense=tuple(replace(shard, file=folder / shard.file) for shard in manifest.dense),
        moe_layers=tuple(replace(layer, file=folder / layer.file) for layer in manifest.moe_layers),
    )


def check_header(shard: DenseShard | MoeLayer) -> None:
    """UserError unless the file is as long as recorded and its header is the one recorded.

    ValueError when that header says otherwise than the shard.
    """
    try:
        found = shard.file.stat()
    except OSError as error:
        raise UserError(
            f"{shard.file} is missing or unreadable ({error.strerror}); {PREPARE_AGAIN}"
        ) from error
    if not stat.S_ISREG(found.st_mode) or found.st_size != shard.bytes:
        raise UserError(
            f"{shard.file} is truncated or altered: expected {shard.bytes} bytes, found "
            f"{found.st_size}; {PREPARE_AGAIN}"
        )
    said = f"the header of {shard.file.name} says otherwise"
    require(0 <= shard.data_offset_bytes <= shard.bytes, said)
    header = torch.empty(shard.data_offset_bytes, dtype=torch.uint8)
    _read_checked(shard.file, 0, header, shard.header_checksum, "its header")
    require(read_header(shard.file) == shard.entries, said)


def _read_checked(
    path: Path,
    offset_bytes: int,
    out: Tensor,
    wanted: int,
    part: str,
    crc32: Callable[[Tensor], int] = checksum,
) -> None:
    """Fill `out`; UserError when its bytes do not have the checksum `wanted`."""
    read_into(path, offset_bytes, out)
    if crc32(out) != wanted:
        raise UserError(
            f"{path} is corrupt: the checksum of {part} does not match the manifest; "
            f"{PREPARE_AGAIN}"
        )


def read_block(
    layer: MoeLayer, expert: int, out: Tensor, crc32: Callable[[Tensor], int] = checksum
) -> None:
    """Read one expert's block into `out`, contiguous CPU uint8 [block_bytes].

    `crc32` computes what `checksum` does. Thread-safe for distinct `out`. UserError when the bytes
    do not match their checksum.
    """
    assert out.dtype == torch.uint8 and out.numel() == layer.layout.block_bytes
    wanted = layer.block_checksums[expert]
    offset_bytes, what = layer.block_offset_bytes(expert), f"expert {expert}"
    _read_checked(layer.file, offset_bytes, out, wanted, what, crc32)


def iterate_dense(shards: Iterable[DenseShard]) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor by its stored name, one at a time in new CPU memory, each checked."""
    for shard in shards:
        for entry in shard.tensors:
            out = torch.empty(entry.shape, dtype=entry.torch_dtype)
            what = f"tensor {entry.name}"
            _read_checked(shard.file, entry.offset_bytes, out, entry.checksum, what)
            yield entry.name, out


def verify(manifest: Manifest, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Check every byte of every file of the folder; UserError names the first damaged one."""
    if manifest.files is None:
        print(
            f"note: {manifest.folder} was prepared by an earlier version, without checksums of "
            "configuration and tokenizer: only its weights are verified",
            file=sys.stderr,
        )
    for name, wanted in (manifest.files or {}).items():
        path = manifest.folder / name
        try:
            require_regular(path, LARGEST_JSON_BYTES)
            data = torch.empty(path.stat().st_size, dtype=torch.uint8)
        except OSError as error:
            raise UserError(f"{path} is missing or unreadable; {PREPARE_AGAIN}") from error
        _read_checked(path, 0, data, wanted, "the file")
    for shard in manifest.shards:
        verify_shard(shard, on_bytes)


def verify_shard(
    shard: DenseShard | MoeLayer, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Check header and every checksum of one file; `on_bytes` hears of bytes as they pass."""
    check_header(shard)
    if isinstance(shard, DenseShard):
        for _, tensor in iterate_dense([shard]):
            on_bytes(tensor.nbytes)
    else:
        block = torch.empty(shard.layout.block_bytes, dtype=torch.uint8)
        for expert in range(shard.n_experts):
            read_block(shard, expert, block)
            on_bytes(block.numel())
