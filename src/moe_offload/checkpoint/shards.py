"""The two kinds of shard of a prepared folder: what is in each, where, and checked reads.

Every dense tensor, every expert's block and every header has a CRC-32, so that a read can be
checked on its own and in parallel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moe_offload.checkpoint.expert_format import BlockLayout
from moe_offload.checkpoint.safetensors_file import TensorEntry, checksum, plan_header, read_into
from moe_offload.errors import UserError

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
