"""Mistral's native checkpoint format, for Mixtral: `params.json` and `consolidated*` files.

It differs from the hub's in three ways. Names: the table below. Rotary embedding: it rotates the
neighbours (2i, 2i + 1) of a head where transformers rotates (i, i + head_dim / 2), so the rows of
wq and wk are sorted apart. Experts: the first release stacks them, `block_sparse_moe.w1|w2|w3`
[E*I, H] with w2 transposed; later ones have one tensor each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from torch import Tensor
from transformers import MixtralConfig

from moe_offload.checkpoint.model_config import transformers_told
from moe_offload.checkpoint.source_files import LazyTensor
from moe_offload.errors import UserError
from moe_offload.files import read_json_object

_TOP_NAMES: Final = {
    "tok_embeddings.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES: Final = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "feed_forward.gate.weight": "block_sparse_moe.gate.weight",
    "block_sparse_moe.gate.weight": "block_sparse_moe.gate.weight",
}
_LAYER: Final = re.compile(r"layers\.(\d+)\.(.+)")
_EXPERT: Final = re.compile(r"(?:feed_forward|block_sparse_moe)\.experts\.(\d+)\.(w[123])\.weight")
_STACKED: Final = re.compile(r"block_sparse_moe\.(w[123])(?:\.weight)?")

_DEFAULT_CONTEXT: Final = 32768  # Mixtral 8x7B; its params.json does not say
_DEFAULT_ROPE_THETA: Final = 1e6  # likewise
_REQUIRED: Final = ("dim", "n_layers", "hidden_dim", "n_heads", "norm_eps", "vocab_size", "moe")
_KNOWN_MOE: Final = {"num_experts", "num_experts_per_tok"}


def read_native_config(folder: Path) -> MixtralConfig:
    """The config that `params.json` describes; UserError when it is not a Mixtral's."""
    path = folder / "params.json"
    params = read_json_object(path)
    if params.get("moe") is None:
        raise UserError(
            f"{path} has no 'moe' entry: this is not a Mixture-of-Experts model; run it with "
            "mistral-inference or transformers"
        )
    if not isinstance(params["moe"], dict) or params["moe"].keys() < _KNOWN_MOE:
        raise UserError(
            f"expected num_experts and num_experts_per_tok in the 'moe' entry of {path}, found "
            f"{params['moe']!r}; download it again"
        )
    unknown = set(params["moe"]) - _KNOWN_MOE
    if unknown or "q_lora_rank" in params:
        raise UserError(
            f"{path} describes another architecture than Mixtral (it has "
            f"'{sorted(unknown)[0] if unknown else 'q_lora_rank'}'); use the Hugging Face version "
            "of the model with --hf"
        )
    for key in _REQUIRED:
        if key not in params:
            raise UserError(f"{path} lacks the entry '{key}'; download it again")
    with transformers_told(f"use {path}", "download it again"):
        config = _mixtral_config(params)
    config.architectures = ["MixtralForCausalLM"]
    return config


def _mixtral_config(params: dict[str, Any]) -> MixtralConfig:
    return MixtralConfig(
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
        num_local_experts=params["moe"]["num_experts"],
        num_experts_per_tok=params["moe"]["num_experts_per_tok"],
        tie_word_embeddings=False,
    )


def to_hub_tensors(tensors: dict[str, LazyTensor], config: MixtralConfig) -> dict[str, LazyTensor]:
    """The same checkpoint under the hub's names, in the hub's layout, still unread."""
    renamed: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        match = _LAYER.fullmatch(name)
        if match is None:
            renamed[_TOP_NAMES.get(name, name)] = tensor
            continue
        layer, part = f"model.layers.{match[1]}.", match[2]
        if expert := _EXPERT.fullmatch(part):
            renamed[f"{layer}block_sparse_moe.experts.{expert[1]}.{expert[2]}.weight"] = tensor
        elif stacked := _STACKED.fullmatch(part):
            for position, weight in enumerate(_unstack(tensor, config, stacked[1] == "w2")):
                key = f"{layer}block_sparse_moe.experts.{position}.{stacked[1]}.weight"
                renamed[key] = weight
        elif part in ("attention.wq.weight", "attention.wk.weight"):
            renamed[layer + _LAYER_NAMES[part]] = _to_half_rotation(tensor, config.head_dim)
        else:
            renamed[layer + _LAYER_NAMES.get(part, part)] = tensor
    return renamed


def _unstack(tensor: LazyTensor, config: MixtralConfig, transposed: bool) -> Iterator[LazyTensor]:
    rows, hidden_size = config.intermediate_size, config.hidden_size
    n_experts: int = config.num_local_experts
    if tensor.shape != (n_experts * rows, hidden_size):
        raise UserError(
            f"the stacked experts in {tensor.path} have shape {tensor.shape}, params.json promises "
            f"{(n_experts * rows, hidden_size)}; download both again"
        )
    for expert in range(n_experts):
        yield _Slice(tensor, expert * rows, rows, transposed).lazy()


class _Slice:
    """Rows [first, first + n_rows) of a tensor, on request transposed."""

    def __init__(self, tensor: LazyTensor, first: int, n_rows: int, transposed: bool) -> None:
        self._tensor, self._first, self._n_rows = tensor, first, n_rows
        self._transposed = transposed

    def lazy(self) -> LazyTensor:
        columns = self._tensor.shape[1]
        shape = (columns, self._n_rows) if self._transposed else (self._n_rows, columns)
        return replace(self._tensor, shape=shape, read_rows=self._read_rows)

    def _read_rows(self, start: int, stop: int) -> Tensor:
        if not self._transposed:
            return self._tensor.read_rows(self._first + start, self._first + stop)
        rows = self._tensor.read_rows(self._first, self._first + self._n_rows)
        return rows.t()[start:stop].contiguous()


def _to_half_rotation(tensor: LazyTensor, head_dim: int) -> LazyTensor:
    """Per head, the even rows first, then the odd ones."""

    def read_rows(start: int, stop: int) -> Tensor:
        weight = tensor.read()
        pairs = weight.view(-1, head_dim // 2, 2, weight.shape[1])
        return pairs.transpose(1, 2).reshape(weight.shape)[start:stop].contiguous()

    return replace(tensor, read_rows=read_rows)
