"""Whether a prepared folder holds what its model needs, told before anything is loaded.

A manifest can be whole, with every checksum right, and still describe another model: what it says
of experts and dense tensors is compared here with the model that its config builds.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from moe_offload.checkpoint import quantization
from moe_offload.checkpoint.conversion import find_experts
from moe_offload.checkpoint.folders import MANIFEST_NAME
from moe_offload.checkpoint.prepared import (
    PREPARE_AGAIN,
    DenseTensor,
    Manifest,
    PackedWeight,
    require,
)
from moe_offload.checkpoint.safetensors_file import read_header
from moe_offload.checkpoint.source import stored_dtype
from moe_offload.config import WEIGHT_FORMATS
from moe_offload.errors import UserError


def require_fit(manifest: Manifest, model: PreTrainedModel) -> None:
    """UserError unless the folder is of this model, which is on the meta device with its experts.

    Compared are the experts' modules, counts, layouts, and of each dense tensor name, shape, dtype
    and its place in the shard's own header.
    """
    path = manifest.folder / MANIFEST_NAME
    try:
        _require_experts(manifest, model)
        _require_dense(manifest, model)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} does not fit its model: {error}; {PREPARE_AGAIN}") from error


def _require_experts(manifest: Manifest, model: PreTrainedModel) -> None:
    modules = find_experts(model)
    found = [layer.module for layer in manifest.moe_layers]
    require(
        found == [module.name for module in modules],
        f"expected experts in {len(modules)} layers from {modules[0].name} on, found "
        f"{len(found)} from {found[0]!r:.80} on",
    )
    for layer, module in zip(manifest.moe_layers, modules, strict=True):
        require(
            layer.n_experts == module.n_experts
            and layer.layout == module.block_layout(manifest.weight_format),
            f"the experts of {module.name} are of other number or sizes",
        )


def _require_dense(manifest: Manifest, model: PreTrainedModel) -> None:
    facts = WEIGHT_FORMATS[manifest.dense_format]
    require(
        (manifest.model_dtype == "float32") == (manifest.dense_format == "fp32"),
        f"a model in {manifest.model_dtype} with dense weights in {manifest.dense_format}",
    )
    packed: dict[str, PackedWeight] = {weight.name: weight for weight in manifest.packed_weights}
    require(not packed or bool(facts.group), f"packed weights in {manifest.dense_format}")
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for module in find_experts(model):
        for name in module.parameters.values():
            del shapes[name]
    stored = {tensor.name: tensor for shard in manifest.dense for tensor in shard.tensors}
    for name, weight in packed.items():
        require(
            isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear)
            and shapes.pop(name, None) == (weight.n_rows, weight.n_columns)
            and weight.bits == facts.bits,
            f"{name!r:.80} is packed as no weight of the model",
        )
        shape, scale = quantization.packed_shapes(weight.n_rows, weight.n_columns, weight.bits)
        _require_tensor(stored.pop(f"{name}.packed", None), shape, (torch.uint8,), name)
        _require_tensor(stored.pop(f"{name}.scale", None), scale, (torch.float16,), name)
    for name, tensor in stored.items():
        require(name in shapes, f"it holds the tensor {name!r:.80}, which the model does not have")
        dtype = stored_dtype(model, name)
        # What another transformers keeps in fp32 is no less exact.
        dtypes = (dtype, torch.float32) if dtype.is_floating_point else (dtype,)
        _require_tensor(tensor, shapes[name], dtypes, name)
    for shard in manifest.dense:
        entries = [(e.name, e.dtype, e.shape, e.offset_bytes) for e in read_header(shard.file)]
        told = [(t.name, t.torch_dtype, t.shape, t.offset_bytes) for t in shard.tensors]
        require(entries == told, f"the header of {shard.file.name} says otherwise")


def _require_tensor(
    tensor: DenseTensor | None,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...],
    name: str,
) -> None:
    require(
        tensor is not None and tensor.shape == shape and tensor.torch_dtype in dtypes,
        f"expected {name} of shape {list(shape)} in {dtypes[0]}, found "
        + ("none" if tensor is None else f"{list(tensor.shape)} in torch.{tensor.dtype}"),
    )
