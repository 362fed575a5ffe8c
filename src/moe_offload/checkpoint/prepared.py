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
whole path. What cannot be true of a prepared folder raises ValueError where they are built.
"""

from __future__ import annotations

import json
import math
import re
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import NoneType
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor

from moe_offload.checkpoint.block import BLOCK_ALIGNMENT, BlockLayout, block_layout
from moe_offload.checkpoint.folders import MANIFEST_NAME, require_prepared
from moe_offload.checkpoint.safetensors_file import (
    DTYPES,
    TensorEntry,
    checksum,
    plan_header,
    read_into,
)
from moe_offload.config import WeightFormat
from moe_offload.errors import UserError
from moe_offload.files import (
    LARGEST_JSON_BYTES,
    from_json,
    read_json_object,
    require_regular,
    write_atomically,
)

FORMAT_VERSION: Final = 1
MODEL_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PREPARE_AGAIN: Final = "prepare the model again with weights_preprocessor.py --force"
OUR_SHARD: Final = re.compile(r"(dense(-\d{5}-of-\d{5})?|experts-\d{5})\.safetensors")

_DTYPE_OF_NAME: Final = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


def require(condition: bool, message: str) -> None:
    """ValueError with this message where the condition does not hold; unlike assert, always."""
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True)
class DenseTensor:
    """One stored tensor of a dense shard; `offset_bytes` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset_bytes: int
    checksum: int

    def __post_init__(self) -> None:
        require(self.dtype in _DTYPE_OF_NAME, f"{self.name} has no dtype {self.dtype!r:.40}")
        require(min(self.offset_bytes, *self.shape, 0) == 0, f"{self.name} has a negative size")
        elements = math.prod(max(size, 1) for size in self.shape)  # also of one without any
        require(elements < 1 << 48, f"{self.name} has no shape that memory can hold")

    @property
    def torch_dtype(self) -> torch.dtype:
        return _DTYPE_OF_NAME[self.dtype]

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize


@dataclass(frozen=True)
class DenseShard:
    """A safetensors file of dense tensors, `bytes` long."""

    file: Path
    bytes: int
    header_checksum: int
    tensors: tuple[DenseTensor, ...]

    def __post_init__(self) -> None:
        position = self.data_offset_bytes
        for tensor in self.tensors:
            require(tensor.offset_bytes == position, f"{tensor.name} lies where another does")
            require(position % tensor.torch_dtype.itemsize == 0, f"{tensor.name} is not aligned")
            position += tensor.n_bytes
        require(position == self.bytes, "tensors that end where their file does not")

    @property
    def data_offset_bytes(self) -> int:
        """Where the header ends."""
        return min((tensor.offset_bytes for tensor in self.tensors), default=self.bytes)


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
        layout = self.layout
        sizes = (layout.hidden_size, layout.intermediate_size, self.n_experts)
        require(min(*sizes, self.data_offset_bytes) > 0, "a layer of no experts or empty ones")
        require(self.data_offset_bytes % BLOCK_ALIGNMENT == 0, "blocks that are not aligned")
        wanted = block_layout(
            layout.weight_format,
            layout.hidden_size,
            layout.intermediate_size,
            layout.has_gate,
            layout.has_bias,
        )
        require(layout == wanted, "fields that lie elsewhere than their format has them")
        require(len(self.block_checksums) == self.n_experts, "not one checksum per expert")
        require(
            self.block_offset_bytes(self.n_experts) == self.bytes,
            "not as many blocks as the file has room for",
        )

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

    def __post_init__(self) -> None:
        formats = {layer.layout.weight_format for layer in self.moe_layers}
        require(formats == {self.weight_format}, "no experts in the format it names")
        for position, layer in enumerate(self.moe_layers):
            name = experts_file_name(position)
            require(layer.file.name == name, f"{layer.file.name!r:.80}, not {name}")
        for position, shard in enumerate(self.dense):
            name = dense_file_name(position, len(self.dense))
            require(shard.file.name == name, f"{shard.file.name!r:.80}, not {name}")
        names = [tensor.name for shard in self.dense for tensor in shard.tensors]
        require(len(set(names)) == len(names), "a tensor in two places")
        for file in self.files or {}:
            require(Path(file).name == file, f"a file called {file!r:.80}")

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


def plan_experts_file(n_experts: int, layout: BlockLayout) -> tuple[bytes, TensorEntry]:
    """The header of an experts file and the entry of its one tensor, uint8 [E, block_bytes]."""
    header, entries = plan_header(
        [("blocks", torch.uint8, (n_experts, layout.block_bytes))],
        {"weight_format": layout.weight_format},
    )
    return header, entries[0]


def to_json(value: Any) -> Any:
    """A dataclass of this module as JSON; a path becomes its name.

    Infinity and NaN, which some configs hold and JSON does not know, as transformers writes them.
    """
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {"__float__": name}
    if isinstance(value, dict):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, Path):
        return value.name
    return value if isinstance(value, (bool, int, float, str, NoneType)) else to_json(asdict(value))


def decode_floats(data: dict[str, Any]) -> Any:
    """`object_hook` for `json.loads` that undoes the encoding of Infinity and NaN."""
    return float(data["__float__"]) if data.keys() == {"__float__"} else data


Shard = TypeVar("Shard", DenseShard, MoeLayer)


def locate(folder: Path, shard: Shard) -> Shard:
    """A shard just read from JSON, in its folder; ValueError for a file that is none of ours."""
    require(
        OUR_SHARD.fullmatch(str(shard.file)) is not None, f"a shard called {str(shard.file)!r:.80}"
    )
    return replace(shard, file=folder / shard.file)


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` atomically; the shards must be in place."""
    data = {"format_version": FORMAT_VERSION, **_content(manifest)}
    text = json.dumps({**data, "checksum": _own_checksum(manifest)}, indent=1, allow_nan=False)
    write_atomically(manifest.folder / MANIFEST_NAME, f"{text}\n")


def _content(manifest: Manifest) -> dict[str, Any]:
    data: dict[str, Any] = to_json(manifest)
    return {key: value for key, value in data.items() if key not in ("folder", "checksum")}


def _own_checksum(manifest: Manifest) -> int:
    """Of what the manifest says, however its file is laid out."""
    return checksum(json.dumps(_content(manifest), sort_keys=True).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder, with every shard present at its full size.

    UserError when the folder is missing, not prepared or of another format version, when the
    manifest says what cannot be, or when a shard is missing or truncated.
    """
    folder = Path(folder)
    require_prepared(folder)
    path = folder / MANIFEST_NAME
    try:
        data = read_json_object(path, PREPARE_AGAIN, decode_floats)
        if "format_version" not in data:
            raise UserError(
                f"{path} is not the manifest of a prepared folder (it has no format_version); "
                "choose another folder"
            )
        version = data.pop("format_version")
        if type(version) is not int or version != FORMAT_VERSION:
            raise UserError(
                f"{folder} was prepared in format version {version!r:.40}, this program reads "
                f"version {FORMAT_VERSION}; prepare it again with weights_preprocessor.py --force"
            )
        found = from_json(Manifest, {**data, "folder": str(folder)})
        manifest = replace(
            found,
            dense=tuple(locate(folder, shard) for shard in found.dense),
            moe_layers=tuple(locate(folder, layer) for layer in found.moe_layers),
        )
        if manifest.checksum is not None and manifest.checksum != _own_checksum(manifest):
            raise ValueError("it is not what was written: its checksum does not match")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error!s:.200}); {PREPARE_AGAIN}") from error
    for shard in manifest.shards:
        check_size(shard)
    return manifest


def check_size(shard: DenseShard | MoeLayer) -> None:
    """UserError when the shard is missing or not exactly as long as recorded."""
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


def read_dense_tensor(shard: DenseShard, tensor: DenseTensor) -> Tensor:
    """One dense tensor in new CPU memory; UserError when its bytes do not match its checksum."""
    out = torch.empty(tensor.shape, dtype=tensor.torch_dtype)
    read_into(shard.file, tensor.offset_bytes, out)
    if checksum(out) != tensor.checksum:
        raise _corrupt(shard.file, f"tensor {tensor.name}")
    return out


def read_block(layer: MoeLayer, expert: int, out: Tensor) -> None:
    """Read one expert's block into `out`, contiguous CPU uint8 [block_bytes].

    Thread-safe for distinct `out`. UserError when the bytes do not match their checksum.
    """
    assert out.dtype == torch.uint8 and out.numel() == layer.layout.block_bytes
    read_into(layer.file, layer.block_offset_bytes(expert), out)
    if checksum(out) != layer.block_checksums[expert]:
        raise _corrupt(layer.file, f"expert {expert}")


def iterate_dense(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor by its stored name, one at a time, each checked."""
    for shard in manifest.dense:
        for tensor in shard.tensors:
            yield tensor.name, read_dense_tensor(shard, tensor)


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
            found = checksum(path.read_bytes())
        except OSError as error:
            raise UserError(f"{path} is missing or unreadable; {PREPARE_AGAIN}") from error
        if found != wanted:
            raise _corrupt(path, "the file")
    for shard in manifest.shards:
        verify_shard(shard, on_bytes)


def verify_shard(
    shard: DenseShard | MoeLayer, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Check size, header and every checksum of one file; `on_bytes` hears of bytes as they pass."""
    check_size(shard)
    header = torch.empty(shard.data_offset_bytes, dtype=torch.uint8)
    read_into(shard.file, 0, header)
    if checksum(header) != shard.header_checksum:
        raise _corrupt(shard.file, "its header")
    if isinstance(shard, DenseShard):
        for tensor in shard.tensors:
            on_bytes(read_dense_tensor(shard, tensor).nbytes)
    else:
        block = torch.empty(shard.layout.block_bytes, dtype=torch.uint8)
        for expert in range(shard.n_experts):
            read_block(shard, expert, block)
            on_bytes(block.numel())


def _corrupt(path: Path, part: str) -> UserError:
    return UserError(
        f"{path} is corrupt: the checksum of {part} does not match the manifest; {PREPARE_AGAIN}"
    )
