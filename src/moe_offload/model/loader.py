"""Builds the transformers model of a prepared folder, without its experts.

The model is built on the meta device, each experts module gives its place to a stand-in that the
caller supplies, and only dense weights are read, straight to the device. Attention, routers,
rotary embeddings and the KV cache stay transformers' own, so any architecture whose experts
follow its convention runs unmodified.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from moe_offload.checkpoint.block import Activation
from moe_offload.checkpoint.folders import MANIFEST_NAME, PREPARE_AGAIN
from moe_offload.checkpoint.model_config import (
    build_on_meta,
    builder_of,
    require_experts_per_token,
    require_generation_config,
    require_plausible,
    transformers_told,
)
from moe_offload.checkpoint.prepared import MODEL_DTYPES, Manifest, iterate_dense
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


class ExpertsFunction(nn.Module):
    """One layer's experts, computed by a function; with the names of transformers' arguments."""

    def __init__(self, run: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return self._run(hidden_states, top_k_index, top_k_weights)


def model_config(manifest: Manifest) -> PretrainedConfig:
    """The transformers config of a prepared folder; UserError for one that it cannot use."""
    path = manifest.folder / MANIFEST_NAME
    require_plausible(manifest.config, path, PREPARE_AGAIN)
    remedy = f"install a newer transformers, or {PREPARE_AGAIN}"
    with transformers_told(f"use the config in {path}", remedy):
        model_class = CONFIG_MAPPING[str(manifest.config.get("model_type"))]
        config: PretrainedConfig = model_class.from_dict(dict(manifest.config))
    # What a pass returns is asked by who calls it: a tuple in a ModelOutput's place would end a
    # run, and every layer's hidden states would fill memory.
    for part in (config, config.get_text_config()):
        part.return_dict, part.output_hidden_states, part.output_attentions = True, False, False
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
    if attention != "sdpa" and not (
        model_class._supports_sdpa and takes_other_attention(model_class)
    ):
        raise UserError(
            f"{model_class.__name__} computes its attention itself: use --attention sdpa, which "
            "leaves it to the model"
        )
    if not model_class._supports_sdpa:
        attention = "eager"
    task = "build the model that the prepared folder describes"
    return build_on_meta(config, dtype, attention, task, PREPARE_AGAIN).eval()


def given_text_alone(config: PretrainedConfig) -> list[str]:
    """A line for the user where the model could take more than text."""
    if builder_of(config) is AutoModelForCausalLM:
        return []
    return [f"{config.model_type} is a model of images and text: it is given text alone"]


def find_moe_sites(model: PreTrainedModel, experts_paths: list[str]) -> list[MoeSite]:
    """The model's MoE layers, in order."""
    sites = []
    for layer, path in enumerate(experts_paths):
        activation, own = probe_activation(model.get_submodule(path))
        block = model.get_submodule(path.rpartition(".")[0])
        sites.append(MoeSite(layer, path, block, activation, own))
    return sites


def refuse_saving(model: PreTrainedModel) -> None:
    """Make `save_pretrained` a UserError: the experts are not in the model's state."""

    def save_pretrained(*_: object, **__: object) -> NoReturn:
        raise UserError(
            "save_pretrained would write this model without its experts, which are not in its "
            "state: copy the prepared folder instead, or the checkpoint that it was prepared from"
        )

    model.save_pretrained = save_pretrained


class PreparedModel:
    """The source of a real run: a folder that `weights_preprocessor.py` has prepared.

    `experts_paths`, `layouts` and `n_experts` have one entry per MoE layer; `n_stored_layers` of
    them have memory of their own, all but in models of random weights. What loads calls `progress`
    with the bytes of each piece.
    """

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
        self.dense_bytes, self.expert_bytes = manifest.dense_bytes, manifest.expert_bytes
        self.weight_format = manifest.weight_format
        self.dense_format = manifest.dense_format

    def load_dense(self, model: PreTrainedModel, device: torch.device, progress: Progress) -> None:
        """Bring a skeleton to life on `device`; every tensor's checksum is checked."""
        tensors = {}
        for name, tensor in iterate_dense(self.manifest.dense):
            progress(tensor.nbytes)
            tensors[name] = tensor.to(device)
        for weight in self.manifest.packed_weights:
            path = weight.name.removesuffix(".weight")
            packed, scale = (tensors.pop(f"{weight.name}.{part}") for part in ("packed", "scale"))
            linear: Any = model.get_submodule(path)
            model.set_submodule(path, CpuLinear.from_packed(linear, packed, scale, weight.bits))
        fill_model(model, tensors, device)
        if self.manifest.generation_config is not None:
            model.generation_config = GenerationConfig.from_dict(self.manifest.generation_config)

    def load_experts(self, store: ExpertStore, progress: Progress) -> None:
        """Read every expert's block, checked, several reads at a time."""
        store.read(self.manifest.moe_layers, progress)


def fill_model(model: PreTrainedModel, tensors: dict[str, Tensor], device: torch.device) -> None:
    """Give a skeleton its weights, compute what no checkpoint holds; UserError for what is missing.

    `tensors` are of the names and shapes of the model, which `require_fit` has compared.
    """
    model.load_state_dict(tensors, strict=False, assign=True)
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
        if module.get_buffer(name).isnan().any():
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
    """One of each shape: what one layer has, or near it."""
    return list({(one.out_features, one.in_features): one for one in linears}.values())
