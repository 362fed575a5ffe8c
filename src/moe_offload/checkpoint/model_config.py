"""What a model's configuration says, whoever wrote it, checked before anything is built from it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    GenerationConfig,
    MixtralConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from moe_offload.checkpoint.quantized_settings import Settings, read_settings
from moe_offload.errors import UserError
from moe_offload.files import read_json_object

_QUANTISATION: Final = ("quantization_config", "compression_config")
_STOP_IDS: Final = ("eos_token_id", "bos_token_id", "pad_token_id")
MOST_LAYERS: Final = 1000  # the deepest published models have some 130
_LARGEST_WINDOW: Final = 1 << 40  # a window of no end is larger than any context, and no int64
_DEPTHS: Final = ("num_hidden_layers", "n_layers", "n_layer", "num_layers")
# Of Mistral's params.json.
_DEFAULT_CONTEXT: Final = 32768  # Mixtral 8x7B; its params.json does not say
_DEFAULT_ROPE_THETA: Final = 1e6  # likewise
# Types that transformers has under another name: as its publisher says of the model.
_SAME_AS: Final = {"kimi_k2": "deepseek_v3"}
_KNOWN_MOE: Final = {"num_experts", "num_experts_per_tok"}


@contextmanager
def transformers_told(task: str, remedy: str) -> Iterator[None]:
    """UserError for whatever transformers raises in here: it has many kinds for a bad config."""
    try:
        yield
    except Exception as error:
        said = f"it finds no {error}" if isinstance(error, KeyError) else str(error).strip()
        said = said.partition("\n\n")[0]  # an essay may follow the first paragraph
        reason = shorten(said, 160, placeholder=" ...").rstrip(".:") or type(error).__name__
        raise UserError(f"transformers cannot {task}: {reason}; {remedy}") from error


def require_plausible(found: dict[str, Any], path: Path, remedy: str) -> None:
    """UserError for what no model has: layers whose building would not end, a window of nothing."""
    window = found.get("sliding_window")
    is_used = found.get("use_sliding_window", True)
    if type(window) is int and is_used and not 1 <= window <= _LARGEST_WINDOW:
        raise UserError(
            f"expected sliding_window of 1 to {_LARGEST_WINDOW} in {path}, found {window}; {remedy}"
        )
    for name, value in found.items():
        if name in _DEPTHS and type(value) in (int, float) and not 0 < value <= MOST_LAYERS:
            raise UserError(
                f"expected {name} of 1 to {MOST_LAYERS} in {path}, found {value:.6g}; {remedy}"
            )
        if isinstance(value, dict):  # a multimodal model's text_config
            require_plausible(value, path, remedy)


def builder_of(config: PretrainedConfig) -> Any:
    """transformers' class that builds a model of `config` which answers text.

    Where it has no text model for it, one that takes images too, to be given text alone.
    """
    takes_images = type(config) in AutoModelForImageTextToText._model_mapping
    if takes_images and type(config) not in AutoModelForCausalLM._model_mapping:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM


def build_on_meta(
    config: PretrainedConfig, dtype: torch.dtype, attention: str, task: str, remedy: str
) -> PreTrainedModel:
    """transformers' model of `config` on the meta device; UserError where it cannot build one."""
    with transformers_told(task, remedy), torch.device("meta"):
        model: PreTrainedModel = builder_of(config).from_config(
            config, dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
    return model


def experts_per_token(config: PretrainedConfig) -> int | None:
    """The most experts that a router chooses for a token; None where the config does not say.

    The field may be a list, one number per layer (Hunyuan).
    """
    top_k = getattr(config.get_text_config(), "num_experts_per_tok", None)
    return max(top_k) if isinstance(top_k, list) else top_k


def require_experts_per_token(
    config: PretrainedConfig, n_experts: int, path: Path, remedy: str
) -> None:
    """UserError when a router is to choose more experts than a layer's `n_experts`, or none."""
    top_k = experts_per_token(config)
    if top_k is not None and not 1 <= top_k <= n_experts:
        raise UserError(
            f"expected num_experts_per_tok of 1 to {n_experts} in {path}, found {top_k}; {remedy}"
        )


def require_generation_config(found: dict[str, Any], path: Path, remedy: str) -> None:
    """UserError for generation defaults that transformers or our own loop cannot use."""
    for name in _STOP_IDS:
        value = found.get(name)
        ids = value if isinstance(value, list) else [value]
        if value is not None and not all(type(one) is int and one >= 0 for one in ids):
            raise UserError(
                f"expected {name} in {path} as a token id or a list of them, found {value!r}; "
                f"{remedy}"
            )
    with transformers_told(f"use the generation defaults in {path}", remedy):
        GenerationConfig.from_dict(dict(found))


def read_hub_config(folder: Path) -> tuple[PretrainedConfig, Settings | None]:
    """The config of a Hugging Face folder, without what it says of quantisation, and that.

    UserError for an unknown model, or one that is quantised in a way that is not read.
    """
    path = folder / "config.json"
    found = read_json_object(path)
    quantised = _quantisation(found, folder)
    settings = read_settings(quantised, str(folder)) if quantised else None
    model_type = str(found.get("model_type"))
    known = _SAME_AS.get(model_type, model_type)
    if "auto_map" in found and known not in CONFIG_MAPPING:
        raise UserError(
            f"{path} names a model of type {model_type:.80}, which transformers does not have: its "
            "code comes with the folder (auto_map), and code of a checkpoint is never run; use a "
            "version of the model for transformers itself, or a newer transformers"
        )
    require_plausible(found, path, "correct it or download it again")
    with transformers_told(f"use {path}", "install a newer transformers or download it again"):
        if known == model_type:
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        else:
            config = AutoConfig.for_model(**(found | {"model_type": known}))
    for part in (config, config.get_text_config()):
        for name in _QUANTISATION:
            if hasattr(part, name):
                delattr(part, name)
    return config, settings


def _quantisation(found: dict[str, Any], folder: Path) -> Any:
    """What a config says of quantisation: in one of two places, or ModelOpt's in its own file."""
    text = found.get("text_config")
    for part in (found, text if isinstance(text, dict) else {}):
        for name in _QUANTISATION:
            if part.get(name):
                return part[name]
    own = folder / "hf_quant_config.json"
    return {"quant_method": "modelopt"} if own.exists() else None


def read_native_config(folder: Path) -> MixtralConfig:
    """The config that `params.json` describes; UserError when it is not a Mixtral's."""
    path = folder / "params.json"
    params = read_json_object(path)
    moe = params.get("moe")
    if moe is None:
        raise UserError(
            f"{path} has no 'moe' entry: this is not a Mixture-of-Experts model; run it with "
            "mistral-inference or transformers"
        )
    other = sorted({*moe} - _KNOWN_MOE) if isinstance(moe, dict) else []
    if "q_lora_rank" in params or other:
        raise UserError(
            f"{path} describes another architecture than Mixtral (it has "
            f"'{[*other, 'q_lora_rank'][0]}'); use the Hugging Face version of the model with --hf"
        )
    require_plausible(params, path, "download it again")
    with transformers_told(f"use {path}", "download it again"):
        return MixtralConfig(
            architectures=["MixtralForCausalLM"],
            vocab_size=params["vocab_size"],
            hidden_size=params["dim"],
            intermediate_size=params["hidden_dim"],
            num_hidden_layers=params["n_layers"],
            num_attention_heads=params["n_heads"],
            num_key_value_heads=params.get("n_kv_heads", params["n_heads"]),
            head_dim=params.get("head_dim", params["dim"] // params["n_heads"]),
            rms_norm_eps=params["norm_eps"],
            max_position_embeddings=params.get("max_seq_len", _DEFAULT_CONTEXT),
            rope_parameters={
                "rope_type": "default",
                "rope_theta": float(params.get("rope_theta", _DEFAULT_ROPE_THETA)),
            },
            sliding_window=params.get("sliding_window"),
            num_local_experts=moe["num_experts"],
            num_experts_per_tok=moe["num_experts_per_tok"],
            tie_word_embeddings=False,
        )


def stored_dtype(model: PreTrainedModel, name: str) -> torch.dtype:
    """The dtype transformers would load this tensor in: modules it keeps in fp32 stay fp32."""
    plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
    for pattern, dtype in plan.items():
        if re.search(pattern.replace("*", ".*"), name):
            return dtype
    path, _, leaf = name.rpartition(".")
    tensor: torch.Tensor = getattr(model.get_submodule(path), leaf)
    return tensor.dtype
