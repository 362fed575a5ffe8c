"""The prepared folder and its manifest.

    manifest.json               written last: a folder without it is not prepared
    dense.safetensors           everything but the experts, under the names of transformers' module
    dense-00001-of-00003...     tree (several shards when large)
    experts-00000.safetensors   per MoE layer, one uint8 tensor `blocks` [E, block_bytes], its data
                                at a multiple of 4096 bytes; a block is an
                                `expert_format.BlockLayout`

A dense matrix in int8 or int4 is stored as `<name>.packed` and `<name>.scale` (the tiles of
`quantization.py`); `Manifest.packed_weights` holds its logical shape.

The two kinds of shard of a prepared folder: what is in each, where, and checked reads.

Every dense tensor, every expert's block and every header has a CRC-32, so that a read can be
checked on its own and in parallel.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import torch
from torch import Tensor

from moe_offload.checkpoint.block import WEIGHT_FORMATS, BlockLayout
from moe_offload.checkpoint.folders import MANIFEST_NAME, require_prepared
from moe_offload.checkpoint.safetensors_file import (
    TensorEntry,
    checksum,
    plan_header,
    read_into,
)
from moe_offload.errors import UserError
from moe_offload.files import write_atomically

BLOCKS_NAME: Final = "blocks"


@dataclass(frozen=True)
class DenseTensor:
    """One stored tensor of a dense shard; `offset_bytes` counts from the start of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset_bytes: int
    checksum: int


@dataclass(frozen=True)
class DenseShard:
    """A safetensors file of dense tensors."""

    path: Path
    file_bytes: int
    header_checksum: int
    tensors: tuple[DenseTensor, ...]

    @property
    def data_offset_bytes(self) -> int:
        """Where the header ends."""
        return min((tensor.offset_bytes for tensor in self.tensors), default=self.file_bytes)


@dataclass(frozen=True)
class MoeLayer:
    """The experts of one MoE layer: E blocks back to back in one file.

    `module` is the path of the experts module in transformers' model, such as
    `model.layers.0.mlp.experts`; block `e` starts at `data_offset_bytes + e * layout.block_bytes`.
    """

    module: str
    path: Path
    file_bytes: int
    data_offset_bytes: int
    n_experts: int
    layout: BlockLayout
    header_checksum: int
    block_checksums: tuple[int, ...]

    def block_offset_bytes(self, expert: int) -> int:
        return self.data_offset_bytes + expert * self.layout.block_bytes


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
        [(BLOCKS_NAME, torch.uint8, (n_experts, layout.block_bytes))],
        {"weight_format": layout.weight_format},
    )
    return header, entries[0]


def dense_shard_to_json(shard: DenseShard) -> dict[str, Any]:
    return {
        "file": shard.path.name,
        "bytes": shard.file_bytes,
        "header_checksum": shard.header_checksum,
        "tensors": [
            {
                "name": tensor.name,
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "offset_bytes": tensor.offset_bytes,
                "checksum": tensor.checksum,
            }
            for tensor in shard.tensors
        ],
    }


def dense_shard_from_json(folder: Path, data: dict[str, Any]) -> DenseShard:
    """The inverse of `dense_shard_to_json`; ValueError, KeyError, TypeError or AttributeError for
    what that cannot have written."""
    tensors = tuple(
        DenseTensor(
            tensor["name"],
            _dtype(tensor["dtype"]),
            tuple(map(_whole, tensor["shape"])),
            _whole(tensor["offset_bytes"]),
            _whole(tensor["checksum"]),
        )
        for tensor in data["tensors"]
    )
    n_bytes, header_checksum = _whole(data["bytes"]), _whole(data["header_checksum"])
    shard = DenseShard(folder / data["file"], n_bytes, header_checksum, tensors)
    for one in tensors:
        if one.offset_bytes + math.prod(one.shape) * one.dtype.itemsize > n_bytes:
            raise ValueError(f"{one.name} lies beyond the end of its file")
    return shard


def moe_layer_to_json(layer: MoeLayer) -> dict[str, Any]:
    return {
        "module": layer.module,
        "file": layer.path.name,
        "bytes": layer.file_bytes,
        "data_offset_bytes": layer.data_offset_bytes,
        "n_experts": layer.n_experts,
        "layout": layer.layout.to_json(),
        "header_checksum": layer.header_checksum,
        "block_checksums": list(layer.block_checksums),
    }


def moe_layer_from_json(folder: Path, data: dict[str, Any]) -> MoeLayer:
    """The inverse of `moe_layer_to_json`, with the same errors as `dense_shard_from_json`."""
    layer = MoeLayer(
        module=data["module"],
        path=folder / data["file"],
        file_bytes=_whole(data["bytes"]),
        data_offset_bytes=_whole(data["data_offset_bytes"]),
        n_experts=_whole(data["n_experts"]),
        layout=BlockLayout.from_json(data["layout"]),
        header_checksum=_whole(data["header_checksum"]),
        block_checksums=tuple(map(_whole, data["block_checksums"])),
    )
    if len(layer.block_checksums) != layer.n_experts:
        raise ValueError("one checksum per expert")
    if layer.block_offset_bytes(layer.n_experts) != layer.file_bytes:
        raise ValueError("as many blocks as the file has room for")
    return layer


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size, place or checksum")
    return value


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{name} is no dtype")
    return dtype


def check_size(shard: DenseShard | MoeLayer) -> None:
    """UserError when the shard is missing or not exactly as long as recorded."""
    try:
        found = shard.path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{shard.path} is missing or unreadable ({error.strerror}); prepare the model again "
            "with weights_preprocessor.py --force"
        ) from error
    if found != shard.file_bytes:
        raise UserError(
            f"{shard.path} is truncated or altered: expected {shard.file_bytes} bytes, found "
            f"{found}; prepare the model again with weights_preprocessor.py --force"
        )


def read_dense_tensor(shard: DenseShard, tensor: DenseTensor) -> Tensor:
    """One dense tensor in new CPU memory; UserError when its bytes do not match its checksum."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    read_into(shard.path, tensor.offset_bytes, out)
    if checksum(out) != tensor.checksum:
        raise _corrupt(shard.path, f"tensor {tensor.name}")
    return out


def read_block(layer: MoeLayer, expert: int, out: Tensor) -> None:
    """Read one expert's block into `out`, contiguous CPU uint8 [block_bytes].

    Thread-safe for distinct `out`. UserError when the bytes do not match their checksum.
    """
    assert out.dtype == torch.uint8 and out.numel() == layer.layout.block_bytes
    read_into(layer.path, layer.block_offset_bytes(expert), out)
    if checksum(out) != layer.block_checksums[expert]:
        raise _corrupt(layer.path, f"expert {expert}")


def verify_shard(
    shard: DenseShard | MoeLayer, on_bytes: Callable[[int], None] = lambda _: None
) -> None:
    """Check size, header and every checksum of one file; `on_bytes` hears of bytes as they pass."""
    check_size(shard)
    header = torch.empty(shard.data_offset_bytes, dtype=torch.uint8)
    read_into(shard.path, 0, header)
    if checksum(header) != shard.header_checksum:
        raise _corrupt(shard.path, "its header")
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
        f"{path} is corrupt: the checksum of {part} does not match the manifest; "
        "prepare the model again with weights_preprocessor.py --force"
    )


FORMAT_VERSION: Final = 1
MODEL_DTYPES: Final = {"bfloat16": torch.bfloat16, "float32": torch.float32}
PREPARE_AGAIN: Final = "prepare the model again with weights_preprocessor.py --force"


@dataclass(frozen=True)
class PackedWeight:
    """A dense matrix stored in int8 or int4: logical shape [n_rows, n_columns], `bits` 8 or 4."""

    name: str
    bits: int
    n_rows: int
    n_columns: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8) or not isinstance(self.name, str):
            raise ValueError(f"no packed weight: {self}")


@dataclass(frozen=True)
class Manifest:
    """What a prepared folder holds.

    `config` and `generation_config` are JSON dictionaries of transformers; `model_dtype` is the
    dtype of the model to build, `bfloat16` or `float32`; `dense_format` is `bf16`, `fp32`, `int8`
    or `int4`; `weight_format` is the experts' format; `source_fingerprint` tells whether the source
    has changed since.
    """

    folder: Path
    source: str
    created_with: dict[str, str]
    config: dict[str, Any]
    generation_config: dict[str, Any] | None
    model_dtype: str
    weight_format: str
    dense_format: str
    dense_files: tuple[DenseShard, ...]
    packed_weights: tuple[PackedWeight, ...]
    moe_layers: tuple[MoeLayer, ...]
    source_fingerprint: str = ""

    @property
    def shards(self) -> tuple[DenseShard | MoeLayer, ...]:
        return (*self.dense_files, *self.moe_layers)

    @property
    def expert_bytes(self) -> int:
        return sum(layer.n_experts * layer.layout.block_bytes for layer in self.moe_layers)

    @property
    def dense_bytes(self) -> int:
        return sum(shard.file_bytes - shard.data_offset_bytes for shard in self.dense_files)


def write_manifest(manifest: Manifest) -> None:
    """Write `manifest.json` atomically; the shards must be in place."""
    data = {
        "format_version": FORMAT_VERSION,
        "source": manifest.source,
        "source_fingerprint": manifest.source_fingerprint,
        "created_with": manifest.created_with,
        "model_dtype": manifest.model_dtype,
        "weight_format": manifest.weight_format,
        "dense_format": manifest.dense_format,
        "config": manifest.config,
        "generation_config": manifest.generation_config,
        "packed_weights": [asdict(weight) for weight in manifest.packed_weights],
        "dense": [dense_shard_to_json(shard) for shard in manifest.dense_files],
        "moe_layers": [moe_layer_to_json(layer) for layer in manifest.moe_layers],
    }
    path = manifest.folder / MANIFEST_NAME
    text = json.dumps(_encode_floats(data), indent=1, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def _encode_floats(value: Any) -> Any:
    """Infinity and NaN, which some configs hold and JSON does not know, as transformers does."""
    if isinstance(value, float) and not math.isfinite(value):
        name = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return {"__float__": name}
    if isinstance(value, dict):
        return {key: _encode_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode_floats(item) for item in value]
    return value


def decode_floats(data: dict[str, Any]) -> Any:
    """`object_hook` for `json.loads` that undoes the encoding of Infinity and NaN."""
    return float(data["__float__"]) if data.keys() == {"__float__"} else data


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a prepared folder, with every shard present at its full size.

    UserError when the folder is missing, not prepared or of another format version, or when a shard
    is missing or truncated.
    """
    folder = Path(folder)
    require_prepared(folder)
    path = folder / MANIFEST_NAME
    try:
        data = json.loads(path.read_bytes(), object_hook=decode_floats)
        version = data["format_version"]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, TypeError) as error:
        raise UserError(_foreign(path)) from error
    except (ValueError, RecursionError) as error:
        raise UserError(_damaged(path)) from error
    if version != FORMAT_VERSION:
        raise UserError(
            f"{folder} was prepared in format version {version}, this program reads version "
            f"{FORMAT_VERSION}; prepare it again with weights_preprocessor.py --force"
        )
    try:
        manifest = Manifest(
            folder=folder,
            source=str(data["source"]),
            created_with=dict(data["created_with"]),
            config=_object(path, data, "config"),
            generation_config=(
                None
                if data["generation_config"] is None
                else _object(path, data, "generation_config")
            ),
            model_dtype=_choice(path, data, "model_dtype", MODEL_DTYPES),
            weight_format=_choice(path, data, "weight_format", WEIGHT_FORMATS),
            dense_format=_choice(path, data, "dense_format", WEIGHT_FORMATS),
            packed_weights=tuple(PackedWeight(**weight) for weight in data["packed_weights"]),
            dense_files=tuple(dense_shard_from_json(folder, shard) for shard in data["dense"]),
            moe_layers=tuple(moe_layer_from_json(folder, layer) for layer in data["moe_layers"]),
            source_fingerprint=str(data["source_fingerprint"]),
        )
        formats = {layer.layout.weight_format for layer in manifest.moe_layers}
        if formats != {manifest.weight_format}:
            raise ValueError("layers of experts in the format it says")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(_damaged(path)) from error
    for shard in manifest.shards:
        check_size(shard)
    return manifest


def _foreign(path: Path) -> str:
    return (
        f"{path} is not the manifest of a prepared folder (it has no format_version); "
        "choose another folder"
    )


def _damaged(path: Path) -> str:
    return f"{path} is damaged; {PREPARE_AGAIN}"


def _object(path: Path, data: dict[str, Any], name: str) -> dict[str, Any]:
    found = data[name]
    if not isinstance(found, dict):
        raise UserError(_unexpected(path, name, "an object", found))
    return found


def _choice(path: Path, data: dict[str, Any], name: str, choices: Collection[str]) -> str:
    found = data[name]
    if not isinstance(found, str) or found not in choices:
        raise UserError(_unexpected(path, name, f"one of {', '.join(choices)}", found))
    return found


def _unexpected(path: Path, name: str, expected: str, found: object) -> str:
    shown = shorten(repr(found), 60, placeholder=" ...")
    return f"expected {name} in {path} as {expected}, found {shown}; {PREPARE_AGAIN}"


def iterate_dense(manifest: Manifest) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor by its stored name, one at a time, each checked."""
    for shard in manifest.dense_files:
        for tensor in shard.tensors:
            yield tensor.name, read_dense_tensor(shard, tensor)


def verify(manifest: Manifest, on_bytes: Callable[[int], None] = lambda _: None) -> None:
    """Check every byte of every shard; UserError names the first damaged file."""
    for shard in manifest.shards:
        verify_shard(shard, on_bytes)
