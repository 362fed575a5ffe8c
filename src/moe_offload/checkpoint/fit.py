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
from moe_offload.checkpoint.folders import MANIFEST_NAME, PREPARE_AGAIN
from moe_offload.checkpoint.model_config import stored_dtype
from moe_offload.checkpoint.prepared import Manifest, require
from moe_offload.config import DENSE_FORMATS, WEIGHT_FORMATS
from moe_offload.errors import UserError


def require_fit(manifest: Manifest, model: PreTrainedModel) -> None:
    """UserError unless the folder is of this model, which is on the meta device with its experts.

    Compared are the experts' modules, counts and layouts, and of each dense tensor name, shape and
    dtype.
    """
    path = manifest.folder / MANIFEST_NAME
    try:
        require_experts(manifest, model)
        _require_dense(manifest, model)
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} does not fit its model: {error}; {PREPARE_AGAIN}") from error


def require_experts(manifest: Manifest, model: PreTrainedModel) -> None:
    """ValueError unless the model, which has its experts, has those of the manifest."""
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
            and layer.layout == module.block_layout(manifest.weight_format, layer.layout.scales),
            f"the experts of {module.name} are of other number or sizes",
        )


def _require_dense(manifest: Manifest, model: PreTrainedModel) -> None:
    require(
        (manifest.model_dtype == "float32") == (manifest.dense_format == "fp32"),
        f"a model in {manifest.model_dtype} with dense weights in {manifest.dense_format}",
    )
    of_experts = {name for module in find_experts(model) for name in module.parameters.values()}
    expected: dict[str, tuple[tuple[int, ...], list[torch.dtype]]] = {}
    for name, tensor in model.state_dict().items():
        if name not in of_experts:
            dtype = stored_dtype(model, name)
            # What another transformers keeps in fp32 is no less exact.
            dtypes = [dtype, torch.float32] if dtype.is_floating_point else [dtype]
            expected[name] = tuple(tensor.shape), dtypes
    packed: set[str] = set()
    require(manifest.dense_format in DENSE_FORMATS, f"dense weights in {manifest.dense_format}")
    facts = WEIGHT_FORMATS[manifest.dense_format]
    for weight in manifest.packed_weights:
        require(
            bool(facts.group)
            and weight.bits == facts.bits
            and isinstance(model.get_submodule(weight.name.rpartition(".")[0]), nn.Linear)
            and expected.pop(weight.name, ((), []))[0] == (weight.n_rows, weight.n_columns),
            f"{weight.name!r:.80} is packed as no weight of the model in {manifest.dense_format}",
        )
        sizes, scales = quantization.packed_shapes(weight.n_rows, weight.n_columns, weight.bits)
        expected[f"{weight.name}.packed"] = sizes, [torch.uint8]
        expected[f"{weight.name}.scale"] = scales, [torch.float16]
        packed |= {f"{weight.name}.packed", f"{weight.name}.scale"}
    for tensor in (tensor for shard in manifest.dense for tensor in shard.tensors):
        known = tensor.name in expected  # and not met before
        require(known, f"it holds {tensor.name!r:.80}, a tensor which the model does not have")
        shape, dtypes = expected.pop(tensor.name)
        require(
            tensor.shape == shape and tensor.torch_dtype in dtypes,
            f"expected {tensor.name} of shape {list(shape)} in {dtypes[0]}, found "
            f"{list(tensor.shape)} in torch.{tensor.dtype}",
        )
    for name in packed & expected.keys():
        raise ValueError(f"it lacks {name!r:.80}")
