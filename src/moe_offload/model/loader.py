"""Builds the transformers model of a prepared folder, without its experts.

The model is built on the meta device, each experts module gives its place to a stand-in that the
caller supplies, and only dense weights are read, straight to the device. Attention, routers,
rotary embeddings and the KV cache stay transformers' own, so any architecture whose experts
follow its convention runs unmodified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from moe_offload.checkpoint.block import Activation, BlockLayout
from moe_offload.checkpoint.fit import require_fit
from moe_offload.checkpoint.folders import MANIFEST_NAME
from moe_offload.checkpoint.model_config import (
    build_on_meta,
    builder_of,
    require_experts_per_token,
    require_generation_config,
    require_plausible_depth,
    transformers_told,
)
from moe_offload.checkpoint.prepared import (
    MODEL_DTYPES,
    PREPARE_AGAIN,
    Manifest,
    PackedWeight,
    iterate_dense,
)
from moe_offload.errors import UserError
from moe_offload.experts.store import ExpertStore
from moe_offload.kernels.cpu_linear import CpuLinear
from moe_offload.kernels.oracle import probe_activation
from moe_offload.model.attention import takes_other_attention

Progress = Callable[[int], None]


@dataclass(frozen=True)
class MoeSite:
    """One MoE layer's place in the model: which module, and what its experts compute.

    `experts_path` names the experts module, `block` the module that routes and calls it;
    `act_module` is the model's own activation, [n, R] -> [n, I].
    """

    layer: int
    experts_path: str
    block: nn.Module
    activation: Activation
    act_module: Callable[[Tensor], Tensor]


def model_config(manifest: Manifest) -> PretrainedConfig:
    """The transformers config of a prepared folder; UserError for one that it cannot use."""
    model_type = str(manifest.config.get("model_type", ""))
    if model_type not in CONFIG_MAPPING:
        raise UserError(
            f"{manifest.folder} holds a model of type '{model_type}', which the installed "
            "transformers does not know: install a newer transformers"
        )
    path = manifest.folder / MANIFEST_NAME
    require_plausible_depth(manifest.config, path, PREPARE_AGAIN)
    with transformers_told(f"use the config in {path}", PREPARE_AGAIN):
        config = CONFIG_MAPPING[model_type].from_dict(dict(manifest.config))
    n_experts = min(layer.n_experts for layer in manifest.moe_layers)
    require_experts_per_token(config, n_experts, path, PREPARE_AGAIN)
    if manifest.generation_config is not None:
        require_generation_config(manifest.generation_config, path, PREPARE_AGAIN)
    return config


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype, attention: str) -> PreTrainedModel:
    """The whole model on the meta device: shapes, no memory.

    An architecture without `attention` "sdpa" (gpt-oss's sinks) gets transformers' eager one.
    """
    model_class = builder_of(config)._model_mapping[type(config)]
    if not model_class._supports_sdpa:
        if attention != "sdpa":
            raise UserError(
                f"{model_class.__name__} computes its attention itself: use --attention sdpa, "
                "which leaves it to the model"
            )
        attention = "eager"
    elif attention != "sdpa" and not takes_other_attention(model_class):
        raise UserError(
            f"{model_class.__name__} computes its attention differently under names it does not "
            "know: use --attention sdpa"
        )
    task = "build the model that the prepared folder describes"
    return build_on_meta(config, dtype, attention, task, PREPARE_AGAIN).eval()


def given_text_alone(config: PretrainedConfig) -> list[str]:
    """A line for the user where the model could take more than text."""
    if builder_of(config) is AutoModelForCausalLM:
        return []
    return [f"{config.model_type} is a model of images and text: it is given text alone"]


def find_moe_sites(model: PreTrainedModel, experts_paths: list[str]) -> list[MoeSite]:
    """The model's MoE layers, in order; UserError when the model has no such module."""
    sites = []
    for layer, path in enumerate(experts_paths):
        try:
            experts = model.get_submodule(path)
        except AttributeError as error:
            raise UserError(
                f"the prepared model names the experts module '{path}', which the installed "
                "transformers does not have: prepare the model again with --force"
            ) from error
        activation, own = probe_activation(experts)
        block = model.get_submodule(path.rpartition(".")[0])
        sites.append(MoeSite(layer, path, block, activation, own))
    return sites


def install_experts(model: PreTrainedModel, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the experts module at `path`."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def refuse_saving(model: PreTrainedModel) -> None:
    """Make `save_pretrained` a UserError: the experts are not in the model's state."""

    def save_pretrained(*_: object, **__: object) -> NoReturn:
        raise UserError(
            "save_pretrained would write this model without its experts, which are not in its "
            "state: copy the prepared folder instead, or the checkpoint that it was prepared from"
        )

    model.save_pretrained = save_pretrained


class ModelSource(Protocol):
    """Where a model's weights come from: a prepared folder, or a generator of random ones.

    `experts_paths`, `layouts` and `n_experts` have one entry per MoE layer; `n_stored_layers` of
    them have memory of their own, all but in models of random weights. `load_dense` brings
    a skeleton to life on a device, `load_experts` fills a store; both call `progress` with the
    bytes of each piece.
    """

    name: str
    config: PretrainedConfig
    dtype: torch.dtype
    experts_paths: list[str]
    layouts: list[BlockLayout]
    n_experts: list[int]
    n_stored_layers: int
    dense_bytes: int

    @property
    def weight_format(self) -> str:
        """The experts' format."""

    @property
    def dense_format(self) -> str:
        """The format of the large dense matrices."""

    def check(self, model: PreTrainedModel) -> None:
        """UserError unless these are the weights of `model`, a skeleton with its own experts."""

    def load_dense(self, model: PreTrainedModel, device: torch.device, progress: Progress) -> None:
        """Fill every weight but the experts."""

    def load_experts(self, store: ExpertStore, progress: Progress) -> None:
        """Fill every expert's block."""


class PreparedModel:
    """The source of a real run: a folder that `weights_preprocessor.py` has prepared."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.folder = manifest.folder
        self.name = manifest.folder.resolve().name
        self.config = model_config(manifest)
        self.dtype = MODEL_DTYPES[manifest.model_dtype]
        self.experts_paths = [layer.module for layer in manifest.moe_layers]
        self.layouts = [layer.layout for layer in manifest.moe_layers]
        self.n_experts = [layer.n_experts for layer in manifest.moe_layers]
        self.n_stored_layers = len(self.layouts)
        self.dense_bytes = manifest.dense_bytes
        self.weight_format = manifest.weight_format
        self.dense_format = manifest.dense_format

    def check(self, model: PreTrainedModel) -> None:
        """UserError for a manifest that does not fit the model which its config builds."""
        require_fit(self.manifest, model)

    def load_dense(self, model: PreTrainedModel, device: torch.device, progress: Progress) -> None:
        """Read the dense weights to `device`; every tensor's checksum is checked.

        UserError when a tensor is missing, superfluous, or of another shape than the model's.
        """
        packed = {weight.name: weight for weight in self.manifest.packed_weights}
        parts: dict[str, dict[str, Tensor]] = {}
        for stored_name, tensor in iterate_dense(self.manifest.dense):
            progress(tensor.nbytes)
            name, _, part = stored_name.rpartition(".")
            if name not in packed:
                assign(model, stored_name, tensor.to(device))
                continue
            parts.setdefault(name, {})[part] = tensor
        for name, tensors in parts.items():  # last: a layer takes its bias along
            _install_packed(model, packed[name], tensors["packed"], tensors["scale"])
        finish_model(model, device)
        if self.manifest.generation_config is not None:
            model.generation_config = GenerationConfig.from_dict(self.manifest.generation_config)

    def load_experts(self, store: ExpertStore, progress: Progress) -> None:
        """Read every expert's block, checked, several reads at a time."""
        store.read(self.manifest.moe_layers, progress)


def finish_model(model: PreTrainedModel, device: torch.device) -> None:
    """Tie weights and compute what no checkpoint holds; UserError names what is still missing."""
    model.tie_weights()
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if missing:
        raise UserError(
            f"the prepared folder lacks the tensor '{missing[0]}'"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + ": prepare the model again with --force"
        )
    tensor: Any
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            tensor._is_hf_initialized = True  # transformers' own mark: leave this tensor alone
    uninitialised = []
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                filler = float("nan") if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full_like(buffer, filler, device=device)
                uninitialised.append((module, name))
    model.initialize_weights()
    for module, name in uninitialised:
        buffer = module.get_buffer(name)
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            raise UserError(
                f"buffer '{name}' of {type(module).__name__} is in no checkpoint and the model "
                "does not initialise it: this architecture is not supported"
            )
    model.requires_grad_(False)


def onednn_linears(model: PreTrainedModel) -> list[CpuLinear]:
    """The linears that oneDNN may compute for many tokens; the head sees one token a prompt."""
    head = model.get_output_embeddings()
    return [
        module
        for module in model.modules()
        if isinstance(module, CpuLinear) and module.suits_onednn and module is not head
    ]


def distinct_linears(linears: Iterable[CpuLinear]) -> list[CpuLinear]:
    """The first of each shape: what one layer has, or near it."""
    by_shape: dict[tuple[int, int], CpuLinear] = {}
    for linear in linears:
        by_shape.setdefault((linear.out_features, linear.in_features), linear)
    return list(by_shape.values())


def assign(model: PreTrainedModel, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer `name`; UserError when the model has none like it."""
    path, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(path)
        current = module._parameters.get(leaf)
        if current is None:
            current = module._buffers[leaf]
    except (AttributeError, KeyError) as error:
        raise UserError(
            f"the prepared folder holds the tensor '{name}', which the installed transformers' "
            "model does not have: prepare the model again with --force"
        ) from error
    if current is None or current.shape != tensor.shape:
        raise UserError(
            f"tensor '{name}' has shape {list(tensor.shape)}, the model expects "
            f"{None if current is None else list(current.shape)}: prepare the model again"
        )
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _install_packed(
    model: PreTrainedModel, weight: PackedWeight, packed: Tensor, scale: Tensor
) -> None:
    path = weight.name.rpartition(".")[0]
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear), path
    install_experts(
        model, path, CpuLinear.from_packed(linear, packed, scale, 8 if weight.bits == 8 else 4)
    )
