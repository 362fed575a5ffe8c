"""What of a model outside its experts goes into the dense shards, in which form and order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.checkpoint import PackedWeight
from moe_offload.checkpoint.source_checkpoint import SourceCheckpoint

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
